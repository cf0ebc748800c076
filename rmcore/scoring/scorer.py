"""Turns rows or texts into rewards, for `rmcore score` and for each request of `rmcore serve`.

Input: the name of a model; rows with their places, or texts as token ids. Output: a `Scored` per row, or a reward per
text.
Example: {"prompt": "2+2?", "answers": ["4", "5"]} becomes two texts of one prompt, rendered and tokenised, which share
a packed row `[P | A1 | A2]` with other texts of similar length.

Texts are grouped by their prompt, also those of different rows; equal texts are computed once. A group that exceeds the
token budget is split. The reward of a text depends on the other texts of its micro batch only by rounding.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from rmcore.config import UserError
from rmcore.data.batches.batch import build_batch
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons, common_prefix, computed_tokens
from rmcore.data.tokens.encoder import TextEncoder
from rmcore.data.tokens.templates import template_of
from rmcore.data.tokens.tokenizer import load_tokenizer
from rmcore.evaluation.evaluate import micro_batches
from rmcore.evaluation.trained import TrainedModel, evaluation_config
from rmcore.model.backbone import load_model_config, position_limit
from rmcore.parallel.precision import Bf16, bf16_of, with_precision
from rmcore.scoring.calibration import probabilities, read_temperature
from rmcore.scoring.normalisation import read_normalisation
from rmcore.scoring.rows import Rendered, comparison_of

UNDER_WAY = 1  # micro batches that a GPU computes while the host packs the next one


def _read_later(values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy the values to the host, and return what waits for them; later work of a GPU does not delay it."""
    if values.device.type != "cuda":
        return values.cpu
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> torch.Tensor:
        copied.synchronize()
        return host

    return read


class Text(NamedTuple):
    """A text to be scored: its token ids, int32 [n], and its prompt; texts of one prompt may share their beginning."""

    ids: np.ndarray
    prompt: str


class Valued(NamedTuple):
    """The reward of a text, and all outputs of the score head; of a model with one output, that is the reward."""

    reward: float
    outputs: tuple[float, ...]


@dataclass(frozen=True)
class Scored:
    """The rewards of a row's texts (None: too long, or NaN), and whether the row's form has only one text, or two.

    `probabilities`: of the texts, where the model has a temperature and the row several texts.
    """

    rewards: list[float | None]
    single: bool
    pair: bool = False
    probabilities: list[float | None] | None = None


