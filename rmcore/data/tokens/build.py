"""Renders and tokenises comparisons, chunk by chunk, and counts rows for the report.

Input: chunks of some thousand comparisons.
Output: arrays, written by a CacheWriter, and the report, in which rows = kept + the sum of dropped.
Example: {"rows": 1900, "kept": 1888, "dropped": {"text too long": 12}, "pairs": 1888, "repeated": 3, "contradicted": 0,
"warnings": ["7 rows have an empty answer"], ...}.

A `ChunkEncoder` works on one chunk and knows of no other, so that any process can do it. `Work` adds the encoded chunks
up in the order of the rows, so that neither the arrays nor the report depend on where a chunk was encoded.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from rmcore.config import Config
from rmcore.data.drop_reasons import CONTRADICTED, REFUSED, REPEATED, UNDECIDED
from rmcore.data.formats.comparison import Comparison, has_empty_answer
from rmcore.data.formats.fields import short
from rmcore.data.formats.selection import RowHashes, Selection, duplicates, hash_text
from rmcore.data.labels import LABEL_FIELDS, is_labelled
from rmcore.data.tokens.cache import CacheWriter
from rmcore.data.tokens.comparisons import EncodedRow, lay_out
from rmcore.data.tokens.encoder import TextEncoder, oddities
from rmcore.data.tokens.limits import LengthLimits, apply_limits
from rmcore.data.tokens.templates import Template, TemplateRefused

CHUNK_ROWS = 1024
MOST_UNREAD = 20  # columns and message keys that the report lists
KINDS = 1000  # of them that are counted; rows may have any number of different keys
CHUNK_CHARACTERS = 2_000_000  # of texts; it bounds the memory of one call to the tokenizer to some 200 MB


@dataclass
class Chunk:
    """Comparisons that go to the tokenizer together."""

    comparisons: list[Comparison] = field(default_factory=list)
    characters: int = 0

    @property
    def full(self) -> bool:
        return len(self.comparisons) >= CHUNK_ROWS or self.characters >= CHUNK_CHARACTERS

    def add(self, comparison: Comparison) -> None:
        self.comparisons.append(comparison)
        # Each text that is rendered contains the prompt.
        prompt, *answers = (sum(map(len, _contents_of(part))) for part in (comparison.prompt, *comparison.answers))
        self.characters += prompt * (1 + len(answers)) + sum(answers)


@dataclass
class Counts:
    """What is counted in one chunk, or in all of them. The order of a counter's keys is the order of the rows."""

    rows: int = 0
    kept: int = 0
    pairs: int = 0
    ties: int = 0
    scored: int = 0
    empty: int = 0
    behind: int = 0  # pairs with a negative margin in the data
    dropped: Counter[str] = field(default_factory=Counter)
    special: Counter[str] = field(default_factory=Counter)  # TextEncoder.counts
    spelled: Counter[str] = field(default_factory=Counter)  # TextEncoder.spelled
    refusal: str = ""  # why the template refused a conversation, the first time
    missing: Counter[str] = field(default_factory=Counter)  # content that the rendered texts do not contain -> rows
    example: dict[str, str] = field(default_factory=dict)  # the first text of each kind of missing content

    def add(self, other: "Counts") -> None:
        """Add the counts of the chunk that follows."""
        for name in ("rows", "kept", "pairs", "ties", "scored", "empty", "behind"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("dropped", "special", "spelled", "missing"):
            getattr(self, name).update(getattr(other, name))
        self.example = other.example | self.example
        self.refusal = self.refusal or other.refusal


@dataclass
class Rendered:
    """The comparisons of a chunk that have texts, with their texts, and the counts so far."""

    comparisons: list[Comparison] = field(default_factory=list)
    texts: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


@dataclass
class EncodedChunk:
    """The arrays of a chunk (rmcore.data.tokens.comparisons.lay_out), of which `source_index` points into `sources`."""

    arrays: dict[str, np.ndarray]
    sources: list[str]
    counts: Counts


class ChunkEncoder:
    """Renders the comparisons of a chunk and encodes their texts. `render` and `encode` may run in different threads.

    Args:
        config: the margins of its objectives are used.
        ends: tokens at which an answer may end, besides EOS.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: PreTrainedTokenizerFast,
        template: Template,
        ends: tuple[str, ...],
        limits: LengthLimits,
    ) -> None:
        self._margins, self._template = [loss.margin for loss in config.losses], template
        self._width, self._several = len(config.attributes), len(config.losses) > 1
        self._encoder = TextEncoder(tokenizer, ends)
        self.adds_bos = self._encoder.bos is not None
        self._limits = replace(limits, keep_first=max(limits.keep_first, int(self.adds_bos)))

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        return self.encode(self.render(chunk))

    def render(self, chunk: Chunk) -> Rendered:
        """The texts of a chunk; counts comparisons that are undecided, that the template refuses or renders in part."""
        rendered = Rendered()
        counts = rendered.counts
        for comparison in chunk.comparisons:
            counts.rows += comparison.rows
            counts.empty += has_empty_answer(comparison)
            if not (comparison.pairs or comparison.ties or is_labelled(comparison)):
                counts.dropped[UNDECIDED] += comparison.rows
                continue
            try:
                texts = self._template.render(comparison)
            except TemplateRefused as error:
                counts.dropped[REFUSED] += comparison.rows
                counts.refusal = counts.refusal or str(error)
                continue
            rendered.texts.append(texts)
            rendered.comparisons.append(comparison)
            found = dict(self._template.missing(comparison, texts[1]))
            counts.missing.update(dict.fromkeys(found, comparison.rows))
            for what, text in found.items():
                counts.example.setdefault(what, short(text))
        return rendered

    def encode(self, rendered: Rendered) -> EncodedChunk:
        """The arrays of a chunk, within the limits, and its counts."""
        encoder, counts = self._encoder, rendered.counts
        encoder.counts, encoder.spelled = counts.special, counts.spelled
        sources: dict[str, int] = {}
        kept, gone = apply_limits(self._rows(rendered, sources), self._limits)
        counts.dropped = gone + counts.dropped
        counts.kept = sum(row.rows for row in kept)
        counts.pairs = sum(len(row.pairs) for row in kept)
        counts.ties = sum(len(row.ties) for row in kept)
        counts.scored = sum(len(row.attributes or row.scores) for row in kept)
        return EncodedChunk(lay_out(kept, self._width, self._several), list(sources), counts)

    def _rows(self, rendered: Rendered, sources: dict[str, int]) -> list[EncodedRow]:
        encoder, rows = self._encoder, []
        encoded = encoder.encode_comparisons(rendered.texts)
        for comparison, (_, texts), (prompt, *answers) in zip(
            rendered.comparisons, rendered.texts, encoded, strict=True
        ):
            for text, answer in zip(texts, answers, strict=True):
                encoder.count_answer(text, answer)
            encoder.count_content(_contents(comparison))
            labels = {label.name: getattr(comparison, label.name) for label in LABEL_FIELDS}
            margin = self._margins[comparison.objective] if comparison.objective >= 0 else "none"
            if not isinstance(margin, str):  # loss.margin is a number: the same for every pair
                labels["margin"] = (float(margin),) * len(comparison.pairs)
            elif margin == "data":
                rendered.counts.behind += _behind(comparison)
            rows.append(
                EncodedRow(
                    prompt,
                    answers,
                    **labels,
                    source_index=sources.setdefault(comparison.source, len(sources)),
                    prompt_hash=hash_text(comparison.prompt_key, 0),
                    rows=comparison.rows,
                    objective=comparison.objective,
                )
            )
        return rows


class Work:
    """Writes the encoded chunks of one build in their order, and counts their rows.

    `total`: rows of the data. `seen`: those that are done.
    """

    def __init__(self, writer: CacheWriter, selection: Selection, rows: int) -> None:
        self._writer, self._selection = writer, selection
        self._hashes = RowHashes()
        self._before = sum(count for _, count in selection.dropped)
        self.total = self._before + (rows if selection.order is None else len(selection.order))
        self._counts = Counts()
        for reason, count in selection.dropped:  # of several sources
            self._counts.dropped[reason] += count
        self.names: dict[str, int] = {}  # source -> index
        self.unread: Counter[str] = Counter()  # columns and message keys with content that is not read -> rows

    @property
    def seen(self) -> int:
        return self._before + self._counts.rows

    def counted(self, comparison: Comparison, duplicates: bool) -> Comparison:
        """Counts what is not read of a row, and remembers its hashes if the report is to count `duplicates` by them."""
        self.unread.update(what for what in comparison.unread if len(self.unread) < KINDS or what in self.unread)
        if duplicates:
            self._hashes.add_judged(comparison)
        return comparison

    def add(self, chunk: EncodedChunk) -> None:
        """Writes a chunk to the cache."""
        places = [self.names.setdefault(source, len(self.names)) for source in chunk.sources]
        if places:
            chunk.arrays["source_index"] = np.array(places, dtype=np.int32)[chunk.arrays["source_index"]]
        self._writer.write(chunk.arrays)
        self._counts.add(chunk.counts)

    def report(self, name: str, stored: np.ndarray | None, *, adds_bos: bool) -> dict[str, Any]:
        """The report. `stored` distinguishes copies of a row from repeated rows (rmcore.data.formats.selection)."""
        repeated, contradicted = self._selection.repeated, self._selection.contradicted
        if self._selection.order is None:
            answers, judged = (
                np.frombuffer(column, dtype=np.uint64) for column in (self._hashes.answers, self._hashes.judged)
            )
            found = duplicates(answers, judged, stored)
            repeated, contradicted = int(found[REPEATED].sum()), int(found[CONTRADICTED].sum())
        counts = self._counts
        warnings = [*oddities(counts.special, counts.spelled), *([counts.refusal] if counts.refusal else [])]
        if counts.empty:
            warnings.append(f"{counts.empty:,} rows have an empty answer")
        if counts.behind:
            warnings.append(
                f"{counts.behind:,} pairs have a negative margin: a margin is by how much the winner leads, and these "
                "winners are to trail"
            )
        for what, rows in sorted(counts.missing.items()):
            example = counts.example[what]
            warnings.append(f"in {rows:,} rows the rendered text does not contain {what}, the first time {example}")
        unread = sorted(self.unread.most_common(MOST_UNREAD), key=lambda item: (-item[1], item[0]))
        warnings += [f"content that is not read, in {rows:,} rows: {what}" for what, rows in unread]
        return {
            "key": name,
            "rows": self.seen,
            "kept": counts.kept,
            "comparisons": len(self._writer),
            "dropped": dict(counts.dropped.most_common()),
            "pairs": counts.pairs,
            "ties": counts.ties,
            "scored_answers": counts.scored,
            "repeated": repeated,
            "contradicted": contradicted,
            "warnings": warnings,
            "bos_added": adds_bos,
        }


def _behind(comparison: Comparison) -> int:
    """Pairs with a negative margin; of the two directions of a soft label, the likelier one counts."""
    weight_of = dict(zip(comparison.pairs, comparison.weight, strict=True))
    return sum(
        margin < 0.0 and weight_of[pair] > weight_of.get(pair[::-1], 0.0)
        for pair, margin in zip(comparison.pairs, comparison.margin, strict=True)
    )


def _contents(comparison: Comparison) -> Iterator[str]:
    """The texts of the data, without those of the template."""
    for part in (comparison.prompt, *comparison.answers):
        yield from _contents_of(part)


def _contents_of(part: Any) -> Iterator[str]:
    """The texts of a prompt or an answer, which is a text or turns."""
    if isinstance(part, str):
        yield part
    else:
        yield from (turn.get("content", "") for turn in part)
