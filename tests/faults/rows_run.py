"""The fault matrix, rows 1 to 16 and 28 to 31: faults of a running job, made in real processes.

A row is a function that takes an empty folder and returns a line about what happened; an assertion fails if that is not
what is expected. tests/faults/__main__.py lists all rows; tests/faults/test_run.py runs them one by one.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np

from rmcore.checkpoint.directory import steps
from tests.harness.crash import Fault, copy_of, outcome_of, run, torchrun
from tests.harness.small_run import ROUNDING, STEPS, arguments, furthest, metrics, reference, same, wait_for
from tests.harness.tmpfs import small_disk

WITHIN = 20.0  # seconds in which a job ends once a rank is gone, on cores shared with other tests


def row_01(folder: Path) -> str:
    """kill -9 of any rank while computing"""
    whole = reference(folder)
    for rank, point in ((1, "compute"), (0, "backward")):
        killed = run(folder / f"killed-{rank}", arguments(folder), 2, [Fault(point, "kill", rank, 5)])
        assert killed.codes[rank] == -signal.SIGKILL and killed.codes[1 - rank] == 1, killed.codes
        assert killed.seconds < WITHIN
        resumed = run(killed.directory, arguments(folder), 2)
        assert resumed.codes == [0, 0] and "continuing at step" in resumed.text, resumed.text
        assert same(resumed, whole) and resumed.order == whole.order
    return f"all ranks gone after {killed.seconds:.0f} s; resumed weights and data order equal bit for bit"


def row_02(folder: Path) -> str:
    """kill -9 of any rank in any phase of a save, retention included"""
    whole = reference(folder)
    points = ["begin", "copy", "open", "write", "sync", "manifest", "rename", "parent"]
    faults = [Fault(f"save.{point}", "kill", 0, 2) for point in points]
    faults += [Fault(f"save.{point}", "kill", 1, 2) for point in ("open", "write", "sync")]
    faults += [Fault("retain.trash"), Fault("retain.delete")]
    for number, fault in enumerate(faults):
        killed = run(folder / f"killed-{number}", arguments(folder), 2, [fault])
        assert killed.codes[fault.rank] == -signal.SIGKILL, (fault, killed.text)
        resumed = run(killed.directory, arguments(folder), 2)
        assert resumed.codes == [0, 0] and same(resumed, whole) and resumed.order == whole.order, (fault, resumed.text)
        left = sorted(path.name for path in (killed.directory / "checkpoints").iterdir())
        assert left == ["step-6", "step-8"], (fault, left)
    return f"{len(faults)} phases: each resumed from a verified checkpoint to equal bits, nothing left over"


def row_03(folder: Path) -> str:
    """SIGTERM or SIGINT during a step, an evaluation, a save"""
    whole = reference(folder, "run.evals=2", f"data.eval.path={folder}/pairs.jsonl", "data.eval.split=train[:50%]")
    more = ["run.evals=2", f"data.eval.path={folder}/pairs.jsonl", "data.eval.split=train[:50%]"]
    places = (
        ("compute", "term", 0, 3),
        ("backward", "int", 1, 3),
        ("evaluate", "term", 1, 1),
        ("save.write", "term", 0, 3),
    )
    for number, (point, action, rank, nth) in enumerate(places):
        stopped = run(folder / f"stopped-{number}", arguments(folder, *more), 2, [Fault(point, action, rank, nth)])
        assert stopped.codes == [3, 3], (point, stopped.text)
        assert stopped.status["status"] == "preempted", stopped.status
        assert stopped.status["step"] == steps(stopped.directory / "checkpoints")[0]
        resumed = run(stopped.directory, arguments(folder, *more), 2)
        assert resumed.codes == [0, 0] and same(resumed, whole), (point, resumed.text)
        assert metrics(resumed) == metrics(whole), point
    return "saved at the next boundary, preempted, exit 3; resumed to equal bits and figures"


def row_04(folder: Path) -> str:
    """a rank hangs"""
    hangs = run(folder / "run", arguments(folder, "parallel.timeout_seconds=6"), 2, [Fault("data", "hang", 1, 5)])
    assert hangs.codes == [1, 1], hangs.text
    message = "rank 0 lost touch with other ranks at step 3, phase backward: rank 1 last seen at step 3, phase data"
    assert message in hangs.text and hangs.text.count("rmcore.train:") == 1, hangs.text
    return f"all ranks gone after {hangs.seconds:.0f} s (timeout 6 s): {message.split(': ')[1]}"


def row_05(folder: Path) -> str:
    """a slow rank"""
    slow = run(folder / "run", arguments(folder), 2, [Fault("data", "slow", 1, 1, every=True)])
    assert slow.codes == [0, 0], slow.text
    line = re.search(
        r"rank 1 is slow: it takes [\d.]+ s per step before the backward, the median rank [\d.]+ s", slow.text
    )
    assert line and "rank 0 is slow" not in slow.text, slow.text
    assert same(slow, reference(folder))
    return line.group()


def row_06(folder: Path) -> str:
    """an exception on one rank"""
    failed = run(folder / "run", arguments(folder), 2, [Fault("compute", "raise", 1, 3)])
    assert failed.codes == [1, 1], failed.text
    assert failed.text.count("rmcore.train:") == 1 and failed.text.count("Traceback") == 1, failed.text
    first = "rmcore.train: rank 1 of 2 failed at step 3, phase compute:"
    assert first in failed.output[0] and "ValueError: planted at compute" in failed.output[0], failed.text
    assert failed.status["status"] == "failed" and "planted" in failed.status["reason"]
    return f"{first} ... ValueError: planted, printed once by rank 0"


def row_07(folder: Path) -> str:
    """disk full in a save; too small for the checkpoints from the start"""
    size = 4_346_880  # bytes of a checkpoint: 362,240 parameters, 12 bytes each
    with small_disk(folder / "disk", int(3.6 * size)) as disk:
        full = run(disk / "run", arguments(folder), 2, [Fault("save.open", "fill", 0, 2)])
        assert full.codes == [1, 1], full.text
        assert re.search(
            r"checkpoint step 4 failed on rank \d: No space left .* are free in .*; step 2 is kept", full.text
        )
        assert "Traceback" not in full.text and steps(full.directory / "checkpoints") == [2]
        (disk / "filler").unlink()
        resumed = run(full.directory, arguments(folder), 2)
        assert resumed.codes == [0, 0] and same(resumed, reference(folder)), resumed.text
        shutil.rmtree(disk / "run")
        (disk / "filler").write_bytes(bytes(size))
        refused = run(disk / "run", arguments(folder), 2)
        room = "3 checkpoints of 0.00435 GB and the exported model of 0.00145 GB need 0.013 GB"
        assert refused.codes == [2, 2] and room in refused.text, refused.text
    return "checkpoint step 4 failed: No space left, needed and free space; step 2 kept; resumed; refused at the start"


def row_08(folder: Path) -> str:
    """newest checkpoint truncated, bit-flipped, missing a shard, missing or with an empty manifest"""
    whole = reference(folder)
    partial = run(folder / "run", arguments(folder), 2, [Fault("save.copy", "kill", 1, 4)])
    newest = steps(partial.directory / "checkpoints")[0]
    shard = "rank-00001-of-00002.safetensors"
    damages = {
        "truncated": lambda path: os.truncate(path / shard, 1000),
        "flipped": lambda path: flip(path / shard, 200_000),
        "without a shard": lambda path: (path / shard).unlink(),
        "without a manifest": lambda path: (path / "manifest.json").unlink(),
        "with an empty manifest": lambda path: os.truncate(path / "manifest.json", 0),
        "with a changed manifest": lambda path: flip(path / "manifest.json", 100),
    }
    for number, (name, damage) in enumerate(damages.items()):
        directory = copy_of(partial, f"damaged-{number}")
        damage(directory / "checkpoints" / f"step-{newest}")
        resumed = run(directory, arguments(folder), 2)
        assert resumed.codes == [0, 0], (name, resumed.text)
        assert f"warning: bad checkpoint {directory}/checkpoints/step-{newest}: " in resumed.text, (name, resumed.text)
        assert (directory / "checkpoints" / f"bad-step-{newest}" / "why.txt").exists()
        assert f"continuing at step {newest - 2}" in resumed.text and same(resumed, whole), (name, resumed.text)
    return (
        f"{len(damages)} kinds: warned with the reason, moved to bad-step-{newest}, resumed at {newest - 2}, equal bits"
    )


def flip(path: Path, place: int, bit: int = 3) -> None:
    """Change one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


