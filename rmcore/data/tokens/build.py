"""Tokenises rendered comparisons into the cache, chunk by chunk, and counts rows for the report.

Input: chunks of some thousand comparisons with their texts.
Output: arrays, written by a CacheWriter, and the report, in which rows = kept + the sum of dropped.
Example: {"rows": 1900, "kept": 1888, "dropped": {"text too long": 12}, "pairs": 1888, "repeated": 3, "contradicted": 0,
"warnings": ["7 rows have an empty answer"], ...}.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from rmcore.config import Config
from rmcore.data.drop_reasons import CONTRADICTED, REPEATED
from rmcore.data.formats.comparison import Comparison
from rmcore.data.formats.fields import short
from rmcore.data.formats.selection import RowHashes, Selection, duplicates, hash_text
from rmcore.data.labels import LABEL_FIELDS
from rmcore.data.tokens.cache import CacheWriter
from rmcore.data.tokens.comparisons import EncodedRow, lay_out
from rmcore.data.tokens.encoder import TextEncoder
from rmcore.data.tokens.limits import LengthLimits, apply_limits
from rmcore.data.tokens.templates import Template

CHUNK_ROWS = 1024
MOST_UNREAD = 20  # columns and message keys that the report lists
KINDS = 1000  # of them that are counted; rows may have any number of different keys
CHUNK_CHARACTERS = 2_000_000  # of rendered text; it bounds the memory of one call to the tokenizer to some 200 MB


@dataclass
class Chunk:
    """Rendered comparisons that go to the tokenizer together, and the counts of their rows."""

    comparisons: list[Comparison] = field(default_factory=list)
    texts: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    characters: int = 0
    rows: int = 0
    empty: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    @property
    def full(self) -> bool:
        return len(self.texts) >= CHUNK_ROWS or self.characters >= CHUNK_CHARACTERS

    def add(self, comparison: Comparison, texts: tuple[str, tuple[str, ...]]) -> None:
        self.comparisons.append(comparison)
        self.texts.append(texts)
        self.characters += len(texts[0]) + sum(map(len, texts[1]))


class Work:
    """Tokenises the chunks of one build, and counts their rows."""

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerFast,
        ends: tuple[str, ...],
        limits: LengthLimits,
        writer: CacheWriter,
        selection: Selection,
        rows: int,
    ) -> None:
        self._config, self._writer, self._selection = config, writer, selection
        self._encoder = TextEncoder(tokenizer, ends)
        self._limits = replace(limits, keep_first=int(self._encoder.bos is not None))
        self._hashes = RowHashes()
        self.seen = sum(count for _, count in selection.dropped)  # rows that are done
        self.total = self.seen + (rows if selection.order is None else len(selection.order))
        self._dropped: Counter[str] = Counter(dict(selection.dropped))
        self._kept = self._pairs = self._ties = self._scored = self._empty = 0
        self.names: dict[str, int] = {}  # source -> index
        self.refusal = ""
        self.unread: Counter[str] = Counter()  # columns and message keys with content that is not read -> rows
        self.missing: Counter[str] = Counter()  # content that the rendered texts do not contain -> rows
        self.example: dict[str, str] = {}  # the first text of each kind of missing content

    def counted(self, comparison: Comparison, duplicates: bool) -> Comparison:
        """Counts what is not read of a row, and remembers its hashes if the report is to count `duplicates` by them."""
        self.unread.update(what for what in comparison.unread if len(self.unread) < KINDS or what in self.unread)
        if duplicates:
            self._hashes.add_judged(comparison)
        return comparison

    def check(self, template: Template, comparison: Comparison, texts: tuple[str, ...]) -> None:
        """Counts content of the data that the rendered texts of a comparison do not contain."""
        found = dict(template.missing(comparison, texts))
        self.missing.update(dict.fromkeys(found, comparison.rows))
        for what, text in found.items():
            self.example.setdefault(what, short(text))

    def tokenise(self, chunk: Chunk) -> None:
        """Tokenises a chunk, applies the limits, and writes it to the cache."""
        kept, gone = apply_limits(self._encoded(chunk), self._limits)
        self._writer.write(lay_out(kept))
        self._dropped += gone + chunk.dropped
        self._kept += sum(row.rows for row in kept)
        self._pairs += sum(len(row.pairs) for row in kept)
        self._ties += sum(len(row.ties) for row in kept)
        self._scored += sum(len(row.scores) for row in kept)
        self._empty += chunk.empty
        self.seen += chunk.rows

    def _encoded(self, chunk: Chunk) -> list[EncodedRow]:
        encoder, margin = self._encoder, self._config.loss.margin
        rows = []
        encoded = encoder.encode_comparisons(chunk.texts)
        for comparison, (_, texts), (prompt, *answers) in zip(chunk.comparisons, chunk.texts, encoded, strict=True):
            for text, answer in zip(texts, answers, strict=True):
                encoder.count_answer(text, answer)
            encoder.count_content(_contents(comparison))
            labels = {label.name: getattr(comparison, label.name) for label in LABEL_FIELDS}
            if not isinstance(margin, str):  # loss.margin is a number: the same for every pair
                labels["margin"] = (float(margin),) * len(comparison.pairs)
            rows.append(
                EncodedRow(
                    prompt,
                    answers,
                    **labels,
                    source_index=self.names.setdefault(comparison.source, len(self.names)),
                    prompt_hash=hash_text(comparison.prompt_key, 0),
                    rows=comparison.rows,
                )
            )
        return rows

    def report(self, name: str, stored: np.ndarray | None) -> dict[str, Any]:
        """The report. `stored` distinguishes copies of a row from repeated rows (rmcore.data.formats.selection)."""
        repeated, contradicted = self._selection.repeated, self._selection.contradicted
        if self._selection.order is None:
            answers, judged = (
                np.frombuffer(column, dtype=np.uint64) for column in (self._hashes.answers, self._hashes.judged)
            )
            found = duplicates(answers, judged, stored)
            repeated, contradicted = int(found[REPEATED].sum()), int(found[CONTRADICTED].sum())
        warnings = [*self._encoder.warnings(), *([self.refusal] if self.refusal else [])]
        if self._empty:
            warnings.append(f"{self._empty:,} rows have an empty answer")
        for what, rows in sorted(self.missing.items()):
            example = self.example[what]
            warnings.append(f"in {rows:,} rows the rendered text does not contain {what}, the first time {example}")
        unread = sorted(self.unread.most_common(MOST_UNREAD), key=lambda item: (-item[1], item[0]))
        warnings += [f"content that is not read, in {rows:,} rows: {what}" for what, rows in unread]
        return {
            "key": name,
            "rows": self.seen,
            "kept": self._kept,
            "comparisons": len(self._writer),
            "dropped": dict(self._dropped.most_common()),
            "pairs": self._pairs,
            "ties": self._ties,
            "scored_answers": self._scored,
            "repeated": repeated,
            "contradicted": contradicted,
            "warnings": warnings,
            "bos_added": self._encoder.bos is not None,
        }


def _contents(comparison: Comparison) -> Iterator[str]:
    """The texts of the data, without those of the template."""
    for part in (comparison.prompt, *comparison.answers):
        if isinstance(part, str):
            yield part
        else:
            yield from (turn.get("content", "") for turn in part)