class Scorer:
    """A reward model with its tokenizer and template, ready to score.

    Args:
        model: directory or hub id. The template and precision are those of its training (rmcore_config.yaml), unless
            `overrides` (key=value) change them; without that file the template is the tokenizer's own.
        normalise: return (reward - mean) / deviation, as stored in the model's config.json.
        bf16: the bf16 instructions of all ranks that score together; None: those of the device.
        device: where rewards are computed; None: a GPU if there is one.
    Raises UserError for a model or settings that cannot be used.

    Call `choose_path` once before the first reward. Any thread may call `render` and `encode`; only one thread at a
    time may call the other methods.
    """

    def __init__(
        self,
        model: str,
        overrides: Sequence[str] = (),
        *,
        normalise: bool = False,
        bf16: Bf16 | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.name = model
        device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config, lines = with_precision(evaluation_config(model, "-", list(overrides)), bf16 or bf16_of(device))
        tokenizer = load_tokenizer(self.config)
        hf_config = load_model_config(self.config.model)
        self.normalisation = read_normalisation(hf_config, model) if normalise else None
        self.temperature = read_temperature(hf_config, model)
        if self.temperature is not None and self.normalisation is not None:
            self.temperature /= self.normalisation.deviation  # a common mean changes no probability
        self.template = template_of(self.config, tokenizer)
        self.notes = [*lines, *self.template.notes]
        self._encoder, self.eos, self.pad = TextEncoder(tokenizer), str(tokenizer.eos_token), str(tokenizer.pad_token)
        self._trained = TrainedModel.load(self.config, tokenizer, device)
        self.longest = position_limit(hf_config) or 2**31 - 1
        self.unread: Counter[str] = Counter()  # content that the scored texts do not hold -> rows, see `rewards`
        self.path = ""  # the self-test's line on how rewards are computed, set by `choose_path`

    @property
    def token_budget(self) -> int:
        """Most computed tokens of a micro batch."""
        return self._trained.token_budget

    def settings(self) -> dict[str, Any]:
        """The settings that the rewards depend on, in addition to the model's files and the texts."""
        return {
            "model": self.name,
            "template": self.template.fingerprint,
            "tokens": self.token_budget,
            "precision": self.config.parallel.precision,
            "attention": self.config.model.attention,
            "normalise": self.normalisation is not None,
            "device": self._trained.device.type,
            "torch": torch.__version__,
        }

    def choose_path(self, rows: Sequence[tuple[Mapping[str, Any], str]]) -> None:
        """Take the fastest path that is exact on these rows (see rmcore.model.selftest)."""
        texts = [text for group in self._encoded(rows)[1] for text in group]
        groups = grouped([text for text in texts if self.fits(text.ids)], self.token_budget, share=True)
        if groups:
            self.path = self._trained.choose_path(pack([[text.ids for text in group] for group in groups]))

    def fits(self, ids: np.ndarray) -> bool:
        """Whether a text has at least one token, and the model a position for each."""
        return 0 < len(ids) <= self.longest

    def rewards(self, rows: Sequence[tuple[Mapping[str, Any], str]]) -> list[Scored]:
        """One `Scored` per row, in order. Raises UserError with the row's place for a row that cannot be read."""
        rendered, encoded = self._encoded(rows)
        for one in rendered:
            self.unread.update(one.unread)
        found = iter(self.score([text for texts in encoded for text in texts]))
        scored = []
        for one, texts in zip(rendered, encoded, strict=True):
            rewards = [next(found) for _ in texts]
            scored.append(Scored(rewards, one.single, one.pair, self.probabilities(rewards, one.single)))
        return scored

    def probabilities(self, rewards: Sequence[float | None], single: bool) -> list[float | None] | None:
        """The calibrated probabilities of a row's texts; None without a temperature, or for a single text."""
        if self.temperature is None or single:
            return None
        return probabilities(rewards, self.temperature)

    def _encoded(self, rows: Sequence[tuple[Mapping[str, Any], str]]) -> tuple[list[Rendered], list[list[Text]]]:
        rendered = [self.render(row, where) for row, where in rows]
        return rendered, self.encode(rendered)

    def encode(self, rendered: Sequence[Rendered]) -> list[list[Text]]:
        """The texts of each row as token ids; what the texts of a row begin with is tokenised once."""
        encoded = self._encoder.encode_comparisons([(one.prompt, one.texts) for one in rendered])
        ids = iter([text for _, *texts in encoded for text in texts])
        # A row without a prompt shares with no other row; its own texts may still begin alike.
        prompts = [one.prompt or f"row {number}" for number, one in enumerate(rendered)]
        return [[Text(next(ids), prompt) for _ in one.texts] for one, prompt in zip(rendered, prompts, strict=True)]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the score head's outputs."""
        return self._trained.model.outputs.names

    def score(self, texts: Sequence[Text], deadline: float = math.inf) -> list[float | None]:
        """The reward of each text in order; None if it does not fit, or if the reward is NaN or Inf.

        Raises TimeoutError between two micro batches after `deadline`, by time.monotonic().
        """
        return [None if one is None else one.reward for one in self.values(texts, deadline)]

    def values(self, texts: Sequence[Text], deadline: float = math.inf) -> list[Valued | None]:
        """As `score`, with all outputs of the score head. A normalisation changes only the reward.

        Raises TimeoutError between two micro batches after `deadline`, by time.monotonic().
        """
        fitting = [text for text in texts if self.fits(text.ids)]
        groups = grouped(fitting, self.token_budget, share=self._trained.share)
        values_of: dict[bytes, list[float]] = {}
        if groups:
            values = self._packed_values(pack([[text.ids for text in group] for group in groups]), deadline).tolist()
            ordered = [text for group in groups for text in group]
            values_of = {text.ids.tobytes(): value for text, value in zip(ordered, values, strict=True)}
        return [self._valued(values_of.get(text.ids.tobytes())) for text in texts]

    def _valued(self, values: list[float] | None) -> Valued | None:
        if values is None or not np.isfinite(values[0]):
            return None
        reward = values[0] if self.normalisation is None else self.normalisation.apply(values[0])
        return Valued(reward, tuple(values[1:]) or (reward,))

    def _packed_values(self, data: TokenizedComparisons, deadline: float) -> torch.Tensor:
        """fp64 [A, 1 + K]: the reward of every answer, in order, and behind it the outputs if there are several."""
        trained = self._trained
        several = len(self.outputs) if len(self.outputs) > 1 else 0
        values_AK = torch.zeros(int(data.answer_offset[-1]), 1 + several, dtype=torch.float64)
        under_way: deque[tuple[torch.Tensor, Callable[[], torch.Tensor]]] = deque()

        def finish_oldest() -> None:
            places_a, read = under_way.popleft()
            values_AK[places_a] = read()

        with torch.inference_mode(), trained.autocast():
            for numbers_C in micro_batches(computed_tokens(data, trained.share), trained.token_budget):
                if time.monotonic() > deadline:
                    raise TimeoutError
                batch = build_batch(data, numbers_C, trained.share).on(trained.device)
                places = [np.arange(data.answer_offset[n], data.answer_offset[n + 1]) for n in batch.comparisons_C]
                output = trained.model(batch)
                columns = [output.rewards_A.unsqueeze(1), *([output.outputs_AK] if several else [])]
                found = _read_later(torch.cat(columns, 1).double())
                under_way.append((torch.from_numpy(np.concatenate(places)), found))
                if len(under_way) > UNDER_WAY:  # a GPU computes while the host packs; the deadline still counts
                    finish_oldest()
            while under_way:
                finish_oldest()
        return values_AK

    @property
    def device(self) -> torch.device:
        """Where rewards are computed."""
        return self._trained.device

    def render(self, row: Mapping[str, Any], where: str, *, typed: bool = False) -> Rendered:
        """The texts of a row. Raises UserError with its place for a row that cannot be read.

        typed: the row does not come from a file: a text is text, also if it looks like the JSON text of turns.
        """
        row = {name: value for name, value in row.items() if value is not None}  # rows of a table have every column
        if "text" in row or "texts" in row:
            single = "texts" not in row
            texts = [row["text"]] if single else row["texts"]
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{where}: {'text must be text' if single else 'texts must be a list of texts'}")
            return Rendered("", [self.as_rendered(text) for text in texts], single)
        comparison, single = comparison_of(row, self.template, where, typed=typed)
        prompt, written = self.template.render(comparison)
        missing = {f"{what} (not in the rendered text)" for what, _ in self.template.missing(comparison, written)}
        pair = not single and "chosen" in row and "rejected" in row
        return Rendered(prompt, list(written), single, comparison.unread | missing, pair)

    def as_rendered(self, text: str) -> str:
        """A whole text stays as it is, with the BOS of the template in front, and EOS behind it if that is `none`."""
        if not text.startswith(self.template.special_tokens.get("bos_token", "")):
            text = self.template.front + text
        return text + self.eos if self.template.wants_text and not text.endswith(self.eos) else text


def grouped(texts: Sequence[Text], budget: int, *, share: bool) -> list[list[Text]]:
    """Different texts by prompt, in order of appearance. A group of several texts computes at most `budget` tokens.

    Example: texts of 50, 60 and 40 tokens begin with the same 30 tokens. The first two compute 30 + 20 + 30 = 80
    tokens, all three 90. With a budget of 100 they are one group, with 85 the third is a group of its own.
    """
    by_prompt: dict[str, dict[bytes, Text]] = {}
    for text in texts:
        by_prompt.setdefault(text.prompt, {}).setdefault(text.ids.tobytes(), text)
    groups = []
    for different in by_prompt.values():
        group: list[Text] = []
        total = shared = 0
        for text in different.values():
            if group:
                common = min(shared, common_prefix(group[0].ids, text.ids)) if share else 0
                if total + len(text.ids) - len(group) * common <= budget:
                    shared, total = common, total + len(text.ids)
                    group.append(text)
                    continue
                groups.append(group)
            group, total, shared = [text], len(text.ids), len(text.ids)
        groups.append(group)
    return groups


def pack(groups: Sequence[Sequence[np.ndarray]]) -> TokenizedComparisons:
    """Groups of texts (token ids) as comparisons without pairs, from which batches are built."""
    return TokenizedComparisons.of([EncodedRow(ids[0], list(ids), (), (), ()) for ids in groups])
