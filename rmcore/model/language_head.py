"""The language-modelling loss of the chosen answers, which keeps what the base model knows (GRM).

Input: the final hidden states of the rows before the answers' tokens, the language-model head [V, D], the tokens.
Output: the SUM of -log p(token) over these tokens, in fp32 (fp64 for fp64 input). The training loop divides it by the
number of such tokens in the whole step and multiplies it with loss.sft.
Example: V = 2, logits [0, 0] for one token: log 2 = 0.6931.

Yang et al., arXiv 2406.10216, section 3.2 (its SFT regularisation, as the plain negative log-likelihood per token). The
logits [M, V] never exist whole: the forward adds up their logsumexp block by block of the vocabulary, and the backward
computes each block again (as Wijmans et al., arXiv 2411.09009, in plain PyTorch). A block of the head's gradient is one
product over all M rows, so nothing is added up in half precision.
"""

import copy
import inspect
import re
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.model.classifier import decoder_class
from rmcore.model.conversion import stored
from rmcore.model.meta_model import OLD_GPT_NEOX_HEAD, parameters_on_meta
from rmcore.model.safetensors_weights import weight_files

BLOCK = 2**25  # logits of a block: 128 MiB in fp32
WEIGHT = "lm_head.weight"  # the head in the reward model and in checkpoints


def language_head(config: ModelConfig, hf_model: PreTrainedModel, seed: int) -> nn.Linear | None:
    """The head of the base model, in fp32 on the CPU; None if the token embedding is the head.

    It has as many rows as the embedding: rows for tokens that were added to the vocabulary are zeros.

    Raises:
        UserError: the model's logits are more than a product with the head, or its files do not hold one.
    """
    kept, name = empty_head(hf_model), _causal(hf_model.config).name
    if kept is None:
        return None
    with torch.no_grad():
        if config.init == "random":
            deviation = getattr(hf_model.config.get_text_config(), "initializer_range", 0.02)
            kept.weight.normal_(0.0, deviation, generator=torch.Generator().manual_seed(seed + 2))
        else:
            rows = _stored(config, (name, OLD_GPT_NEOX_HEAD, WEIGHT))
            kept.weight.zero_()
            kept.weight[: len(rows)] = rows[: len(kept.weight)]
    return kept


def empty_head(hf_model: PreTrainedModel, device: str = "cpu") -> nn.Linear | None:
    """A head of the right shape without values, in fp32; None if the token embedding is the head.

    Raises UserError if the model's logits are more than a product with the head.
    """
    causal, _ = _causal(hf_model.config)
    head, embedding = causal.get_output_embeddings(), cast(nn.Embedding, hf_model.get_input_embeddings()).weight
    if not _is_plain(causal, head):
        raise UserError(
            f"loss.sft: the logits of {type(causal).__name__} are more than a product with its language-model head, "
            "which rmcore does not compute; set loss.sft=0"
        )
    if head.weight is causal.get_input_embeddings().weight or is_tied(hf_model.config):
        return None
    return nn.Linear(embedding.shape[1], embedding.shape[0], bias=False, device="meta").to_empty(device=device)


def name_in_files(hf_config: PretrainedConfig) -> str:
    """The name of the head's weight in the files that AutoModelForCausalLM reads."""
    causal, name = _causal(hf_config)
    [(stored_name, _)] = stored(causal, [(name, causal.get_output_embeddings().weight)])
    return stored_name


class _Causal(NamedTuple):
    """The language model, with its parameters on meta, and the name of its head's weight."""

    model: PreTrainedModel
    name: str


def _causal(hf_config: PretrainedConfig) -> _Causal:
    with parameters_on_meta():
        causal = decoder_class(type(hf_config))._from_config(copy.deepcopy(hf_config))
    head = getattr(causal.get_output_embeddings(), "weight", None)
    return _Causal(causal, next((name for name, p in causal.named_parameters() if p is head), WEIGHT))


def is_tied(hf_config: PretrainedConfig) -> bool:
    """Whether the token embedding is the language-model head."""
    return bool(getattr(hf_config.get_text_config(), "tie_word_embeddings", False))


