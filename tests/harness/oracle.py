"""The end-to-end specification: plain transformers, padded, in one process; with small models and data to compare
rmcore with it.
"""

from collections.abc import Sequence
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rmcore.data.tokens.comparisons import TokenizedComparison
from rmcore.model.backbone import turn_dropout_off
from rmcore.model.classifier import text_model
from rmcore.model.reward_model import RewardModel

PAD = 1
SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "num_labels": 1,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
FAMILIES = {
    "gpt_neox": ("GPTNeoXConfig", {**SMALL, "rotary_pct": 0.25}),
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": None}),
    "mistral_window": ("MistralConfig", {**GROUPED, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "gpt2": ("GPT2Config", {**SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96}),
    "bloom": ("BloomConfig", {**SMALL, "n_layer": 3, "n_head": 4}),
}
# MPT, whose code needs a mask: it shares prompts by masks, and the other fast paths raise.
MASKED = (
    "MptConfig",
    {"d_model": 32, "n_heads": 4, "n_layers": 3, "expansion_ratio": 2, "max_seq_len": 96, "vocab_size": 61},
)
# The families that share a prompt by the attention function, and whose code computes in fp64 what it gets in fp64.
EXACT_SHARED = ["gpt_neox", "llama", "mistral", "mistral_window", "qwen2", "qwen3", "gpt2"]
# fp64: 3 layers of sums of about 100 terms, each rounded at 1.1e-16, through gradients of order 10. fp32: at 6e-8.
BOUND = {torch.float64: 1e-12, torch.float32: 5e-5}


def assert_close(ours: Tensor, theirs: Tensor, bound: float, what: object) -> None:
    """The largest difference is at most `bound`, relative to the largest value where that exceeds 1."""
    scale = max(1.0, theirs.abs().max().item())
    assert (ours - theirs).abs().max().item() <= bound * scale, what


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A sequence-classification model of the family with random weights and without dropout."""
    config_class, arguments = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(
        getattr(transformers, config_class)(**arguments), dtype=dtype
    )
    # Larger weights than a fresh model's, so that a wrong mask or position shows in the reward.
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    turn_dropout_off(model)
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
                module.forward = MethodType(rms_norm_in_its_own_dtype, module)
    return model


def rms_norm_in_its_own_dtype(module: torch.nn.Module, hidden: Tensor) -> Tensor:
    """Transformers' RMSNorm always rounds to fp32, which would hide errors below 1e-7 in fp64."""
    return module.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


class Wide(TorchFunctionMode):
    """Within, what transformers' code computes in fp32 whatever its input is, is computed in fp64.

    Norms, softmax and rotations there round to fp32, which would hide errors below 1e-7 in fp64.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.float:
            return args[0].double()
        args, kwargs = tree_map(
            lambda value: torch.float64 if value is torch.float32 else value, (list(args), kwargs or {})
        )
        if function is torch.full and isinstance(args[1], float):
            kwargs.setdefault("dtype", torch.float64)
        return function(*args, **kwargs)


class Scored(torch.nn.Module):
    """A decoder and a score head; with the logits of a sequence-classification model, which not every family has."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        size = backbone.config.get_text_config().hidden_size
        self.base_model, self.score = backbone, torch.nn.Linear(size, 1, bias=False, dtype=backbone.dtype)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = self.base_model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
        ).last_hidden_state
        last = attention_mask.sum(1) - 1
        return SimpleNamespace(logits=self.score(hidden[torch.arange(len(last)), last]))


def reward_model(model: PreTrainedModel | Scored, path: str) -> RewardModel:
    backbone = text_model(model) if isinstance(model, PreTrainedModel) else model.base_model
    return RewardModel(backbone, model.score, pad_token_id=PAD, path=path)


class Item(TokenizedComparison):
    """One tokenised comparison."""

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(map(len, self.tails))


class Items(list):
    """Comparisons in memory, from which batches can be built."""

    def comparison(self, number: int) -> Item:
        return self[number]


def item(prefix: int, *tails: int, seed: int = 0, pairs: Sequence[tuple[int, int]] = ((0, 1),)) -> Item:
    """A random comparison with a prefix and tails of the given lengths; tails differ in their first token."""
    generator = np.random.Generator(np.random.PCG64(seed))
    answers = [generator.integers(20, 61, size=length) for length in tails]
    for place, answer in enumerate(answers):
        answer[:1] = 2 + place
    return Item(
        prefix=generator.integers(20, 61, size=prefix),
        tails=answers,
        pairs=np.array(pairs, dtype=np.int64).reshape(-1, 2),
        margin=np.zeros(len(pairs), dtype=np.float32),
        weight=np.ones(len(pairs), dtype=np.float32),
    )


def odd_items() -> Items:
    """The cases in which packing is most likely to go wrong; the keys describe them."""
    seven = [(a, b) for a in range(7) for b in range(a + 1, 7)]
    cases = {
        "plain": item(12, 5, 9, seed=1),
        "rejected is a prefix of chosen": item(8, 6, 0, seed=2),
        "chosen is a prefix of rejected": item(8, 0, 6, seed=3),
        "no common prefix": item(0, 4, 7, seed=4),
        "one-token answers": item(10, 1, 1, seed=5),
        "one-token texts": item(0, 1, 1, seed=6),
        "seven answers": item(9, 3, 1, 4, 8, 0, 2, 5, seed=7, pairs=seven),
        "longer than a window": item(25, 14, 20, seed=8),
    }
    return Items(cases.values())


def padded(model: PreTrainedModel | Scored, items: Sequence[Item]) -> tuple[Tensor, list[Tensor]]:
    """The summed Bradley-Terry loss and each comparison's rewards, by the plain padded forward of transformers."""
    texts = [np.concatenate([one.prefix, tail]) for one in items for tail in one.tails]
    longest = max(map(len, texts))
    input_ids = torch.full((len(texts), longest), PAD)
    mask = torch.zeros_like(input_ids)
    for row, text in enumerate(texts):
        input_ids[row, : len(text)] = torch.from_numpy(text)
        mask[row, : len(text)] = 1
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, 0]
    rewards = list(logits.split([len(one.tails) for one in items]))
    loss = logits.new_zeros(())
    for one, reward in zip(items, rewards, strict=True):
        margin, weight = torch.from_numpy(one.margin), torch.from_numpy(one.weight)
        difference = reward[one.pairs[:, 0]] - reward[one.pairs[:, 1]] - margin
        loss = loss - (weight * F.logsigmoid(difference)).sum()
    return loss, rewards
