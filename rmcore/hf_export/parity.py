"""Checks that an exported directory is the trained model: reloaded, it must give the engine's rewards.

Input: the reloaded model, a few texts as token ids, and the engine's rewards for them.
Output: the largest difference of the rewards, or an `ExportError`. Plain transformers computes the reloaded rewards; of
a model that it has no class for, it computes all but the score head (rmcore.model.classifier).
Example: rewards [0.3127, -1.0442] and [0.3127, -1.0442]: `Parity(difference=1.2e-07, allowed=1e-05)`.

An export that also holds the language-model head must give the engine's logits, too, as AutoModelForCausalLM loads it.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
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
from rmcore.model.found_weights import SCORE
from rmcore.model.meta_model import other_heads
from rmcore.model.recurrent.substitute import substitute_scans
from rmcore.model.rounding import UNIT_ROUNDOFF, allowed_difference


class ExportError(ExplainedError):
    """The exported model is not the trained one."""


NO_CLASS = "transformers has no class {} with a linear score head"


@dataclass(frozen=True)
class Probe:
    """Texts (token ids without padding) and the engine's rewards for them, to compare with after writing.

    A model of K outputs has K rewards for each text, one after the other.

    `precision`: the arithmetic in which the engine computed these rewards. `alone`: each text by itself, because
    padding changes the values of this model. `logits_AV`: of the token behind each text, for an export that holds the
    language-model head.
    """

    token_ids: Sequence[Sequence[int]]
    rewards: Sequence[float]
    precision: torch.dtype = torch.float32
    alone: bool = False
    logits_AV: torch.Tensor | None = None


class Parity(NamedTuple):
    """The largest difference between the reloaded model's rewards and the engine's, and the largest allowed one.

    `left`: why texts must not be padded on the left. `made`: a class that transformers does not have. `alone`: why
    texts must not be padded at all. Most models have none of them. `language`: a sentence about the logits, where the
    export holds the language-model head. `stored`: of an adapter, how the training stored its base; `plain`: the
    largest difference on the base in fp32.
    """

    difference: float
    allowed: float
    left: str = ""
    made: str = ""
    alone: str = ""
    language: str = ""
    stored: str = "fp32"
    plain: float = 0.0

    @property
    def notes(self) -> list[str]:
        """Facts that users of the model should know."""
        left = self.left and not self.alone
        return [
            *([f"note: never pad this model's texts: {self.alone}"] if self.alone else []),
            *([f"note: pad this model's texts on the right, never on the left: {self.left}"] if left else []),
            *([f"note: the model loads in rmcore: {NO_CLASS.format(self.made)}"] if self.made else []),
            *([self.language] if self.language else []),
            *([self._base_note()] if self.stored != "fp32" else []),
        ]

    def _base_note(self) -> str:
        return (
            f"note: the adapter belongs to its {self.stored} base, which rmcore makes again; on the base in fp32, as "
            f"peft loads it, rewards differ by up to {self.plain:.1e}"
        )


@torch.no_grad()
def largest_difference(model: PreTrainedModel, probe: Probe) -> float:
    """The largest difference of the model's rewards from the engine's."""
    texts = [torch.tensor([list(ids)], device=model.device) for ids in probe.token_ids]
    alone = torch.stack([model(input_ids=text, use_cache=False).logits[0].double().cpu() for text in texts])
    engine = torch.tensor(list(probe.rewards), dtype=torch.float64).reshape(alone.shape)
    return float((alone - engine).abs().max())


def reloaded(directory: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The directory as plain transformers loads it, in fp32; where that has no class, as rmcore does.

    A language-model head is not read. Raises ExportError: weights are missing, unexpected or of another shape.
    """
    loader: Any = AutoModelForSequenceClassification
    given: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    hf_config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if brings_code(hf_config, trust_remote_code=trust_remote_code):
        given["trust_remote_code"] = True
    elif is_made(kind := classifier_class(hf_config)):
        loader = kind
    model, info = loader.from_pretrained(directory, **given)
    if info["unexpected_keys"]:
        info["unexpected_keys"] = set(info["unexpected_keys"]) - other_heads(model)
    _refuse_faults(info, directory)
    substitute_scans(model)  # with the kernels of recurrent layers installed, plain transformers raises on the CPU
    return model


