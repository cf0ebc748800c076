"""Decides where a run starts: at the newest checkpoint that verifies, or at step 0; or that it is completed already.

Input: the configuration and the run directory.
Output: a `Start`, the same on every rank, because rank 0 decides; and the restored weights and averages.
Example: step-12 has a flipped bit -> "warning: bad checkpoint checkpoints/step-12: rank-00001-of-00002.safetensors does
not match its hash; moved to bad-step-12", and the run continues from step 8.

Every byte of a checkpoint is read and hashed before it is used; the ranks divide the files among them. A bad checkpoint
is moved aside with the reason, and the next older one is tried.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rmcore.checkpoint import directory
from rmcore.checkpoint.changes import LENGTH, allowed, changes, check_changes
from rmcore.checkpoint.manifest import Manifest, check_file, read_manifest
from rmcore.checkpoint.shards import Damaged, FileRecord, read_slices
from rmcore.checkpoint.state import EMA, make_averages, pieces
from rmcore.config import UserError, load_config
from rmcore.config.schema import Config
from rmcore.host.faults import fault
from rmcore.parallel.adamw import AdamW
from rmcore.parallel.strategy import Strategy
from rmcore.parallel.world import T, World, all_gather_json, broadcast_json, environment_number, first_error
from rmcore.tracking.status import read_status


@dataclass(frozen=True)
class Start:
    """`checkpoint`, `manifest`: where to continue; None to begin at step 0. `lines`: messages for the user."""

    checkpoint: Path | None = None
    manifest: Manifest | None = None
    completed: bool = False
    lines: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.manifest.step if self.manifest else 0

    @property
    def interval(self) -> list[float]:
        """The sums of the log interval in which the checkpoint was written."""
        return self.manifest.interval if self.manifest else []

    def check_data(self, config: Config, fingerprint: str) -> None:
        """Raises UserError if the prepared train data are not those of the checkpoint."""
        if self.manifest and self.manifest.data != fingerprint and not allowed(config, "data.train"):
            raise UserError(
                f"the train data have changed since {self.checkpoint} was written (fingerprint "
                f"{self.manifest.data[:12]} then, {fingerprint[:12]} now), so the run cannot continue: bring the old "
                "data back, start anew with run.resume=never, or accept the change with 'run.allow_changes=[data]'"
            )

    def check_steps(self, steps: int) -> None:
        """Raises UserError if the run would have ended before the checkpoint. Its last step may be the checkpoint's."""
        if self.step > steps:
            raise UserError(
                f"{self.checkpoint} was written after step {self.step}, and with these settings and data the run ends "
                f"after step {steps}: set run.epochs or run.max_steps to {self.step} steps or more, continue from an "
                "earlier checkpoint (run.resume=PATH), or start anew with run.resume=never"
            )

    def check_base(self, fingerprint: str) -> None:
        """Raises UserError if the weights that LoRA does not train are not those of the checkpoint's run."""
        if self.manifest and self.manifest.base != fingerprint:
            raise UserError(
                f"the base model's weights have changed since {self.checkpoint} was written, and with LoRA a "
                "checkpoint does not hold them: bring the old ones back (model.revision pins a hub model), or start "
                "anew with run.resume=never"
            )


def choose_start(config: Config, world: World) -> Start:
    """Decide where to start; a collective. Raises UserError on all ranks: see the messages below."""
    root = Path(config.run.dir) / "checkpoints"
    attempt = environment_number("TORCHELASTIC_RESTART_COUNT", 0)
    # After a failure torchrun starts the same command again. It must continue from what the first attempt saved.
    resume = "auto" if attempt else config.run.resume
    lines = [f"torchrun's restart number {attempt}"] if attempt else []
    if resume == "never":
        aside = _on_main(world, "moving checkpoints aside", lambda: str(directory.move_aside(root) or ""))
        return Start(lines=(f"the checkpoints of a former run are now in {aside}",) if aside else ())
    candidates = [resume]
    if resume == "auto":
        lines += _on_main(world, "sweeping", lambda: [f"removed {name}, half a save" for name in directory.sweep(root)])
        candidates = _on_main(world, "looking", lambda: [str(root / f"step-{step}") for step in directory.steps(root)])
    start = first_good(candidates, world, lines, quarantine=resume == "auto")
    _on_main(world, "looking at the run directory", lambda: _refuse_step_0(root, start))
    found = check_changes(start.manifest.config, config, str(start.checkpoint)) if start.manifest else []
    completed = _on_main(
        world, "looking at the run directory", lambda: resume == "auto" and _is_completed(config, start)
    )
    if start.manifest is None:
        return replace(start, completed=completed)
    if resume != "auto":
        _on_main(world, "moving checkpoints aside", lambda: _undo(root, Path(resume), start.step))
    by = f"{start.manifest.world_size} ranks, {start.manifest.strategy}"
    lines = [*start.lines, f"continuing at step {start.step} from {start.checkpoint} (written by {by})"]
    lines += [f"changed since then: {change}" for change in found]
    return replace(start, completed=completed, lines=tuple(lines))


def look_ahead(config: Config) -> Start:
    """Where a run of this config would start, for checks before it: no file is hashed, and nothing is moved.

    Raises UserError if `choose_start` would, because run.dir holds another run, or run.resume no checkpoint.
    """
    root, resume = Path(config.run.dir) / "checkpoints", config.run.resume
    if resume == "never":
        return Start()
    candidates = [root / f"step-{step}" for step in directory.steps(root)] if resume == "auto" else [Path(resume)]
    start = Start()
    for path in candidates:
        try:
            start = Start(path, read_manifest(path))
            break
        except Damaged as error:
            if resume != "auto":
                raise UserError(f"run.resume: {path} is not a good checkpoint: {error}") from None
    if start.manifest is not None:
        check_changes(start.manifest.config, config, str(start.checkpoint))
    return replace(start, completed=resume == "auto" and _is_completed(config, start))


