"""Random weights, a layer at a time: the same numbers whoever draws them, however many ranks share them.

Enters: a model without weights, a seed. Leaves: `Drawn`, which fills tensors with rows. Every rank draws every number,
by the architecture's own rule and in the same order, and keeps its rows; what is held meanwhile is one decoder layer,
or one weight outside the layers. Example: a model of 1.0e9 parameters in 16 layers never needs more than 412 MB (its
embedding, fp32) beside what it keeps.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmcore.model.safetensors_weights import Wanted


class Undrawn(Exception):
    """The architecture's own rule leaves a weight as it was; the message names it."""


class Drawn:
    """Weights drawn by `_init_weights` of the model's class, which transformers itself initialises with."""

    def __init__(self, build: Callable[[], PreTrainedModel], layers: Callable[[nn.Module], nn.ModuleList], seed: int):
        self._build, self._layers, self._seed = build, layers, seed

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that is drawn."""
        return tuple(self._build().get_parameter(name).shape)

    @torch.no_grad()
    def fill(self, wanted: Wanted) -> None:
        """Draw everything, keep the rows that are wanted. Raises Undrawn."""
        model = self._build()
        generator = torch.random.get_rng_state()
        torch.manual_seed(self._seed)
        try:
            for prefix, unit in self._units(model):
                for name, whole in self._draw(model, prefix, unit):
                    if name in wanted:
                        first, rows = wanted[name]
                        rows.copy_(whole[first : first + rows.shape[0]])
        finally:
            torch.random.set_rng_state(generator)

    def _units(self, model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
        """Decoder layers as wholes, since some classes draw a layer's weights from above; all other modules alone."""
        layers = set(self._layers(model))
        inside = {module for layer in layers for module in layer.modules()} - layers
        for prefix, module in model.named_modules():
            if module in layers or (module not in inside and module._parameters):
                yield prefix, module

    def _draw(self, model: PreTrainedModel, prefix: str, unit: nn.Module) -> Iterator[tuple[str, Tensor]]:
        layer = unit in set(self._layers(model))
        modules = [*_children_first(unit)] if layer else [unit]
        own = [(module, name) for module in modules for name, p in module._parameters.items() if p is not None]
        places = {id(module): path for path, module in unit.named_modules(prefix=prefix)}
        empty = [module._parameters[name] for module, name in own]
        for module, name in own:
            blank = torch.full(tuple(module._parameters[name].shape), torch.nan)  # type: ignore[union-attr]
            module._parameters[name] = nn.Parameter(blank)
        for module in modules:
            model._init_weights(module)
        for (module, name), before in zip(own, empty, strict=True):
            drawn, module._parameters[name] = module._parameters[name], before
            path = f"{places[id(module)]}.{name}"
            assert drawn is not None
            if drawn.isnan().any():
                raise Undrawn(f"{type(model).__name__} has no rule for {path}")
            yield path, drawn.detach()


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module
