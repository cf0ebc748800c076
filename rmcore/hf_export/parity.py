"""Is an exported directory what was trained? Asked of plain transformers, which rmcore's code has no part in.

In: the directory, a few texts as token ids, and the engine's rewards for them. Out: how far the rewards lie apart, or
an `ExportError`.
Example: rewards [0.3127, -1.0442] against [0.3127, -1.0442]: `Parity(difference=1.2e-07, allowed=1e-05)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from rmcore.data.formats.comparison import Comparison
from rmcore.data.tokens.templates import Template, TemplateRefused
from rmcore.data.tokens.tokenizer import TextEncoder
from rmcore.host.command import ExplainedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float8_e4m3fn: 2.0**-4}
ROUNDINGS_A_LAYER = 8  # results that a decoder layer rounds: q, k, v, attention, its projection, and three of the MLP
SIGMAS = 8.0


class ExportError(ExplainedError):
    """What was written is not what was trained."""


@dataclass(frozen=True)
class Probe:
    """Texts (token ids without padding) and the rewards that the engine gives them, for the comparison after writing.

    `precision`: the arithmetic that the engine's rewards come from.
    """

    token_ids: Sequence[Sequence[int]]
    rewards: Sequence[float]
    precision: torch.dtype = torch.float32


@dataclass(frozen=True)
class Parity:
    """How far the reloaded model's rewards lie from the engine's, and how far they may."""

    difference: float
    allowed: float


def reloaded(directory: Path) -> PreTrainedModel:
    """The directory as plain transformers loads it, in fp32. Raises ExportError: weights missing or unexpected."""
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    strangers = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(strangers.values()):
        raise ExportError(f"transformers does not find the weights it expects in the export: {strangers}")
    return model


@torch.no_grad()
def check_export(model: PreTrainedModel, probe: Probe, written: torch.dtype) -> Parity:
    """Compare the rewards of the reloaded `model` (or its shards; a collective then): each text alone, padded right,
    padded left.

    The three ways must agree to fp32 rounding, and the first with the engine to the rounding of its precision and of
    the `written` weights.

    Raises ExportError naming the text and the two rewards that differ most.
    """
    model.eval()
    scales = [0.0]

    # A reward is a sum of D products: rounding of relative size e moves it by about e * |hidden| |weight| / sqrt(D).
    def measure(score: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hidden, weight = args[0][0, -1].double(), cast(torch.Tensor, score.weight)[0].double()
        scales.append(float(hidden.norm() * weight.norm()) / weight.numel() ** 0.5)

    hook = cast(torch.nn.Module, model.score).register_forward_pre_hook(measure)
    texts = [torch.tensor([list(ids)], device=model.device) for ids in probe.token_ids]
    alone = torch.tensor([float(model(input_ids=text).logits[0, 0]) for text in texts], dtype=torch.float64)
    hook.remove()
    scale = max(scales)
    layers = model.config.num_hidden_layers
    rounding = allowed_difference(torch.float32, layers, scale, alone)
    for side in ("right", "left"):
        _compare(f"padded {side}", _padded(model, probe.token_ids, side), "alone", alone, rounding)
    precision = max(written, probe.precision, key=UNIT_ROUNDOFF.__getitem__)
    allowed = allowed_difference(precision, layers, scale, alone)
    engine = torch.tensor(list(probe.rewards), dtype=torch.float64)
    return Parity(_compare("reloaded", alone, "the engine's", engine, allowed), allowed)


def allowed_difference(precision: torch.dtype, layers: int, scale: float, rewards: torch.Tensor) -> float:
    """How far rounding alone may move a reward: 8 sigmas of the independent roundings of all layers, and in fp32 at
    least 1e-5 of the rewards' size."""
    rounding = SIGMAS * UNIT_ROUNDOFF[precision] * (ROUNDINGS_A_LAYER * layers) ** 0.5 * scale
    return max(rounding, 1e-5 * max(1.0, float(rewards.abs().max())))


def _padded(model: PreTrainedModel, token_ids: Sequence[Sequence[int]], side: str) -> torch.Tensor:
    longest = max(map(len, token_ids))
    input_ids = torch.full((len(token_ids), longest), model.config.pad_token_id, device=model.device)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(token_ids):
        place = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        input_ids[row, place], mask[row, place] = torch.tensor(list(ids), device=model.device), 1
    extra = {}
    if side == "left" and "position_ids" in inspect.signature(model.forward).parameters:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)  # else learned positions would count the padding
    return model(input_ids=input_ids, attention_mask=mask, **extra).logits[:, 0].double().cpu()


def _compare(what: str, found: torch.Tensor, other: str, expected: torch.Tensor, allowed: float) -> float:
    difference = (found - expected).abs()
    worst = int(difference.nan_to_num(torch.inf).argmax())
    if not bool(difference[worst] <= allowed):
        raise ExportError(
            f"the exported model's rewards are wrong: text {worst} has {float(found[worst]):.6g} {what} and "
            f"{float(expected[worst]):.6g} {other}; the difference may be {allowed:.2g}"
        )
    return float(difference[worst])


def check_tokenizer(
    directory: Path, tokenizer: PreTrainedTokenizerFast, template: Template, token_ids: Sequence[Sequence[int]]
) -> None:
    """Reload the tokenizer: the same text must become the same ids as in training, also through the chat template.

    Raises ExportError.
    """
    from transformers import AutoTokenizer

    reloaded: Any = AutoTokenizer.from_pretrained(directory)
    texts = [str(tokenizer.decode(list(ids))) for ids in token_ids]
    trained, exported = TextEncoder(tokenizer).encode(texts), TextEncoder(reloaded).encode(texts)
    if not all(np.array_equal(a, b) for a, b in zip(trained, exported, strict=True)):
        raise ExportError("the exported tokenizer gives other token ids than the one that was trained with")
    text = probe_text(template)
    if text is not None:
        ids = reloaded.apply_chat_template(_PROBE_TURNS, tokenize=True, return_dict=False)
        if list(ids) != TextEncoder(tokenizer).encode([text])[0].tolist():
            raise ExportError("the exported chat template gives other token ids than the template of the training")


_PROBE_TURNS = [{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is."}]


def probe_text(template: Template) -> str | None:
    """A short conversation as training renders it; None for plain texts, or when the template refuses it."""
    if template.chat_template is None:
        return None
    probe: dict[str, Any] = {"pairs": (), "margin": (), "weight": (), "source": "", "prompt_key": ""}
    try:
        return template.render(Comparison(prompt=_PROBE_TURNS[:1], answers=(_PROBE_TURNS[1:],), **probe))[1][0]
    except TemplateRefused:
        return None
