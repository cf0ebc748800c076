"""Texts in, rewards out: what `rmcore score` does between reading and writing, and `rmcore serve` for each request.

Enters: a model's name; rows with their places, or texts as token ids. Leaves: a `Scored` a row, or a reward a text.
Example: {"prompt": "2+2?", "answers": ["4", "5"]} becomes two texts of one prompt, rendered and tokenised, which share
a packed row `[P | A1 | A2]` with others of like length.

Texts are grouped by their prompt, also those of different rows; equal texts are computed once. A group that exceeds
the token budget is cut into several. The reward of a text does not depend on its company beyond rounding.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from rmcore.config import UserError
from rmcore.data.batches.batch import build_batch
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparisons, common_prefix
from rmcore.data.tokens.templates import load_template
from rmcore.data.tokens.tokenizer import TextEncoder, load_tokenizer
from rmcore.evaluation.evaluate import micro_batches
from rmcore.evaluation.trained import evaluation_config
from rmcore.host.memory import keep_freed_memory
from rmcore.model.backbone import load_model, load_model_config
from rmcore.model.reward_model import SHARED, RewardModel
from rmcore.model.selftest import choose_path, trial_comparisons
from rmcore.scoring.normalisation import read_normalisation
from rmcore.scoring.rows import Rendered, comparison_of

TOKENS = {"cpu": 4096, "cuda": 32768}  # of a micro batch: nothing is kept for a backward


class Text(NamedTuple):
    """A text to be scored: its token ids, int32 [n], and what is the same for texts that may share a beginning."""

    ids: np.ndarray
    prompt: str


@dataclass(frozen=True)
class Scored:
    """The rewards of a row's texts (None: too long, or not a number), and whether its form is that of one text."""

    rewards: list[float | None]
    single: bool


