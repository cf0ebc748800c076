"""Draws random weights one layer at a time: the same numbers on every rank, however many ranks share them.

Input: a function that builds the model without weights, and a seed. Output: `RandomWeights`, which fills tensors with
rows. Every rank draws every number, by the architecture's own rule and in the same order, and keeps only its rows. It
holds one decoder layer at a time, or one weight outside the layers.
Example: for a model of 1.0e9 parameters in 16 layers, drawing needs at most 412 MB (the embedding in fp32) in addition
to the rows that the rank keeps.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmcore.model.safetensors_weights import WantedRows


class NoDrawingRule(Exception):
    """The architecture's own rule leaves a weight unset; the message says which one."""


class RandomWeights:
    """Weights drawn by `_init_weights` of the model's class, the rule that transformers itself uses."""

    def __init__(self, build: Callable[[], PreTrainedModel], layers: Callable[[nn.Module], nn.ModuleList], seed: int):
        self._build, self._layers, self._seed = build, layers, seed

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""
        return tuple(self._build().get_parameter(name).shape)

    @torch.no_grad()
    def fill(self, wanted: WantedRows) -> None:
        """Draw all weights and keep the wanted rows. Raises NoDrawingRule."""
        model = self._build()
        generator = torch.random.get_rng_state()
        torch.manual_seed(self._seed)
        try:
            for prefix, unit in self._units(model):
                for name, whole in self._draw(model, prefix, unit):
                    if name in wanted:
                        first, rows = wanted[name]
                        rows.copy_(whole[first : first + rows.shape[0]] if rows.ndim else whole)
        finally:
            torch.random.set_rng_state(generator)

    def _units(self, model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
        """What is drawn at once: a whole decoder layer, because some classes draw its weights together, or a module."""
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
        # NaN marks what `_init_weights` does not set.
        empty = [module._parameters[name] for module, name in own]
        for module, name in own:
            blank = torch.full(tuple(module._parameters[name].shape), torch.nan)  # type: ignore[union-attr]
            module._parameters[name] = nn.Parameter(blank)
        for module in modules:
            model._init_weights(module)
        # Each weight is handed over and freed: the module gets its parameter on meta back.
        for (module, name), before in zip(own, empty, strict=True):
            drawn, module._parameters[name] = module._parameters[name], before
            path = f"{places[id(module)]}.{name}"
            assert drawn is not None
            if drawn.isnan().any():
                raise NoDrawingRule(f"{type(model).__name__} has no rule to draw {path}")
            yield path, drawn.detach()


def _children_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _children_first(child)
    yield module