def restore(start: Start, strategy: Strategy, world: World) -> None:
    """Copy the checkpoint's weights and averages into the strategy; a collective. Raises UserError on all ranks."""
    checkpoint, manifest = start.checkpoint, start.manifest
    if checkpoint is None or manifest is None:
        return

    def read() -> None:
        fault("resume.read")
        _check_states(manifest, strategy)
        make_averages(strategy, set(manifest.keys), manifest.updates)
        averaged = any(key.startswith(f"{EMA}/") for key in manifest.keys)
        wanted = {
            piece.key: (piece.start, piece.local)
            for piece in pieces(strategy, world)
            if averaged or not piece.key.startswith(f"{EMA}/")
        }
        weights = {key for key in manifest.keys if key.startswith("weight/")}
        if unknown := weights - set(wanted):
            raise UserError(f"{checkpoint} holds {min(unknown)}, which this model does not have: is it the same model?")
        # With the same world size, this rank's own file has everything that it needs, so it is read first.
        names = sorted(manifest.files)
        own = world.rank % len(names)
        paths = [checkpoint / name for name in names[own:] + names[:own]]
        try:
            read_slices(paths, wanted)
        except Damaged as error:
            raise UserError(f"{checkpoint} does not fit this model: {error}") from error
        if strategy.ema and not averaged:  # optim.ema is new: the average begins here
            strategy.ema.restart()

    first_error(world, "reading the checkpoint", read)


def _check_states(manifest: Manifest, strategy: Strategy) -> None:
    """Raises UserError if one of the two, checkpoint and strategy, has averages in 8 bits and the other has not."""
    stored = manifest.config["optim"].get("states", "fp32")
    wanted = strategy.adamw.states if isinstance(strategy.adamw, AdamW) else "fp32"
    if stored != wanted and "int8" in (stored, wanted):
        raise UserError(
            f"optim.states={wanted} cannot continue from a checkpoint with optim.states={stored}: set it back, or "
            "start anew with run.resume=never"
        )


def _on_main(world: World, what: str, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only; return its result, or raise its error, on every rank."""
    return broadcast_json(world, first_error(world, what, lambda: action() if world.is_main else None))


def first_good(candidates: list[str], world: World, lines: list[str], *, quarantine: bool) -> Start:
    """The first candidate that verifies on all ranks. Bad ones are moved aside, or raise UserError; a collective."""
    for path in map(Path, candidates):
        manifest, reason = _verify(path, world)
        if manifest is not None:
            return Start(path, manifest, False, tuple(lines))
        if not quarantine:
            raise UserError(f"run.resume: {path} is not a good checkpoint: {reason}")
        aside = _on_main(world, "moving aside", partial(directory.quarantine, path, reason))
        lines.append(f"warning: bad checkpoint {path}: {reason}; moved to {aside}")
    return Start(lines=tuple(lines))


def _verify(path: Path, world: World) -> tuple[Manifest | None, str]:
    """The manifest of a checkpoint, if every file is as it was written; otherwise None and the reason."""

    def on_main() -> dict:
        try:
            return {"manifest": asdict(read_manifest(path))}
        except Damaged as error:
            return {"reason": str(error)}

    found = _on_main(world, "reading a manifest", on_main)
    if "reason" in found:
        return None, found["reason"]
    fault("resume.verify")
    files = {name: FileRecord(**record) for name, record in found["manifest"]["files"].items()}
    manifest = Manifest(**{**found["manifest"], "files": files})
    mine = list(files.items())[world.rank :: world.size]
    reasons = [reason for name, record in mine if (reason := check_file(path, name, record))]
    all_reasons = [reason for rank in all_gather_json(world, reasons) for reason in rank]
    return (None, all_reasons[0]) if all_reasons else (manifest, "")


def _refuse_step_0(root: Path, start: Start) -> None:
    """Raises UserError rather than to start at step 0 when all checkpoints are bad."""
    if start.manifest is None and (bad := sorted(path.name for path in root.glob("bad-step-*"))):
        reasons = "".join(f"\n  {line}" for line in start.lines)
        raise UserError(
            f"no checkpoint in {root} is good ({', '.join(bad)}):{reasons}\n"
            "bring one back from a copy, or start again at step 0 with run.resume=never"
        )


def _undo(root: Path, chosen: Path, step: int) -> None:
    """The user goes back to `chosen`: rename the later checkpoints of this run directory, so that they are kept."""
    if chosen.resolve().parent != root.resolve():
        directory.move_aside(root)
        return
    for later in directory.steps(root):
        if later > step:
            directory.quarantine(root / f"step-{later}", f"the run went back to step {step}", "undone")


def _is_completed(config: Config, start: Start) -> bool:
    """Whether the run directory holds this run, completed. Raises UserError if it holds another completed run."""
    if read_status(config.run.dir).get("status") != "completed":
        return False
    before = load_config(str(Path(config.run.dir) / "config.yaml"), []).model_dump(mode="json")
    found = changes(before, config)
    if found and (start.manifest is None or any(change.key not in LENGTH for change in found)):
        raise UserError(
            f"{config.run.dir} holds a completed run with other settings ({'; '.join(map(str, found))}): choose "
            "another run.dir, or start anew with run.resume=never"
        )
    return not found
