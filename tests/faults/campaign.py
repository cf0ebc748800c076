"""Two campaigns at random: an end anywhere, and damage to any file of a checkpoint. The seed decides everything.

`kills(folder, cases, seed)`: a run of two ranks is killed, gets a signal to stop, loses its console or fills its disk,
at a random rank, step and point, under random settings. After a signal it must save, and exit with 3 on both ranks;
without a console it must complete; on a full disk it must complete or stop with one sentence. What it left is resumed
on 1, 2 and 4 ranks. On 2 ranks the final weights must equal those of the uninterrupted run to the last bit. On other
world sizes they must be equal within the rounding of fp32; in bf16 no such bound holds, so the run must complete with
finite weights. The data order must be the same everywhere.
`damages(folder, cases, seed)`: bytes are flipped, files truncated or deleted in the checkpoints of a run. What starts
afterwards restores exactly what a good checkpoint held, or refuses. It runs without training, in one process.
"""

import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rmcore.checkpoint import directory as names
from rmcore.checkpoint.directory import steps
from tests.harness.base_model import save_base
from tests.harness.crash import CONTEXT, Fault, Outcome, copy_of, run, scratch_of
from tests.harness.small_run import ROUNDING, STEPS, arguments, furthest, reference, same
from tests.harness.tmpfs import small_disk