class Scorer:
    """A reward model with its tokenizer and template, ready to score.

    Args:
        model: directory or hub id. The template and precision are those of its training (rmcore_config.yaml), unless
            `overrides` (key=value) say otherwise; without that file the template is the tokenizer's own.
        normalise: give (reward - mean) / deviation, as stored in the model's config.json.
    Raises UserError for a model or settings that cannot be used.

    `choose_path` must be called once before rewards are asked for. `render` and `encode` may be called by any thread,
    the rest by one at a time.
    """

    def __init__(self, model: str, overrides: Sequence[str] = (), *, normalise: bool = False) -> None:
        self.name = model
        self.config = evaluation_config(model, "-", list(overrides))
        tokenizer = load_tokenizer(self.config)
        hf_config = load_model_config(self.config.model)
        self.normalisation = read_normalisation(hf_config, model) if normalise else None
        self.template = load_template(self.config.data.template, tokenizer)
        self._encoder, self.eos, self.pad = TextEncoder(tokenizer), str(tokenizer.eos_token), str(tokenizer.pad_token)
        pad = int(tokenizer.pad_token_id)
        hf_model: Any = load_model(self.config.model, seed=0, vocabulary=len(tokenizer), pad_token_id=pad)
        keep_freed_memory()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=pad).to(self.device).eval()
        positions = getattr(hf_config, "max_position_embeddings", None)
        self.longest = positions if isinstance(positions, int) else 2**31 - 1
        tokens = self.config.batch.tokens
        self.budget = TOKENS[self.device.type] if tokens == "auto" else tokens
        self._share = False
        self.path = ""  # a line about how rewards are computed, once `choose_path` has found it

    def settings(self) -> dict[str, Any]:
        """What decides the rewards, beside the model's files and the texts."""
        return {
            "model": self.name, "template": self.template.fingerprint, "tokens": self.budget,
            "precision": self.config.parallel.precision, "attention": self.config.model.attention,
            "normalise": self.normalisation is not None, "device": self.device.type, "torch": torch.__version__,
        }  # fmt: skip

    def _half(self) -> AbstractContextManager:
        bf16 = self.config.parallel.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()

    def choose_path(self, rows: Sequence[tuple[Mapping[str, Any], str]]) -> None:
        """Take the fastest way of computing that is exact on these rows (see rmcore.model.selftest)."""
        texts = [text for group in self._encoded(rows)[1] for text in group]
        groups = grouped([text for text in texts if self.fits(text.ids)], self.budget, share=True)
        if groups:
            data = pack([[text.ids for text in group] for group in groups])
            half = self._half() if self.device.type == "cuda" else None
            numbers = trial_comparisons(data.tokens_N)
            path, self.path = choose_path(self._model, data, numbers, self.config.model.attention, half)
            self._share = path == SHARED

    def fits(self, ids: np.ndarray) -> bool:
        """Whether a text has a last token to be scored, and a position for each."""
        return 0 < len(ids) <= self.longest

    def rewards(self, rows: Sequence[tuple[Mapping[str, Any], str]]) -> list[Scored]:
        """One `Scored` a row, in order. Raises UserError, with the row's place, for a row that cannot be read."""
        rendered, encoded = self._encoded(rows)
        found = iter(self.score([text for texts in encoded for text in texts]))
        return [Scored([next(found) for _ in texts], one.single) for one, texts in zip(rendered, encoded, strict=True)]

    def _encoded(self, rows: Sequence[tuple[Mapping[str, Any], str]]) -> tuple[list[Rendered], list[list[Text]]]:
        rendered = [self.render(row, where) for row, where in rows]
        return rendered, self.encode(rendered)

    def encode(self, rendered: Sequence[Rendered]) -> list[list[Text]]:
        """The texts of each row as token ids."""
        ids = iter(self._encoder.encode([text for one in rendered for text in one.texts]))
        # Without a prompt of its own a row shares with no other; its texts may still begin alike.
        prompts = [one.prompt or f"row {number}" for number, one in enumerate(rendered)]
        return [[Text(next(ids), prompt) for _ in one.texts] for one, prompt in zip(rendered, prompts, strict=True)]

    def score(self, texts: Sequence[Text]) -> list[float | None]:
        """The reward of each text in order; None where it does not fit, or the model gives no number."""
        fitting = [text for text in texts if self.fits(text.ids)]
        groups = grouped(fitting, self.budget, share=self._share)
        found: dict[bytes, float] = {}
        if groups:
            rewards = self._packed_rewards(pack([[text.ids for text in group] for group in groups])).tolist()
            ordered = [text for group in groups for text in group]
            found = {text.ids.tobytes(): reward for text, reward in zip(ordered, rewards, strict=True)}
        return [self._given(found.get(text.ids.tobytes())) for text in texts]

    def _given(self, reward: float | None) -> float | None:
        if reward is None or not np.isfinite(reward):
            return None
        return reward if self.normalisation is None else self.normalisation.apply(reward)

    def _packed_rewards(self, data: TokenizedComparisons) -> torch.Tensor:
        """fp64 [A]: the reward of every answer, in order."""
        tokens_N = data.tokens_N if self._share else data.logical_tokens_N
        rewards_A = torch.zeros(int(data.answer_offset[-1]), dtype=torch.float64)
        with torch.inference_mode(), self._half():
            for numbers_C in micro_batches(tokens_N, self.budget):
                batch = build_batch(data, numbers_C, self._share).on(self.device)
                places = [np.arange(data.answer_offset[n], data.answer_offset[n + 1]) for n in batch.comparisons_C]
                rewards_A[torch.from_numpy(np.concatenate(places))] = self._model(batch).rewards_A.double().cpu()
        return rewards_A

    def render(self, row: Mapping[str, Any], where: str) -> Rendered:
        """The texts of a row. Raises UserError, with its place, for a row that cannot be read."""
        row = {name: value for name, value in row.items() if value is not None}  # a table's rows have every column
        if "text" in row or "texts" in row:
            single = "texts" not in row
            texts = [row["text"]] if single else row["texts"]
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{where}: {'text must be text' if single else 'texts must be a list of texts'}")
            return Rendered("", [self.as_rendered(text) for text in texts], single)
        comparison, single = comparison_of(row, self.template, where)
        prompt, written = self.template.render(comparison)
        return Rendered(prompt, list(written), single)

    def as_rendered(self, text: str) -> str:
        """A whole text stands as it is; without a chat template (`none`) EOS is appended, as in training."""
        return text + self.eos if self.template.wants_text and not text.endswith(self.eos) else text


def grouped(texts: Sequence[Text], budget: int, *, share: bool) -> list[list[Text]]:
    """Different texts by prompt, in order of appearance; no group computes more than `budget` tokens, if it can be cut.

    Example: texts of 50, 60 and 40 tokens that begin with the same 30, a budget of 100: the first two compute
    30 + 20 + 30 = 80 tokens, with the third 90, so they are one group; with a budget of 85 the third is alone.
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
    """Groups of texts (token ids) as comparisons without pairs, the arrays that batches are built from."""
    return TokenizedComparisons.of([EncodedRow(ids[0], list(ids), (), (), ()) for ids in groups])
