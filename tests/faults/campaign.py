"""Two campaigns at random: kill -9 anywhere, and damage to any file of a checkpoint. The seed says it all.

`kills(folder, cases, seed)`: a run of two ranks is killed at a random point, rank and step; what it left is taken up on
1, 2 and 4 ranks. Final weights must equal the uninterrupted run's: to the last bit on 2 ranks, within fp32 rounding on
the others; the data order on all of them.
`damages(folder, cases, seed)`: bytes flipped, files truncated or deleted in the checkpoints of a run; what starts
afterwards restores exactly what some good checkpoint held, or refuses. It runs without training, in one process.
"""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from rmcore.checkpoint import directory as names
from rmcore.checkpoint.directory import steps
from tests.faults.rows_run import ROUNDING, STEPS, arguments, furthest, reference, same
from tests.harness.crash import CONTEXT, Fault, copy_of, run

# point -> how often a rank passes it in a run of eight steps that saves every two and keeps two; and which ranks do
PASSES = {
    "data": 2 * STEPS, "compute": STEPS, "backward": STEPS, "update": STEPS, "boundary": STEPS,
    "save.begin": 4, "save.copy": 4, "save.open": 4, "save.write": 4 * 20, "save.sync": 4,
}  # fmt: skip
PASSES_OF_MAIN = {"save.manifest": 4, "save.rename": 4, "save.parent": 4, "retain.trash": 2, "retain.delete": 2}
STRATEGIES = ("ddp", "ddp", "zero1", "zero2", "zero3", "hsdp")
Say = Callable[[str], None]


def kills(folder: Path, cases: int, seed: int, say: Say = print) -> int:
    """The number of resumes that were checked; an assertion fails with the case that went wrong."""
    rng = random.Random(seed)
    checked = 0
    for number in range(cases):
        strategy = rng.choice(STRATEGIES)
        fault = _random_kill(rng)
        given = arguments(folder, f"parallel.strategy={strategy}")
        whole = {size: reference(folder / strategy, f"parallel.strategy={strategy}", size=size) for size in (1, 2, 4)}
        what = f"case {number} of seed {seed}: {strategy}, kill rank {fault.rank} at {fault.point} number {fault.nth}"
        killed = run(folder / f"case-{number}", given, 2, [fault])
        assert killed.codes[fault.rank] == -signal.SIGKILL, f"{what}: it was not killed\n{killed.text}"
        again = rng.random() < 0.2  # every fifth case is killed once more, while it resumes
        if again:
            point = rng.choice(["resume.verify", "resume.read", "compute"])
            second = run(killed.directory, given, 2, [Fault(point, "kill", rng.randrange(2))])
            if second.codes == [0, 0]:  # killed after the last step: there was nothing to compute, and it is complete
                assert same(second, whole[2]) and second.order == whole[2].order, what
                checked += 1
                continue
        for size in (1, 2, 4):
            resumed = run(copy_of(killed, f"case-{number}-on-{size}"), given, size)
            assert resumed.codes == [0] * size, f"{what}, on {size}: {resumed.text}"
            far = furthest(resumed, whole[size])
            assert same(resumed, whole[2]) if size == 2 else far < ROUNDING, f"{what}, on {size}: {far}"
            assert resumed.order == whole[2].order, f"{what}, on {size}: another data order"
            checked += 1
            shutil.rmtree(resumed.directory)
        shutil.rmtree(killed.directory)
        say(f"{what}{', and again' if again else ''}: resumed on 1, 2 and 4 ranks")
    return checked


def _random_kill(rng: random.Random) -> Fault:
    point = rng.choice([*PASSES, *PASSES_OF_MAIN])
    if point in PASSES_OF_MAIN:
        return Fault(point, "kill", 0, rng.randint(1, PASSES_OF_MAIN[point]))
    return Fault(point, "kill", rng.randrange(2), rng.randint(1, PASSES[point]))


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
