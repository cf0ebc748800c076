"""Counts the parameters and activation bytes of a model, from its config only.

Input: a Hugging Face config.
Output: a `DryRun` with `Sizes` (parameters by place) and `TokenBytes` (activation bytes per token of a micro batch).
Example: a 2.8b GPT-NeoX (D 2560) in bf16 keeps 85 kB per token and layer without recompute (33 D bytes), 51 kB (20 D)
with selective and 6 kB (2.3 D) with full recompute.

No weights are read and no arithmetic is done: two small copies of the model (two and three layers) run forward and
backward on torch's fake tensors, while the bytes of live storages are counted. What runs is rmcore's own packed forward
with the last layer pruned, so the count holds for any decoder that runs there. The fake tensors are on the CPU; a batch
that brings the index tensors of CUDA takes the path of CUDA, variable-length attention over gathered keys and values.
These are as many as the tokens of all texts, each with its prompt, so a dry run has as many per token as the data.

For a model that does not run on fake tensors, the rule of thumb in RULE_OF_THUMB is used.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from rmcore.config.lora import LoraConfig
from rmcore.data.batches.batch import RaggedBatch, build_batch
from rmcore.data.tokens.comparisons import TokenizedComparison
from rmcore.model.backbone import decoder_layers, recompute_activations, turn_dropout_off
from rmcore.model.classifier import new_classifier, state_width, text_model
from rmcore.model.lora import add_lora, store_base, targets
from rmcore.model.meta_model import set_padding
from rmcore.model.objectives import Objective
from rmcore.model.outputs import Outputs
from rmcore.model.pruning import OUTPUT, QUERY, attention_of
from rmcore.model.reward_model import PADDED, SHARED, RewardModel
from rmcore.model.router_balance import RouterBalance
from rmcore.model.row_split import ContextGroup
from rmcore.ops.layers import counting

RECOMPUTES = ("none", "selective", "full", "offload")  # the fastest first
# Bytes per token, layer and unit of width in bf16: an estimate that others checked against llm.c.
RULE_OF_THUMB = {"none": 30.0, "selective": 18.0, "full": 2.0, "offload": 2.0}
TOKENS = 2**18  # of the dry run's comparisons: so many that activations outweigh gradients
KEYS = 1.5  # gathered keys per token of a pair whose prompt is as long as both answers together
ROWS = 8  # of the smaller rectangle of the dry run
FULL = LoraConfig()  # no LoRA
# fp32 weights that products cast to bf16 (autocast); bf16 copies of the weights (FSDP2); fp32 throughout.
AUTOCAST, CAST, FP32 = "autocast", "cast", "fp32"


@dataclass(frozen=True)
class Sizes:
    """Parameters of a reward model, by place."""

    total: int
    layer: int  # of the largest decoder layer
    root: int  # outside the decoder layers
    embedding: int
    products: int  # that a token is multiplied with in all layers but the last
    last: int  # the same in the last layer, where all tokens need keys and values only
    layers: int  # number of decoder layers
    width: int  # query heads x head size
    trained: int  # all, or with LoRA the adapters and the score head
    adapters: int = 0  # that LoRA adds; not part of `total`
    adapted: int = 0  # elements of the matrices that LoRA adapts
    matrix: int = 0  # elements of the largest of these matrices


@dataclass(frozen=True)
class TokenBytes:
    """Activation bytes per token of a micro batch."""

    kept: float  # until the backward, in all layers
    working: float  # the most that is needed on top of that at any moment
    counted: bool  # by a dry run; False: by the rule of thumb

    @property
    def total(self) -> float:
        return self.kept + self.working


class DryRun:
    """A model without weights: its `sizes`, and its bytes per token, which are counted on the first call.

    lora: the section `model.lora` of the config; without peft, activations are those of full training.
    router_aux: with the balance of the experts, which keeps their scores, and runs the last layer on all tokens.
    Raises ValueError or OSError for a config from which transformers cannot build a decoder.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        *,
        trust_remote_code: bool = False,
        lora: LoraConfig = FULL,
        router_aux: bool = False,
    ) -> None:
        self.hf_config, self._trust, self._lora = hf_config, trust_remote_code, lora
        self._objective = Objective(router_aux=1.0 if router_aux else 0.0)
        self.sizes = _sizes(hf_config, self._meta_model(hf_config), lora)
        self._known: dict[tuple[str, str, bool, int, float], TokenBytes] = {}
        self._layers: dict[tuple[str, str, bool, int, float], tuple[bool, float]] = {}  # pruned; bytes of a layer
        self._saved: dict[tuple[str, str, bool, float], float] = {}

    def token_bytes(
        self,
        arithmetic: str,
        recompute: str,
        *,
        cuda: bool = True,
        context: int = 1,
        compiled: bool = False,
        keys: float = KEYS,
    ) -> TokenBytes:
        """Activation bytes under `arithmetic` (AUTOCAST, CAST or FP32) and `recompute` (one of RECOMPUTES).

        cuda: by the attention of CUDA, which gathers keys and values for each answer, without the layers' ops for CPUs;
            and what `offload` moves to host memory is not on the device.
        context: ranks that compute each row together; the bytes are those per token of a rank's own part, with the
            buffers of the exchange, and with the keys and values that are repeated for more ranks than heads.
        compiled: all layers but the last are compiled, and keep what the compiler's cut of their graphs keeps; where
            this cannot be counted, what they keep without a compiler, which is more.
        keys: that are gathered per token, on CUDA; fewer than KEYS count as KEYS.
        """
        keys = max(keys, KEYS) if cuda else KEYS
        if recompute == "offload" and not cuda:
            return self.token_bytes(arithmetic, "full", cuda=False, context=context, compiled=compiled)
        key = arithmetic, recompute, cuda, context, keys
        if key not in self._known:
            self._known[key] = self._count(*key)
        plain = self._known[key]
        return self._compiled(plain, arithmetic, recompute, cuda, keys) if compiled and plain.counted else plain

    def cell_bytes(self, arithmetic: str, recompute: str, length: int) -> TokenBytes:
        """Activation bytes per cell of a rectangle of rows of `length` tokens: by the model's own attention, with dense
        masks, and with the scores where it keeps them. Arguments as above.
        """
        by_cells = partial(self._cells, arithmetic=arithmetic, recompute=recompute, length=length)
        return self._extrapolated(arithmetic, recompute, by_cells)[0]

    def _cells(self, layers: int, arithmetic: str, recompute: str, length: int) -> tuple[float, float]:
        """(kept, working) bytes per cell of a model with so many layers."""
        short, long = (self._live_rectangle(layers, rows, length, arithmetic, recompute) for rows in (ROWS, 2 * ROWS))
        kept, peak = ((b - a) / (ROWS * length) for a, b in zip(short, long, strict=True))
        return kept, max(0.0, peak - kept)

    def _live_rectangle(self, layers: int, rows: int, length: int, arithmetic: str, recompute: str) -> tuple[int, int]:
        """The same as `_live_bytes`, of a rectangle [rows, length]."""
        hf_model = self._small_model(layers, arithmetic)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = self._fake_model(hf_model)
            model.use(PADDED)
            recompute_activations(model.backbone, recompute)
            model.train()
            ids = torch.empty(rows, length, dtype=torch.int64)
            half = torch.autocast("cpu", torch.bfloat16) if arithmetic == AUTOCAST else nullcontext()
            with LiveBytes(model) as live:
                with half:
                    found = model.backbone(input_ids=ids, attention_mask=torch.empty_like(ids), use_cache=False)
                    cells = found.last_hidden_state.flatten(0, 1)
                    loss = cells.index_select(0, torch.arange(len(cells))).sum()
                del found, cells
                kept = live.now
                loss.backward()
        return kept, live.peak

    def _count(self, arithmetic: str, recompute: str, cuda: bool, context: int, keys: float) -> TokenBytes:
        slope = partial(self._slope, arithmetic=arithmetic, recompute=recompute, cuda=cuda, context=context, keys=keys)
        # Pruning is tried first, as a run's self-test does.
        ways = [partial(slope, pruned=pruned) for pruned in (True, False)]
        found, way, of_one = self._extrapolated(arithmetic, recompute, *ways)
        if found.counted:
            self._layers[arithmetic, recompute, cuda, context, keys] = way == 0, of_one
        return found

    def _extrapolated(
        self, arithmetic: str, recompute: str, *ways: Callable[[int], tuple[float, float]]
    ) -> tuple[TokenBytes, int, float]:
        """The bytes of all layers, by the first way that counts those of two and of three, or else by the rule of
        thumb; the number of this way; what one layer keeps.

        All bytes are linear in the tokens, and those that are kept are linear in the layers as well. A constant part
        (bf16 copies of weights) cancels in the difference of two lengths.
        """
        layers, half = self.sizes.layers, 4.0 if arithmetic == FP32 else 2.0
        for number, way in enumerate(ways):  # noqa: B007 (used below)
            try:
                two, three = (way(count) for count in (2, 3))
                break
            except Exception:  # a model that fails on fake tensors must not stop `rmcore plan` or a run
                continue
        else:
            width = half / 2.0 * state_width(self.hf_config)
            live = 0.0 if recompute == "none" else RULE_OF_THUMB["none"]
            kept_layers = 2 if recompute == "offload" else layers
            return TokenBytes(kept_layers * width * RULE_OF_THUMB[recompute], width * live, counted=False), 0, 0.0

        # Of the inputs that `offload` moves away, at most two are on the device at any moment.
        kept_layers = min(layers, 3) if recompute == "offload" else layers
        of_one = three[0] - two[0]
        return TokenBytes(two[0] + (kept_layers - 2) * of_one, max(two[1], three[1]), counted=True), number, of_one

    def _compiled(self, plain: TokenBytes, arithmetic: str, recompute: str, cuda: bool, keys: float) -> TokenBytes:
        """`plain` with all layers compiled but the last."""
        # A layer that is computed again in its backward keeps meanwhile what one without recompute keeps.
        less, at_once = (self._saved_by_compiler(arithmetic, how, cuda, keys) for how in (recompute, "none"))
        kept = plain.kept - (self.sizes.layers - 1) * less
        return TokenBytes(kept, max(0.0, plain.working - (at_once - less)), counted=True)

    def _saved_by_compiler(self, arithmetic: str, recompute: str, cuda: bool, keys: float) -> float:
        """Bytes per token that a compiled layer keeps less than a plain one; 0 where that cannot be counted."""
        if recompute == "full":
            return 0.0  # its input, either way
        key = arithmetic, recompute, cuda, keys
        if key not in self._saved:
            plain = self.token_bytes(arithmetic, recompute, cuda=cuda, keys=keys)
            pruned, bytes_of_one = self._layers.get((arithmetic, recompute, cuda, 1, keys), (False, 0.0))
            found = self._compiled_layer(arithmetic, recompute, pruned, cuda, keys) if plain.counted else None
            self._saved[key] = 0.0 if found is None else bytes_of_one - found
        return self._saved[key]

    def _slope(
        self, layers: int, arithmetic: str, recompute: str, pruned: bool, cuda: bool, context: int, keys: float
    ) -> tuple[float, float]:
        """(kept, working) bytes per token of a model with so many layers."""
        how = arithmetic, recompute, pruned, cuda, context, keys
        short, long = (self._live_bytes(layers, count, *how) for count in (2, 4))
        tokens = 2 * _Comparisons(keys).tokens / context
        kept, peak = ((b - a) / tokens for a, b in zip(short, long, strict=True))
        return kept, max(0.0, peak - kept)

    def _live_bytes(
        self,
        layers: int,
        comparisons: int,
        arithmetic: str,
        recompute: str,
        pruned: bool,
        cuda: bool,
        context: int,
        keys: float,
    ) -> tuple[int, int]:
        """Live bytes after the forward, and their peak until the backward ends; not parameters and gradients."""
        with self._small(layers, comparisons, arithmetic, pruned, cuda, context, keys) as (model, forward):
            recompute_activations(model.backbone, recompute)
            with LiveBytes(model) as live, nullcontext() if cuda else counting():
                loss = forward()
                kept = live.now
                loss.backward()
        return kept, live.peak

    def _compiled_layer(self, arithmetic: str, recompute: str, pruned: bool, cuda: bool, keys: float) -> float | None:
        """Bytes per token that a compiled layer keeps, the second of three; None where that cannot be counted."""
        from rmcore.cost.compiled_layers import compiled_bytes

        comparisons = 2
        try:
            small = self._small(3, comparisons, arithmetic, pruned, cuda, 1, keys)
            with small as (model, forward), nullcontext() if cuda else counting():
                found = compiled_bytes(model.backbone, 1, recompute, forward)
        except Exception:  # as for a model that fails on fake tensors
            return None
        return None if found is None else found / (comparisons * _Comparisons(keys).tokens)

    @contextmanager
    def _small(
        self, layers: int, comparisons: int, arithmetic: str, pruned: bool, cuda: bool, context: int, keys: float
    ) -> Iterator[tuple[RewardModel, Callable[[], Tensor]]]:
        """A copy of the model with so many layers, and what returns its loss. Within, all tensors are fake."""
        hf_model = self._small_model(layers, arithmetic)
        shapes = _batch(comparisons, cuda, context, keys)
        # Made before the fake tensors, with which the rule of the routers could not be found.
        balance = RouterBalance(text_model(hf_model)) if self._objective.router_aux else None
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = self._fake_model(hf_model)
            model.context = _Alone(None, 0, context) if context > 1 else None
            if balance:
                model.add_balance(self._objective, balance)
            model.use(SHARED, pruned=pruned)
            model.train()
            batch = shapes.mapped(lambda t: torch.empty(t.shape, dtype=t.dtype))
            half = torch.autocast("cpu", torch.bfloat16) if arithmetic == AUTOCAST else nullcontext()

            def forward() -> Tensor:
                with half:
                    return model(batch).loss_sum

            yield model, forward

    def _small_model(self, layers: int, arithmetic: str) -> PreTrainedModel:
        """The model on meta with so many layers, and LoRA's adapters."""
        small = copy.deepcopy(self.hf_config)
        text = small.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        hf_model = self._meta_model(small, torch.bfloat16 if arithmetic == CAST else torch.float32)
        if self._adapters.rank is not None:
            add_lora(text_model(hf_model), self._adapters, seed=0)
        return hf_model

    @property
    def _adapters(self) -> LoraConfig:
        return self._lora if find_spec("peft") is not None else FULL

    def _fake_model(self, hf_model: PreTrainedModel) -> RewardModel:
        """The reward model on fake tensors, within their mode."""
        _to_fake(hf_model)
        turn_dropout_off(hf_model)
        lora = self._adapters
        if lora.base != "fp32":  # what the graph keeps is the same for every format that is restored at each use
            store_base(text_model(hf_model), lora.model_copy(update={"base": "bf16"}))
        score, outputs = cast(nn.Linear, hf_model.score), Outputs.stored(hf_model.config)
        return RewardModel(text_model(hf_model), score, pad_token_id=0, outputs=outputs)

    def _meta_model(self, hf_config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The sequence classifier on the meta device: shapes without memory."""
        hf_config = copy.deepcopy(hf_config)
        if len(Outputs.stored(hf_config).names) == 1:
            hf_config.num_labels = 1
        set_padding(hf_config, 0)
        with torch.device("meta"):
            return new_classifier(hf_config, dtype, trust_remote_code=self._trust)


def _sizes(hf_config: PretrainedConfig, model: PreTrainedModel, lora: LoraConfig) -> Sizes:
    layers = decoder_layers(model)
    adapted = [tuple(cast(Tensor, model.get_submodule(name).weight).shape) for name in _adapted(model, lora)]
    adapters = sum((lora.rank or 0) * sum(shape) + lora.dora * shape[0] for shape in adapted)
    # Towers are not trained and stay in host memory.
    total = _count(text_model(model)) + _count(cast(nn.Module, model.score))
    counts = [_count(layer) for layer in layers]
    used = _used_experts(hf_config)
    matrices = [_matrices(layer, used) for layer in layers]
    return Sizes(
        total=total,
        layer=max(counts),
        root=total - sum(counts),
        embedding=_count(model.get_input_embeddings()),
        products=round(sum(matrices[:-1])),
        last=_keys_and_values(layers[-1], matrices[-1]),
        layers=len(layers),
        width=_attention_width(hf_config),
        trained=total if lora.rank is None else adapters + _count(cast(nn.Module, model.score)),
        adapters=adapters,
        adapted=sum(map(math.prod, adapted)),
        matrix=max(map(math.prod, adapted), default=0),
    )


def _adapted(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """The names, in `model`, of the linear layers that LoRA adapts."""
    if lora.rank is None:
        return []
    text = text_model(model)
    place = {id(module): name for name, module in model.named_modules()}
    return [place[id(text.get_submodule(name))] for name in targets(text, lora)]


def _attention_width(hf_config: PretrainedConfig) -> int:
    """The number of query heads times the head size; the mean of the layers where they differ (Gemma 4)."""
    text: Any = hf_config.get_text_config()
    differ = getattr(text, "is_heterogeneous", False)  # the text's own config then raises for what differs
    layers = [text.per_layer_config[n] for n in range(text.num_hidden_layers)] if differ else [text]
    widths = []
    for layer in layers:
        heads = getattr(layer, "num_attention_heads", None) or 1  # a model without attention is as if it had one head
        widths.append(heads * (getattr(layer, "head_dim", None) or state_width(hf_config) // heads))
    return round(sum(widths) / len(widths))


# The names that configs give to the number of experts, and to those that a token is sent to.
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")


def _used_experts(hf_config: PretrainedConfig) -> float:
    """The share of its experts that a layer uses for a token; 1 if the config has no such numbers."""
    text: Any = hf_config.get_text_config()
    experts, used = (next((n for n in (getattr(text, x, None) for x in names) if n), 1) for names in (EXPERTS, USED))
    return used / experts if isinstance(used, int) and isinstance(experts, int) and used < experts else 1.0


def _keys_and_values(layer: nn.Module, whole: float) -> int:
    """Elements of the matrices that all tokens need in the last layer: attention's, without output and query."""
    try:
        attention = attention_of(layer)
    except ValueError:  # the layer cannot be pruned
        return round(whole)
    others = [module for name, module in attention.named_children() if name in (*OUTPUT, *QUERY)]
    return round(_matrices(attention) - sum(map(_matrices, others)))


def _matrices(module: nn.Module, used: float = 1.0) -> float:
    """Elements of the matrices that a token is multiplied with, on average; `used`: the share of the experts."""
    return sum(
        p.numel() * (used if "experts" in name.split(".") else 1.0)
        for name, p in module.named_parameters()
        if p.ndim > 1
    )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _to_fake(model: nn.Module) -> None:
    """Replaces parameters and buffers of a meta model by fake CPU tensors. The caller opens a FakeTensorMode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Comparisons:
    """Any number of equal comparisons: one pair, and as many more answers as give `keys` gathered keys per token."""

    def __init__(self, keys: float) -> None:
        # A answers to a prompt of p tokens have T + (A - 1) p keys in T tokens. At most half of the tokens are the
        # prompt's. Of many keys per token fewer tokens are enough; the index tensors of the keys are made in memory.
        # On a CPU the model would fill up a row that is not a multiple of 64, and the path of CUDA would not run.
        self.tokens = 64 * round(TOKENS * KEYS / keys / 64)
        self._answers = math.ceil(2 * keys - 1)
        prefix = self.tokens * (keys - 1) / (self._answers - 1)
        self._tail = round((self.tokens - prefix) / self._answers)
        self._prefix = self.tokens - self._answers * self._tail

    def comparison(self, number: int) -> TokenizedComparison:
        one = np.ones(1, dtype=np.float32)
        return TokenizedComparison(
            prefix=np.zeros(self._prefix, dtype=np.int32),
            tails=[np.zeros(self._tail, dtype=np.int32)] * self._answers,
            pairs=np.array([[0, 1]]),
            margin=0 * one,
            weight=one,
            ties=np.zeros((0, 2), dtype=np.int64),
            tie_weight=one[:0],
            score=np.full(self._answers, np.nan, dtype=np.float32),
        )


class _Alone(ContextGroup):
    """One rank of a context group without the others: its tensors have the shapes of the exchanged ones."""

    def exchange(self, values_N: Tensor) -> Tensor:
        return torch.empty_like(values_N.contiguous())

    def gather(self, values: Tensor) -> Tensor:
        return torch.cat([values.contiguous()] * self.size)


@cache
def _batch(comparisons: int, cuda: bool, context: int, keys: float) -> RaggedBatch:
    """Shapes of a batch without memory."""
    batch = build_batch(_Comparisons(keys), range(comparisons), multiple=context)
    return (batch.with_varlen() if cuda else batch).mapped(lambda t: t.to("meta"))


def _grouped_product(one: Tensor, other: Tensor, ends: Tensor | None = None, *_: object) -> Tensor:
    """The shape of the product of tokens that are grouped by experts: fake tensors know it in bf16 only."""
    if one.ndim == other.ndim == 2 and ends is not None:  # the gradient of the experts' weights
        return one.new_empty(len(ends), one.shape[0], other.shape[1])
    return one.new_empty(*one.shape[:-1], other.shape[-1])


def _efficient_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """The shapes of what it returns; torch's own function for them takes other arguments than the kernel."""
    return *map(torch.empty_like, arguments[1:4]), None


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the live storages that tensor operations have allocated: `now`, and their `peak`.

    `model`'s parameters and buffers are not counted, nor are its gradients once they are accumulated. Works on fake
    tensors and on real ones. Memory that an operation allocates and frees internally is not seen.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        for tensor in (*model.parameters(), *model.buffers(), *gradients):
            self._sizes[tensor.untyped_storage()._cdata] = 0
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._accumulated)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and isinstance(args[0], FakeTensor):
            out: Any = _grouped_product(*args)
        elif func is torch.ops.aten._efficient_attention_backward.default and isinstance(args[0], FakeTensor):
            out = _efficient_backward(*args)
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None, "the hook runs after accumulation"
        key = parameter.grad.untyped_storage()._cdata
        self.now -= self._sizes.get(key, 0)
        self._sizes[key] = 0
