"""Checks that an exported directory is the trained model: reloaded, it must give the engine's rewards.

Input: the reloaded model, a few texts as token ids, and the engine's rewards for them.
Output: the largest difference of the rewards, or an `ExportError`. Plain transformers computes the reloaded rewards; of
a model that it has no class for, it computes all but the score head (rmcore.model.classifier).
Example: rewards [0.3127, -1.0442] and [0.3127, -1.0442]: `Parity(difference=1.2e-07, allowed=1e-05)`.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rmcore.data.formats.comparison import Comparison
from rmcore.data.tokens.encoder import TextEncoder
from rmcore.data.tokens.templates import Template, TemplateRefused
from rmcore.host.command import ExplainedError
from rmcore.model.classifier import brings_code, classifier_class, is_made
from rmcore.model.recurrent.substitute import substitute_scans
from rmcore.model.rounding import UNIT_ROUNDOFF, allowed_difference


class ExportError(ExplainedError):
    """The exported model is not the trained one."""


@dataclass(frozen=True)
class Probe:
    """Texts (token ids without padding) and the engine's rewards for them, to compare with after writing.

    A model of K outputs has K rewards for each text, one after the other.

    `precision`: the arithmetic in which the engine computed these rewards.
    """

    token_ids: Sequence[Sequence[int]]
    rewards: Sequence[float]
    precision: torch.dtype = torch.float32


@dataclass(frozen=True)
class Parity:
    """The largest difference between the reloaded model's rewards and the engine's, and the largest allowed one.

    `left`: why texts must not be padded on the left. `made`: a class that transformers does not have. Most models have
    neither.
    """

    difference: float
    allowed: float
    left: str = ""
    made: str = ""

    @property
    def notes(self) -> list[str]:
        """Facts that users of the model should know."""
        return [
            *([f"note: pad this model's texts on the right, never on the left: {self.left}"] if self.left else []),
            *([f"note: transformers has no class {self.made}: the model loads in rmcore"] if self.made else []),
        ]


def reloaded(directory: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The directory as plain transformers loads it, in fp32; where that has no class, as rmcore does.

    Raises ExportError: weights are missing, unexpected or of another shape.
    """
    loader: Any = AutoModelForSequenceClassification
    given: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    hf_config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if brings_code(hf_config, trust_remote_code=trust_remote_code):
        given["trust_remote_code"] = True
    elif is_made(kind := classifier_class(hf_config)):
        loader = kind
    model, info = loader.from_pretrained(directory, **given)
    faults = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(faults.values()):
        raise ExportError(f"transformers does not find the weights that it expects in {directory}: {faults}")
    substitute_scans(model)  # with the kernels of recurrent layers installed, plain transformers raises on the CPU
    return model


