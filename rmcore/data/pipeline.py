"""Prepares one part of a run's data, train or eval, from its rows to the token cache.

Input: sources, a template, a tokenizer.
Output: `TokenizedComparisons`, read from the cache or built into it.
Example: 1,900 rows of which 12 are too long -> 1,888 comparisons and report {"rows": 1900, "kept": 1888, "dropped":
{"text too long": 12}, ...}. Rows kept and dropped always add up to the rows read.

Rows stream through in chunks: the main thread reads and writes, a thread or worker processes render and tokenise
(rmcore.data.tokens.workers). Memory does not grow with the rows, except for hashes (8 bytes each) if rows are selected
or merged.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerFast

from rmcore import __version__
from rmcore.config import Config, UserError
from rmcore.config.loss import LossConfig
from rmcore.data.drop_reasons import CONTRADICTED, REPEATED
from rmcore.data.formats.comparison import Comparison, RowFormat, comparison_from_row, detect_format
from rmcore.data.formats.requirements import fitted
from rmcore.data.formats.selection import Reads, RowHashes, Selection, gathered, held_out, select
from rmcore.data.inspection.summary import drop_table
from rmcore.data.reading.sources import Source
from rmcore.data.tokens.build import Chunk, ChunkEncoder, EncodedChunk, Work
from rmcore.data.tokens.cache import FORMAT_VERSION, CacheWriter, open_or_build
from rmcore.data.tokens.comparisons import TokenizedComparisons, optional_arrays
from rmcore.data.tokens.encoder import TextEncoder
from rmcore.data.tokens.limits import LengthLimits
from rmcore.data.tokens.templates import Template
from rmcore.data.tokens.workers import Encoders, Job

MARGINS = 2  # raised when margins are read otherwise, so that an older cache of rows with margins is not used

Progress = Callable[[int, int, str], None]  # (rows done, rows in all, what)


@dataclass(frozen=True, eq=False)
class Part:
    """The train or the eval part of a run, and all that decides its content."""

    key: str  # data.train or data.eval
    sources: list[Source]
    config: Config
    tokenizer: PreTrainedTokenizerFast
    tokenizer_fingerprint: str
    template: Template
    ends: tuple[str, ...] = ()  # tokens at which an answer may end, besides EOS
    progress: Progress | None = None
    holdout: str | None = None  # "train" or "eval": this side of data.eval_fraction; None: all rows

    def tokenized(self, root: Path) -> TokenizedComparisons:
        """Reads this part from the cache under `root`, or builds it."""
        optional = optional_arrays(len(self.config.attributes), len(self.config.losses) > 1)
        return open_or_build(root / "tokens", self.cache_key(), self.build, self.name, optional)

    @property
    def name(self) -> str:
        return {None: self.key, "train": self.key, "eval": f"{self.key} (held out)"}[self.holdout]

    @property
    def limits(self) -> LengthLimits:
        data = self.config.data
        cut = data.length_policy == "truncate_left"
        # BOS is not cut; where the tokenizer adds it, the build sees to that.
        kept = cut and self.template.front and TextEncoder(self.tokenizer).bos is None
        return LengthLimits(data.max_tokens, data.max_prompt_tokens, cut, keep_first=int(bool(kept)))

    def cache_key(self) -> str:
        """Hash of all that decides the content: the same key means the same bytes."""
        data, limits, losses = self.config.data, self.limits, self.config.losses
        of_template = ["keep_first"] if limits.keep_first else []
        decides: dict[str, Any] = {
            "version": [FORMAT_VERSION, __version__],
            "name": self.name,
            "sources": [
                [source.fingerprint, source.label, dict(source.columns), *([source.keep] if source.keep else [])]
                for source in self.sources
            ],
            "template": self.template.fingerprint,
            "tokenizer": self.tokenizer_fingerprint,
            "limits": [limits.max_tokens, limits.max_prompt_tokens, limits.truncate_left, *of_template],
            "reads": [losses[0].margin, *reads_of(losses[0])[:3]],
            "rows": [data.group_by_prompt, data.drop_repeated, data.drop_contradicted],
            "holdout": [self.holdout, data.eval_fraction, self.config.run.seed] if self.holdout else None,
        }
        if len(losses) > 1 or self.config.attributes or losses[0].traits.targets:
            decides["losses"] = [[loss.margin, *reads_of(loss)] for loss in losses]
            decides["attributes"] = self.config.attributes
            decides["objectives"] = [self.config.loss_number(source.loss) for source in self.sources]
        if any(loss.reads_margins for loss in losses):
            decides["margins"] = MARGINS
        return xxhash.xxh3_128_hexdigest(json.dumps(decides, sort_keys=True).encode())

    def build(self, writer: CacheWriter) -> None:
        """Renders and tokenises all rows, chunk by chunk; the next chunks are read at the same time."""
        formats = self.formats()
        selection = self.selection(formats)
        work = Work(writer, selection, sum(map(len, self.sources)))
        encoder = ChunkEncoder(self.config, self.tokenizer, self.template, self.ends, self.limits)
        fingerprints = self.tokenizer_fingerprint, self.template.fingerprint
        job = Job(self.config, self.ends, self.limits, *fingerprints)
        waiting: deque[Future[EncodedChunk]] = deque()

        def add_first() -> None:
            work.add(waiting.popleft().result())
            encoders.consider_workers(work.seen, work.total)
            if self.progress is not None:
                self.progress(work.seen, work.total, self.name)

        with Encoders(encoder, job, self.name) as encoders:
            for chunk in self.chunks(formats, selection, work):
                while len(waiting) >= encoders.most_waiting:
                    add_first()
                waiting.append(encoders.submit(chunk))
            while waiting:
                add_first()
        report = work.report(self.name, self.stored(), adds_bos=encoder.adds_bos)
        report["formats"] = {s.origin: str(f) for s, f in zip(self.sources, formats, strict=True)}
        if self.config.attributes:
            report["attributes"] = list(self.config.attributes)
        if len(self.config.losses) > 1:
            report["losses"] = len(self.config.losses)
        if not len(writer):
            raise UserError(f"{self.name}: no row is left to use\n{drop_table(report, self.config)}")
        writer.finish(list(work.names), report)

    def chunks(self, formats: list[RowFormat], selection: Selection, work: Work) -> Iterator[Chunk]:
        """The comparisons of the part, some thousand at a time."""
        chunk = Chunk()
        for comparison in self.comparisons(formats, selection, work):
            chunk.add(comparison)
            if chunk.full:
                yield chunk
                chunk = Chunk()
        if chunk.comparisons:
            yield chunk

    def formats(self) -> list[RowFormat]:
        """The format of each source, from its first rows, with what its objective reads."""
        found = []
        for source in self.sources:
            place = {"origin": source.origin, "key": source.key}
            number = self.config.loss_number(source.loss)
            loss = self.config.losses[number] if number >= 0 else LossConfig()
            why = "loss.margin=data" if loss.margin == "data" else f"loss.name={loss.name}"
            reading: dict[str, Any] = {"attributes": self.config.attributes, "why": why, **place}
            try:
                format = detect_format(source.head(), source.columns, need_margin=loss.reads_margins, **reading)
            except UserError:
                if not loss.traits.margins or not source.key.startswith("data.eval"):
                    raise
                format = detect_format(source.head(), source.columns, **reading)  # evaluated without its own loss
            found.append(replace(fitted(format, loss, **place), objective=number))
        return found

    def comparisons(self, formats: list[RowFormat], selection: Selection, work: Work) -> Iterator[Comparison]:
        """The comparisons of the selected rows; rows of one group are merged."""
        read = (comparison for comparison, _ in self.rows(formats, selection.order))
        count_duplicates = selection.order is None  # there was no pass over the rows yet that counted them
        read = (work.counted(comparison, count_duplicates) for comparison in read)
        if selection.group is None:
            return read
        return gathered(zip(read, selection.group.tolist(), strict=True), *map(reads_of, self.config.losses))

    def rows(self, formats: list[RowFormat], order: np.ndarray | None) -> Iterator[tuple[Comparison, int]]:
        """Yields (comparison, number of its source) of all rows, or of those with the numbers in `order`."""
        first = 0
        for number, (source, format) in enumerate(zip(self.sources, formats, strict=True)):
            if order is None:
                chosen = iter(source)
            else:
                chosen = source.rows(order[(order >= first) & (order < first + len(source))] - first)
            first += len(source)
            for row, where in chosen:
                yield (
                    comparison_from_row(
                        row,
                        format,
                        wants_text=self.template.wants_text,
                        source=source.label,
                        where=where,
                        reads=self.template.reads,
                    ),
                    number,
                )

    def selection(self, formats: list[RowFormat]) -> Selection:
        """The rows to use and their order. Takes a pass over all rows, if rows are held out, dropped or merged."""
        data = self.config.data
        gather = data.group_by_prompt or any(format.gathers for format in formats)
        drop = [CONTRADICTED] * data.drop_contradicted + [REPEATED] * data.drop_repeated
        # Rows that a source does not keep are on neither side of a held-out part; they count with its train part.
        unkept = tuple(one for source in self.sources for one in source.dropped) if self.holdout != "eval" else ()
        if not (self.holdout or gather or drop):
            return Selection(dropped=unkept)
        hashes = RowHashes(self.config.run.seed)
        for comparison, number in self.rows(formats, None):
            hashes.add(comparison, number)
        wanted = None
        if self.holdout:
            held = held_out(np.frombuffer(hashes.prompt, dtype=np.uint64), data.eval_fraction)
            wanted = held if self.holdout == "eval" else ~held
        found = select(hashes, wanted, self.stored(), drop=drop, gather=gather)
        return replace(found, dropped=(*unkept, *found.dropped))

    def stored(self) -> np.ndarray | None:
        """int64 [rows]: equal numbers for copies of one stored row. None if there are no copies."""
        if all((np.diff(source.stored) > 0).all() for source in self.sources):
            return None
        first, numbers = 0, []
        for source in self.sources:
            numbers.append(source.stored + first)
            first += int(source.stored.max(initial=0)) + 1
        return np.concatenate(numbers)


def reads_of(loss: LossConfig) -> Reads:
    """What an objective reads of the rows besides the order of the answers."""
    return Reads(loss.reads_margins, loss.traits.ties, loss.traits.scores, loss.traits.targets)