def row_09(folder: Path) -> str:
    """all checkpoints bad"""
    partial = run(folder / "run", arguments(folder), 1, [Fault("compute", "kill", 0, 8)])
    for step in steps(partial.directory / "checkpoints"):
        flip(partial.directory / "checkpoints" / f"step-{step}" / "rank-00000-of-00001.safetensors", 5000)
    for attempt in range(2):  # the second time there is nothing left but what was moved aside
        refused = run(partial.directory, arguments(folder), 1)
        assert refused.codes == [2] and "Traceback" not in refused.text, refused.text
        assert f"no checkpoint in {partial.directory}/checkpoints is good" in refused.text, (attempt, refused.text)
    anew = run(partial.directory, arguments(folder, "run.resume=never"), 1)
    assert anew.codes == [0] and same(anew, reference(folder, size=1))
    return "exit 2, also the second time: no checkpoint is good (reasons); run.resume=never starts at zero"


def row_10(folder: Path) -> str:
    """a partial directory is left over"""
    partial = run(folder / "run", arguments(folder), 2, [Fault("save.rename", "kill", 0, 2)])
    assert (partial.directory / "checkpoints" / ".tmp-step-4").is_dir()
    resumed = run(partial.directory, arguments(folder), 2)
    assert resumed.codes == [0, 0] and "removed .tmp-step-4, half a save" in resumed.text, resumed.text
    assert not list((partial.directory / "checkpoints").glob(".*"))
    return "removed .tmp-step-4, half a save; the next step-4 is whole"