@torch.no_grad()
def check_export(model: PreTrainedModel, probe: Probe, written: torch.dtype) -> Parity:
    """Compare the rewards of the reloaded model, with each text by itself and padded on the right.

    If every rank holds a shard of `model`, this is a collective.

    Args:
        written: the dtype of the weights on disk.
    Raises:
        ExportError: the message has the text whose two rewards differ most, and both rewards.
    """
    model.eval()
    # A reward is a sum of D products hidden_d * weight_d. Errors of relative size e, independent in the D terms, move
    # it by about e * sqrt(sum of (hidden_d * weight_d)^2), which is e * |hidden| * |weight| / sqrt(D) for typical
    # vectors. `scale` is this without e, the largest of all texts.
    scales = [0.0]

    def measure(score: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hidden, weight_KD = args[0][0, -1].double(), cast(torch.Tensor, score.weight).double()
        scales.append(float(hidden.norm() * weight_KD.norm(dim=1).max()) / hidden.numel() ** 0.5)

    hook = cast(torch.nn.Module, model.score).register_forward_pre_hook(measure)
    texts = [torch.tensor([list(ids)], device=model.device) for ids in probe.token_ids]
    alone = torch.stack([model(input_ids=text, use_cache=False).logits[0].double().cpu() for text in texts])
    hook.remove()
    scale = max(scales)
    layers = depth(model)
    # Padding changes nothing but the order of sums, and all three ways run in fp32: they must agree to its rounding.
    rounding = allowed_difference(torch.float32, layers, scale, alone)
    _compare("padded right", _padded(model, probe.token_ids, "right"), "alone", alone, rounding)
    try:
        _compare("padded left", _padded(model, probe.token_ids, "left"), "alone", alone, rounding)
        left = ""
    except Exception as error:  # some recurrent models read the padding in front of a text as a part of it
        left = " ".join(str(error).split())[:200]
    # Between the engine and the reloaded model lie two roundings: that of the weights on disk and that of the engine's
    # arithmetic. The coarser one sets the bound.
    precision = max(written, probe.precision, key=UNIT_ROUNDOFF.__getitem__)
    allowed = allowed_difference(precision, layers, scale, alone)
    engine = torch.tensor(list(probe.rewards), dtype=torch.float64).reshape(alone.shape)
    made = type(model).__name__ if is_made(type(model)) else ""
    return Parity(_compare("reloaded", alone, "the engine's", engine, allowed), allowed, left, made)


def depth(model: PreTrainedModel) -> int:
    """The number of decoder layers; composite configs keep it in their text part, and some configs do not have it."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int):
        return layers
    return max((len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)), default=1)


def _padded(model: PreTrainedModel, token_ids: Sequence[Sequence[int]], side: str) -> torch.Tensor:
    longest = max(map(len, token_ids))
    input_ids = torch.full((len(token_ids), longest), model.config.get_text_config().pad_token_id, device=model.device)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(token_ids):
        place = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        input_ids[row, place], mask[row, place] = torch.tensor(list(ids), device=model.device), 1
    extra = {}
    if side == "left" and "position_ids" in inspect.signature(model.forward).parameters:
        extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)  # without it learned positions count the padding
    return model(input_ids=input_ids, attention_mask=mask, use_cache=False, **extra).logits.double().cpu()


def _compare(what: str, found: torch.Tensor, other: str, expected: torch.Tensor, allowed: float) -> float:
    difference = (found - expected).abs().reshape(-1)
    worst = int(difference.nan_to_num(torch.inf).argmax())
    if not bool(difference[worst] <= allowed):
        numbers = [float(values.reshape(-1)[worst]) for values in (found, expected)]
        raise ExportError(
            f"the exported model's rewards are wrong: text {worst // found.shape[1]} has {numbers[0]:.6g} {what} and "
            f"{numbers[1]:.6g} {other}; the allowed difference is {allowed:.2g}"
        )
    return float(difference[worst])


def check_tokenizer(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    template: Template,
    token_ids: Sequence[Sequence[int]],
    trust_remote_code: bool = False,
) -> None:
    """Reload the tokenizer: texts must give the token ids of the training, in every way in which programs tokenise.

    These ways are with special tokens (the default: pipelines, RewardBench, vLLM), without them, and the chat template.
    Plain texts have no template that could write BOS, so there only the default is compared if the tokenizer adds BOS.

    Raises ExportError if one does not.
    """
    reloaded: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    encoder, bos = TextEncoder(tokenizer), str(tokenizer.bos_token)
    for ids in token_ids:
        text = str(tokenizer.decode(list(ids)))
        [expected] = encoder.encode([text])
        if encoder.bos is not None:  # the exported template writes BOS; in front of a plain text it must not be spelled
            text = text.removeprefix(bos) if template.wants_text else bos + text.removeprefix(bos)
            [expected] = encoder.encode([text])
        _compare_ids(reloaded, text, expected, bare=not (template.wants_text and encoder.bos is not None))
    for turns in PROBE_TURNS:
        rendered = probe_text(template, turns)
        if rendered is None:
            continue
        [expected] = encoder.encode([rendered])
        text = str(reloaded.apply_chat_template(turns, tokenize=False))
        if text.removesuffix(rendered) not in ("", bos, f"{bos} "):
            found, wanted = text.removeprefix(bos), rendered.removeprefix(bos)
            here = slice(max(0, (place := _differ_at(found, wanted)) - 20), place + 40)
            raise ExportError(
                f"the exported chat template renders {found[here]!r} where the template of the training rendered "
                f"{wanted[here]!r}: a template that reads the clock or draws at random cannot be exported"
            )
        ids = reloaded.apply_chat_template(turns, tokenize=True, return_dict=False)
        if list(ids) != expected.tolist():
            raise ExportError(
                f"the exported chat template gives other token ids than the training: {_difference(ids, expected)}"
            )
        _compare_ids(reloaded, text, expected)


def _compare_ids(reloaded: Any, text: str, expected: np.ndarray, bare: bool = True) -> None:
    for special in (True, False) if bare else (True,):
        ids = reloaded(text, add_special_tokens=special).input_ids
        if list(ids) != expected.tolist():
            raise ExportError(
                f"the exported tokenizer, with add_special_tokens={special}, gives other token ids than the training: "
                f"{_difference(ids, expected)}"
            )


def _difference(found: Sequence[int], expected: np.ndarray) -> str:
    """Both lists from a little before the first place where they differ."""
    known = expected.tolist()
    here = slice(max(0, (place := _differ_at(found, known)) - 2), place + 4)
    return f"from token {here.start} on {list(found)[here]}, expected {known[here]}"


def _differ_at(one: Sequence[Any], other: Sequence[Any]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


_USER, _ASSISTANT = {"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "It is."}
# Templates treat these differently: some write a system turn of their own, some refuse it, some mark the last turn.
PROBE_TURNS: tuple[list[dict[str, str]], ...] = (
    [_USER, _ASSISTANT],
    [{"role": "system", "content": "Be brief."}, _USER, _ASSISTANT],
    [_USER, _ASSISTANT, _USER, _ASSISTANT],
)


def probe_text(template: Template, turns: list[dict[str, str]]) -> str | None:
    """A short conversation as training renders it; None for plain texts, or if the template rejects it."""
    if template.chat_template is None:
        return None
    try:
        return template.render(Comparison(turns[:-1], (turns[-1:],), source="", prompt_key=""))[1][0]
    except TemplateRefused:
        return None