# point -> how often a rank passes it in a run of eight steps that saves every two and keeps two; and which ranks do
PASSES = {
    "data": 2 * STEPS, "compute": STEPS, "backward": STEPS, "update": STEPS, "boundary": STEPS,
    "save.begin": 4, "save.copy": 4, "save.open": 4, "save.write": 4 * 20, "save.sync": 4,
}  # fmt: skip
PASSES_OF_MAIN = {"save.manifest": 4, "save.rename": 4, "save.parent": 4, "retain.trash": 2, "retain.delete": 2}
SIGNALS, CONSOLES, DISK = ("term", "int", "hup", "quit", "usr1", "usr2"), ("closed-pipe", "full-console"), "fill"
ENDS = (*["kill"] * 6, *SIGNALS, *CONSOLES, DISK)  # actions of tests/harness/crash.py
DISK_BYTES = 24 << 20  # three checkpoints of 4.3 MB and the export fit
STRATEGIES = ("ddp", "ddp", "zero1", "zero2", "zero3", "hsdp")
# int8 and nf4 need bitsandbytes. bf16 weights need bf16 arithmetic.
WIDE = (("optim.states=bf16",), ("optim.states=int8",))
FORMATS = {
    "fp32": ((), (), *WIDE),
    "bf16": ((), *WIDE, *(("model.weights=bf16", *states) for states in ((), *WIDE))),
}
BASES = (
    *((), ("model.lora.base=bf16", "model.lora.dora=true")),
    *(("model.lora.base=int8", "model.lora.rslora=true"), ("model.lora.base=nf4",)),
)
# What excludes what is in rmcore/config/schema.py; `test_every_case_is_a_valid_configuration` holds this to it.
EMA, SFT, SPLIT_ROWS = "optim.ema=0.9", "loss.sft=0.1", "parallel.context=2"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """The settings of one run, how and where it ends, and whether it is killed once more while it resumes.

    `extra`: one more setting, or "". `continues`: it begins with an adapter that another run has exported.
    """

    strategy: str
    precision: str
    evals: int
    recompute: str
    background_save: bool
    lora: bool
    formats: tuple[str, ...]
    extra: str
    continues: bool
    kill: Fault
    again: Fault | None

    def settings(self, folder: Path) -> list[str]:
        """The overrides of these settings; the held-out rows are in `folder`."""
        given = [f"parallel.strategy={self.strategy}", f"parallel.precision={self.precision}"]
        given += [f"parallel.recompute={self.recompute}", f"run.background_save={str(self.background_save).lower()}"]
        if self.evals:
            given += [f"run.evals={self.evals}", f"data.eval.path={folder}/pairs.jsonl", "data.eval.split=train[:20%]"]
        if self.lora:
            given += ["model.lora.rank=4"]
        if self.continues:
            given += [f"model.name={folder}/first/model", "model.init=pretrained", "model.head=stored"]
        return [*given, *self.formats, *([self.extra] if self.extra else [])]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers of ranks on which the run can resume."""
        return (2, 4) if self.extra == SPLIT_ROWS else (1, 2, 4)

    def __str__(self) -> str:
        lora = " with LoRA" + " continued" * self.continues if self.lora else ""
        settings = f"{self.strategy}{lora}, {self.precision}, {self.evals} evaluations"
        settings += "".join(f", {setting}" for setting in (*self.formats, self.extra) if setting)
        settings += f", recompute {self.recompute}, {'background' if self.background_save else 'blocking'} save"
        killed = f"{self.kill.action} rank {self.kill.rank} at {self.kill.point} number {self.kill.nth}"
        return f"{settings}: {killed}" + (f", and rank {self.again.rank} at {self.again.point}" if self.again else "")


def draw_case(seed: int, number: int) -> Case:
    """Case `number` of a seed; it does not depend on the cases before it, so that a failed one can be repeated."""
    rng = random.Random(f"{seed} {number}")
    strategy = rng.choice(STRATEGIES)
    evals = rng.choice((0, 2))
    point = rng.choice([*PASSES, *PASSES_OF_MAIN, *(["evaluate"] if evals else [])])
    action = rng.choice(ENDS)
    if point in PASSES_OF_MAIN:
        kill = Fault(point, action, 0, rng.randint(1, PASSES_OF_MAIN[point]))
    else:
        kill = Fault(point, action, rng.randrange(2), rng.randint(1, {**PASSES, "evaluate": evals}[point]))
    again = None
    if rng.random() < 0.2:
        again = Fault(rng.choice(["resume.verify", "resume.read", "compute"]), "kill", rng.randrange(2))
    precision, recompute = rng.choice(("fp32", "bf16")), rng.choice(("none", "full", "offload"))
    background_save, lora = rng.choice((True, False)), rng.random() < 0.4
    formats = rng.choice(BASES if lora else FORMATS[precision])
    continues = lora and rng.random() < 0.3
    possible = [] if "model.weights=bf16" in formats else [EMA, SPLIT_ROWS, *([] if lora else [SFT])]
    extra = rng.choice([*[""] * 3, *possible])
    return Case(
        strategy=strategy,
        precision=precision,
        evals=evals,
        recompute=recompute,
        background_save=background_save,
        lora=lora,
        formats=formats,
        extra=extra,
        continues=continues,
        kill=kill,
        again=again,
    )


def kills(folder: Path, cases: int, seed: int, say: Say = print) -> int:
    """The number of resumes that were checked; an assertion fails with the case that went wrong."""
    checked = 0
    for number in range(cases):
        case = draw_case(seed, number)
        what = f"case {number} of seed {seed}: {case}"
        place = folder / f"case-{number}"
        if case.continues:
            first_adapter(case, place)
        checked += _check(case, place, what)
        shutil.rmtree(place)
        say(f"{what}: right")
    return checked


def first_adapter(case: Case, folder: Path) -> None:
    """Export an adapter to `folder`/first/model, in the format that the case continues."""
    base = [f"model.name={save_base(folder / 'base')}", "model.init=pretrained", "model.lora.rank=4"]
    given = arguments(folder, *base, *case.formats, "export.adapter=true", "run.max_steps=2")
    first = run(folder / "first", given, 1, publish=True)
    assert first.codes == [0], first.text


def _check(case: Case, folder: Path, what: str) -> int:
    """Kill and resume one run; returns the number of resumes that were checked."""
    settings = case.settings(folder)
    given = arguments(folder, *settings)
    whole = reference(folder, *settings, size=2)
    if case.kill.action == DISK:
        return _check_full_disk(case, folder, whole, what)
    killed = run(folder / "killed", given, 2, [case.kill])
    if case.kill.action in CONSOLES:
        assert killed.codes == [0, 0] and same(killed, whole) and killed.order == whole.order, f"{what}\n{killed.text}"
        return 0
    if case.kill.action == "kill":
        assert killed.codes[case.kill.rank] == -signal.SIGKILL, f"{what}: it was not killed\n{killed.text}"
    elif killed.codes == [0, 0]:  # the signal came after the last step
        assert same(killed, whole) and killed.order == whole.order, what
        return 1
    else:
        assert killed.codes == [3, 3] and killed.status["status"] == "preempted", f"{what}\n{killed.text}"
    if case.again:
        second = run(killed.directory, given, 2, [case.again])
        if second.codes == [0, 0]:  # killed after the last step: there was nothing to compute, and it is complete
            assert same(second, whole) and second.order == whole.order, what
            return 1
    for size in case.sizes:
        resumed = run(copy_of(killed, f"on-{size}"), given, size)
        assert resumed.codes == [0] * size, f"{what}, on {size}: {resumed.text}"
        assert resumed.order == whole.order, f"{what}, on {size}: another data order"
        if size == 2:
            assert same(resumed, whole), f"{what}, on {size}: other weights, by up to {furthest(resumed, whole)}"
        elif case.precision == "fp32" and not (case.formats or case.extra):
            # The others round gradients that differ in the last bit.
            far = furthest(resumed, reference(folder, *settings, size=size))
            assert far < ROUNDING, f"{what}, on {size}: {far}"
        else:
            assert resumed.weights and all(np.isfinite(weight).all() for weight in resumed.weights.values()), what
    return len(case.sizes)


def _check_full_disk(case: Case, folder: Path, whole: Outcome, what: str) -> int:
    """The run directory's disk is full from some point on; with room again, the run completes as if nothing happened.

    The tests' own records of the run are kept elsewhere.
    """
    given = arguments(folder, *case.settings(folder))
    with small_disk(folder / "disk", DISK_BYTES) as disk:
        (folder / "records").mkdir()
        scratch_of(disk / "run").symlink_to(folder / "records")
        full = run(disk / "run", given, 2, [case.kill])
        assert full.codes in ([0, 0], [1, 1]) and "Traceback" not in full.text, f"{what}\n{full.text}"
        (disk / "filler").unlink()
        resumed = run(disk / "run", given, 2) if full.codes == [1, 1] else full
        same_end = same(resumed, whole) and resumed.order == whole.order
        assert resumed.codes == [0, 0] and same_end, f"{what}\n{resumed.text}"
    return int(full.codes == [1, 1])


def damages(folder: Path, cases: int, seed: int, say: Say = print) -> dict[str, int]:
    """How often what happened: {"step 6": .., "step 4": .., "refused": ..}; an assertion fails at a wrong resume."""
    given = arguments(folder)
    partial = run(folder / "run", given, 2, [Fault("save.copy", "kill", 1, 4)])
    assert steps(partial.directory / "checkpoints") == [6, 4], partial.text
    process = CONTEXT.Process(target=_damage_in_process, args=(str(partial.directory), given, cases, seed, str(folder)))
    process.start()
    process.join()
    seen: dict[str, int] = {}
    log = (folder / "damages.txt").read_text(encoding="utf-8")
    assert process.exitcode == 0, log[-3000:]
    for line in log.splitlines():
        seen[line.split(" -> ")[1]] = seen.get(line.split(" -> ")[1], 0) + 1
    assert sum(seen.values()) == cases
    say(f"{cases} damages with seed {seed}: {seen}")
    return seen


def _damage_in_process(source: str, given: list[str], cases: int, seed: int, folder: str) -> None:
    """Restore from damaged copies, again and again, into one model; compare with what the checkpoints really hold."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    import torch

    from rmcore.checkpoint.resume import choose_start, restore
    from rmcore.checkpoint.state import pieces
    from rmcore.config import UserError, load_config
    from rmcore.parallel.world import running_world
    from rmcore.training.assembly import assemble

    torch.set_num_threads(1)
    rng = random.Random(seed)
    config = load_config(None, [*given, f"run.dir={folder}/damaged"])
    target = Path(folder) / "damaged"
    with running_world(60) as world, open(Path(folder) / "damages.txt", "w", encoding="utf-8") as log:
        state = assemble(config, world)

        def restored() -> tuple[int, list[torch.Tensor]]:
            start = choose_start(config, world)
            restore(start, state.strategy, world)
            return start.step, [piece.local.clone() for piece in pieces(state.strategy, world)]

        truth = {}
        for step in (6, 4):
            shutil.copytree(source, target)
            names.retire(target / "checkpoints", {step})
            truth[step] = restored()[1]
            shutil.rmtree(target)
        for number in range(cases):
            shutil.copytree(source, target)
            what = " and ".join(_damage(rng, target / "checkpoints") for _ in range(rng.randint(1, 3)))
            try:
                step, values = restored()
                assert all(torch.equal(a, b) for a, b in zip(values, truth[step], strict=True)), what
                seen = f"step {step}"
            except UserError:
                seen = "refused"
            log.write(f"case {number}: {what} -> {seen}\n")
            log.flush()
            shutil.rmtree(target)


def _damage(rng: random.Random, root: Path) -> str:
    """One damage to one file of one checkpoint, in words."""
    files = sorted(path for path in root.glob("step-*/*") if path.is_file())
    if not files:
        return "nothing left to damage"
    path = rng.choice(files)
    size = path.stat().st_size
    kind = rng.choice(("flip", "flip", "truncate", "delete"))
    if kind == "delete" or size == 0:
        path.unlink()
    elif kind == "truncate":
        os.truncate(path, rng.randrange(size))
    else:
        with open(path, "r+b") as file:
            # the header and the ends as often as the bulk
            place = rng.choice((rng.randrange(size), rng.randrange(min(size, 200)), size - 1))
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ (1 << rng.randrange(8))]))
    return f"{kind} {path.parent.name}/{path.name}"