def row_11(folder: Path) -> str:
    """the output directory is not writable"""
    with small_disk(folder / "disk", 1 << 20, read_only=True) as disk:
        refused = run(folder / "run", [*arguments(folder), f"run.dir={disk}/run"], 2)
        assert refused.codes == [2, 2] and "Traceback" not in refused.text, refused.text
        assert f"run.dir {disk}/run cannot be written: Read-only file system" in refused.text, refused.text
    return "exit 2: run.dir ... cannot be written: Read-only file system"


def row_12(folder: Path) -> str:
    """two runs in one output directory"""
    first = torchrun(folder / "run", arguments(folder), 1, [Fault("compute", "hang", 0, 2)])
    lock = folder / "run" / ".lock"
    try:
        wait_for(lambda: lock.exists() and lock.read_text(encoding="utf-8"), first)
        holder = json.loads(lock.read_text(encoding="utf-8"))
        second = run(folder / "run", arguments(folder), 1)
        assert second.codes == [2], second.text
        assert f"is in use by pid {holder['pid']} on host {holder['host']} since {holder['since']}" in second.text
        os.kill(holder["pid"], signal.SIGKILL)
    finally:
        ended = outcome_of(first, folder / "run")
    assert "SIGKILL" in ended.text, ended.text
    third = run(folder / "run", arguments(folder), 1)
    assert third.codes == [0], third.text
    return "exit 2: in use by pid ... on host ... since ...; taken over once the holder is dead"