def _is_plain(causal: PreTrainedModel, head: Any) -> bool:
    """Whether the logits are one product of the final states with the head.

    Read from the source of the class: there is no bias, and its forward neither scales the states nor changes the
    logits.
    """
    if not isinstance(head, nn.Linear) or getattr(head, "bias", None) is not None:
        return False
    lines = [line.partition("#")[0].strip() for line in inspect.getsource(type(causal).forward).splitlines()]
    logits = [line for line in lines if re.match(r"logits\b[^=(,]*\s\W?=\s", line)]
    states = [line for line in lines if re.match(r"hidden_states\s+\W?=\s", line)]
    product = re.compile(r"logits = self\.\w+\([^()*/]*\)(\.contiguous\(\))?")
    return len(logits) == 1 and product.fullmatch(logits[0]) is not None and not re.search("[*/]", "".join(states))


def _stored(config: ModelConfig, names: tuple[str, ...]) -> Tensor:
    for path in weight_files(config.name, config.revision) or []:
        with safe_open(path, framework="pt") as file:
            for name in names:
                if name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    return file.get_tensor(name).float()
    raise UserError(
        f"model.name {config.name}: loss.sft needs the language-model head, and no safetensors file of the model holds "
        f"{names[0]}; start from a causal language model, or set loss.sft=0"
    )


def language_loss(hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor, block: int = BLOCK) -> Tensor:
    """The summed -log softmax(hidden_MD @ weight_VD^T)[target_M]; differentiable in the first two.

    Under autocast the products run in its dtype, otherwise in that of the weight.
    """
    return _LanguageLoss.apply(hidden_MD, weight_VD, target_M, block)


class _LanguageLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_MD: Tensor, weight_VD: Tensor, target_M: Tensor, block: int) -> Tensor:
        kind = hidden_MD.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_VD.dtype
        with torch.autocast(kind, enabled=False):
            hidden = hidden_MD.to(half)
            wide = torch.float64 if half == torch.float64 else torch.float32
            total_M = hidden.new_full((len(hidden),), -torch.inf, dtype=wide)  # logsumexp of the blocks so far
            picked_M = torch.zeros_like(total_M)
            for start, weight in _blocks(weight_VD, len(hidden), block):
                logits = (hidden @ weight.to(half).T).to(wide)
                total_M = torch.logaddexp(total_M, logits.logsumexp(1))
                place_M1, inside_M1 = _place(target_M, start, len(weight))
                picked_M += torch.where(inside_M1, logits.gather(1, place_M1), 0.0).squeeze(1)
        ctx.save_for_backward(hidden, weight_VD, target_M, total_M)
        ctx.block, ctx.dtype = block, hidden_MD.dtype
        return (total_M - picked_M).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_VD, target_M, total_M = ctx.saved_tensors
        wide, half = total_M.dtype, hidden.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=wide)
        grad_weight = torch.empty_like(weight_VD)
        for start, weight in _blocks(weight_VD, len(hidden), ctx.block):
            p = ((hidden @ weight.to(half).T).to(wide) - total_M[:, None]).exp_()
            place_M1, inside_M1 = _place(target_M, start, len(weight))
            p.scatter_add_(1, place_M1, -inside_M1.to(wide))
            p = (p * grads[0]).to(half)
            grad_hidden += p @ weight.to(half)
            grad_weight[start : start + len(weight)] = p.T @ hidden
        return grad_hidden.to(ctx.dtype), grad_weight, None, None


def _blocks(weight_VD: Tensor, rows: int, block: int) -> list[tuple[int, Tensor]]:
    """The head in blocks of the vocabulary, of at most `block` logits each, with the first token of each."""
    size = max(1, block // max(1, rows))
    return [(start, weight_VD[start : start + size]) for start in range(0, len(weight_VD), size)]


def _place(target_M: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """[M, 1]: the place of each token in a block of the vocabulary, and whether it is in it."""
    place = target_M[:, None] - start
    return place.clamp(0, size - 1), (place >= 0) & (place < size)