def _refuse_faults(info: dict[str, Any], directory: Path) -> None:
    faults = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(faults.values()):
        raise ExportError(f"transformers does not find the weights that it expects in {directory}: {faults}")


@torch.no_grad()
def check_language_model(directory: Path, probe: Probe, written: torch.dtype) -> str:
    """Compare the logits of the token behind each text, as AutoModelForCausalLM computes them; returns a sentence.

    Raises ExportError: AutoModelForCausalLM cannot load the directory, or gives other logits than the engine.
    """
    loader: Any = AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # a class that AutoModelForCausalLM does not know, or a config that it cannot read
        reason = " ".join(str(error).split())[:200]
        raise ExportError(f"export.lm_head: AutoModelForCausalLM cannot load the export: {reason}") from error
    info["unexpected_keys"] = set(info["unexpected_keys"]) - {SCORE}
    _refuse_faults(info, directory)
    substitute_scans(model)
    model.eval()
    scales = [0.0]

    def measure(head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:  # as in `check_export`
        hidden, weight_VD = args[0][0, -1].double(), cast(torch.Tensor, head.weight)
        scales.append(float(hidden.norm() * weight_VD.norm(dim=1).max()) / hidden.numel() ** 0.5)

    hook = model.get_output_embeddings().register_forward_pre_hook(measure)
    texts = [torch.tensor([list(ids)]) for ids in probe.token_ids]
    alone = torch.stack([model(input_ids=text, use_cache=False).logits[0, -1].double() for text in texts])
    hook.remove()
    precision = max(written, probe.precision, key=UNIT_ROUNDOFF.__getitem__)
    allowed = allowed_difference(precision, depth(model), max(scales), alone)
    engine = cast(torch.Tensor, probe.logits_AV).double()
    difference = _compare("reloaded", alone, "the engine's", engine, allowed, "logits")
    return (
        f"the language-model head is in it: logits reloaded by AutoModelForCausalLM differ by {difference:.1e} "
        f"(allowed {allowed:.1e})"
    )


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
    wrong = {"right": "", "left": ""}
    for side in wrong:
        try:
            _compare(f"padded {side}", _padded(model, probe.token_ids, side), "alone", alone, rounding)
        except Exception as error:  # some recurrent models read the padding in front of a text as a part of it
            if side == "right" and not probe.alone:
                raise
            wrong[side] = " ".join(str(error).split())[:200]
    # Between the engine and the reloaded model lie two roundings: that of the weights on disk and that of the engine's
    # arithmetic. The coarser one sets the bound.
    precision = max(written, probe.precision, key=UNIT_ROUNDOFF.__getitem__)
    allowed = allowed_difference(precision, layers, scale, alone)
    engine = torch.tensor(list(probe.rewards), dtype=torch.float64).reshape(alone.shape)
    made = type(model).__name__ if is_made(type(model)) else ""
    difference = _compare("reloaded", alone, "the engine's", engine, allowed)
    return Parity(difference, allowed, wrong["left"], made, wrong["right"])


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


def _compare(
    what: str, found: torch.Tensor, other: str, expected: torch.Tensor, allowed: float, values: str = "rewards"
) -> float:
    difference = (found - expected).abs().reshape(-1)
    worst = int(difference.nan_to_num(torch.inf).argmax())
    if not bool(difference[worst] <= allowed):
        numbers = [float(numbers.reshape(-1)[worst]) for numbers in (found, expected)]
        raise ExportError(
            f"the exported model's {values} are wrong: text {worst // found.shape[1]} has {numbers[0]:.6g} {what} and "
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