def row_13(folder: Path) -> str:
    """another world size or another strategy on resume"""
    whole = reference(folder)
    distances = []
    for name, places in {
        "2-1-4": [(2, "ddp", 3), (1, "ddp", 3), (4, "ddp", 99)],
        "ddp-zero2": [(2, "ddp", 5), (2, "zero2", 99)],
        "zero3-zero1": [(4, "zero3", 5), (2, "zero1", 99)],
        "zero1-zero3": [(2, "zero1", 5), (2, "zero3", 99)],
    }.items():
        for size, strategy, nth in places:
            killed = run(
                folder / name,
                arguments(folder, f"parallel.strategy={strategy}"),
                size,
                [Fault("compute", "kill", 0, nth)],
            )
        assert killed.codes == [0] * size, killed.text
        distances.append(furthest(killed, whole))
        assert distances[-1] < ROUNDING and killed.order == whole.order, (name, distances)
    return f"2 to 1 to 4 ranks, ddp to zero2, zero3 to zero1, zero1 to zero3: weights within {max(distances):.0e}"


def row_14(folder: Path) -> str:
    """the configuration changed on resume"""
    partial = run(folder / "run", arguments(folder), 1, [Fault("compute", "kill", 0, 6)])
    for change in ("run.seed=2", "batch.pairs=5", "data.max_tokens=255", "loss.centering=0.1"):
        refused = run(partial.directory, arguments(folder, change), 1)
        key = change.split("=")[0]
        assert refused.codes == [2] and f"  {key}: " in refused.text and "Traceback" not in refused.text, refused.text
    accepted = run(copy_of(partial, "a"), arguments(folder, "batch.pairs=5", "run.allow_changes=[batch.pairs]"), 1)
    assert accepted.codes == [0] and "changed since then: batch.pairs: 6 -> 5" in accepted.text, accepted.text
    free = run(copy_of(partial, "b"), arguments(folder, "optim.lr=5e-4"), 1)
    assert free.codes == [0] and "changed since then: optim.lr: 0.001 -> 0.0005" in free.text, free.text
    return "seed, batch, data, loss: refused with old and new value; accepted by run.allow_changes; lr: shown"


def row_15(folder: Path) -> str:
    """the data set changed on resume"""
    given = arguments(folder)
    partial = run(folder / "run", given, 1, [Fault("compute", "kill", 0, 6)])
    data = folder / "pairs.jsonl"
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join([*lines[1:], lines[0]]), encoding="utf-8")
    refused = run(partial.directory, given, 1)
    assert refused.codes == [2] and "the train data have changed since" in refused.text, refused.text
    accepted = run(partial.directory, [*given, "run.allow_changes=[data]"], 1)
    assert accepted.codes == [0], accepted.text
    return "exit 2: the train data have changed since ... (fingerprint ... then, ... now)"


def row_16(folder: Path) -> str:
    """NaN or Inf in loss or gradient"""
    single = run(folder / "one", arguments(folder, "log.every=1"), 2, [Fault("compute", "nan", 1, 3)])
    assert single.codes == [0, 0], single.text
    assert "warning: step 3 skipped on all ranks: NaN or Inf in the gradient of score.weight" in single.text, (
        single.text
    )
    skipped = [line["train/skipped_steps"] for line in metrics(single)]
    assert skipped == [0, 0, 1, 0, 0, 0, 0, 0]
    assert all(np.isfinite(weight).all() for weight in single.weights.values())
    for strategy, what in (("ddp", "nan"), ("zero1", "nan-loss"), ("zero2", "nan-loss")):
        given = arguments(folder, f"parallel.strategy={strategy}", "run.save_every=1")
        stopped = run(folder / strategy, given, 2, [Fault("compute", what, 1, 3, every=True)])
        assert stopped.codes == [1, 1] and "Traceback" not in stopped.text, stopped.text
        first = "score.weight" if what == "nan" else "backbone.embed_tokens.weight, "
        assert f"3 steps in a row up to step 5 had NaN or Inf in the gradient (of {first}" in stopped.text, stopped.text
        assert steps(stopped.directory / "checkpoints") == [2, 1], "the checkpoints before the first bad step"
        resumed = run(stopped.directory, given, 2)
        assert resumed.codes == [0, 0] and furthest(resumed, reference(folder)) < ROUNDING, resumed.text
    return (
        "skipped on both ranks, score.weight listed and counted; stopped after 3 in a row, step 2 kept and resumed from"
    )


def row_28(folder: Path) -> str:
    """rows not divisible, fewer rows than ranks, a last batch of one row"""
    for rows in (1, 3, 5, 13):
        given = arguments(folder / str(rows), "batch.pairs=4", "run.evals=1", rows=rows)
        given += [f"data.eval.path={folder}/{rows}/pairs.jsonl", "data.eval.split=train[:100%]"]
        outcomes = [run(folder / str(rows) / f"on-{size}", given, size) for size in (1, 2, 4)]
        for outcome in outcomes:
            assert set(outcome.codes) == {0}, outcome.text
            seen = sorted(number for numbers in outcome.order.values() for number in numbers)
            assert seen == list(range(rows)), "each row once"
            assert metrics(outcome)[-1]["eval/rm/count"] == rows
            assert furthest(outcome, outcomes[0]) < ROUNDING
            loss = [line["eval/rm/loss"] for line in (metrics(outcome)[-1], metrics(outcomes[0])[-1])]
            assert abs(loss[0] - loss[1]) < ROUNDING
    return "1, 3, 5 and 13 rows on 1, 2 and 4 ranks: each row trained and evaluated once, same weights and figures"


def row_29(folder: Path) -> str:
    """torchrun --max-restarts"""
    process = torchrun(
        folder / "run",
        arguments(folder, "run.evals=0"),
        2,
        [Fault("save.copy", "kill", 1, 3)],
        options=["--max-restarts=3"],
    )
    outcome = outcome_of(process, folder / "run")
    assert outcome.codes == [0], outcome.text
    assert "torchrun's restart number 1" in outcome.text and "continuing at step 4" in outcome.text, outcome.text
    assert outcome.status["status"] == "completed" and outcome.status["step"] == STEPS
    return "torchrun's restart number 1; continuing at step 4; completed, exit 0"


def row_30(folder: Path) -> str:
    """the preparation cache is raced by ranks and runs"""
    given = [*arguments(folder), f"data.cache={folder}/cache"]
    first = torchrun(folder / "first", given, 2)
    second = run(folder / "second", [*given, "parallel.timeout_seconds=60"], 4)
    assert outcome_of(first, folder / "first").codes == [0] and second.codes == [0] * 4, second.text
    entries = [path for path in (folder / "cache" / "tokens").iterdir() if path.is_dir()]
    assert len(entries) == 1, entries
    return "two runs of 2 and 4 ranks on an empty cache: one entry, all continued"


def row_31(folder: Path) -> str:
    """out of device memory"""
    failed = run(folder / "run", arguments(folder, "batch.tokens=400"), 2, [Fault("compute", "oom", 1, 2)])
    assert failed.codes == [1, 1] and failed.text.count("rmcore.train:") == 1, failed.text
    message = re.search(
        r"rank 1 of 2 failed at step 2, phase compute: out of memory; a micro batch of (\d+) tokens", failed.text
    )
    assert message and "batch.tokens" in failed.text and "Traceback" not in failed.text, failed.text
    again = run(failed.directory, arguments(folder, "batch.tokens=400", "batch.shrink=true"), 2)
    budget = int(message.group(1)) * 3 // 4
    assert again.codes == [0, 0] and f"micro batches of at most {budget} tokens" in again.text, again.text
    return f"{message.group()} does not fit; batch.shrink starts again with {budget}"


ROWS = [row_01, row_02, row_03, row_04, row_05, row_06, row_07, row_08, row_09, row_10, row_11, row_12, row_13]
ROWS += [row_14, row_15, row_16, row_28, row_29, row_30, row_31]
