"""Checkpoints: what is written, when, and what is kept; a resumed run equals the run that was not stopped."""

import json
import stat
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open

from rmcore.checkpoint import directory
from rmcore.checkpoint.changes import changes
from rmcore.checkpoint.manifest import Manifest, check_file, read_manifest, write_manifest
from rmcore.checkpoint.shards import Damaged, hash_file, read_slices, write_shard
from rmcore.checkpoint.state import through_buffers
from rmcore.config import load_config
from rmcore.tracking.status import read_status
from tests.harness.configs import NEEDED
from tests.harness.crash import Fault, run
from tests.harness.ranks import run_ranks
from tests.harness.small_run import arguments, metrics, reference, same

# A save waits for the one before it: at the third, of step 6, that of step 4 is complete.
KILLED_AT_6 = [Fault("save.copy", "kill", 1, 3)]


class Late:
    """A copy to a buffer that is done when the host waits for it, and not before."""

    def __init__(self, order: list[str]) -> None:
        self.order, self.number = order, sum(entry.startswith("fill") for entry in order)
        order.append(f"fill {self.number}")

    def synchronize(self) -> None:
        self.order.append(f"wait {self.number}")


def test_a_gpu_copies_its_state_through_two_small_buffers() -> None:
    """Each part of 8 or 16 elements is waited for before its buffer is filled again, and all bytes arrive."""
    sources = [torch.randn(40), torch.randn(3), torch.randn(33).bfloat16()]
    copies = [(torch.full_like(source, torch.nan), source) for source in sources]
    order: list[str] = []
    through_buffers(copies, [torch.empty(32, dtype=torch.uint8) for _ in range(2)], lambda: cast(Any, Late(order)))
    assert all(torch.equal(host, source) for host, source in copies)
    parts = 5 + 1 + 3
    in_turn = [entry for n in range(1, parts) for entry in (f"fill {n}", f"wait {n - 1}")]
    assert order == ["fill 0", *in_turn, f"wait {parts - 1}"]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(tmp_path: Path, strategy: str) -> None:
    more = f"parallel.strategy={strategy}"
    whole = reference(tmp_path, more)
    killed = run(tmp_path / "run", arguments(tmp_path, more), 2, KILLED_AT_6)
    resumed = run(killed.directory, arguments(tmp_path, more), 2)
    assert resumed.codes == [0, 0] and same(resumed, whole), resumed.text
    assert resumed.order == whole.order and metrics(resumed) == metrics(whole)
    assert "random state untouched" in whole.text, "a checkpoint holds no random state, for the loop draws nothing"


IN_BF16 = ["parallel.precision=bf16", "model.weights=bf16"]
FORMATS = {  # settings, and the dtypes of a checkpoint's weights and of its averages; small tensors keep fp32 averages
    "bf16 weights": ([*IN_BF16], {"BF16"}, {"F32"}),
    "bf16 weights and averages": ([*IN_BF16, "optim.states=bf16"], {"BF16"}, {"BF16"}),
    "bf16 weights, 8-bit averages": ([*IN_BF16, "optim.states=int8"], {"BF16"}, {"U8", "F32"}),
    "8-bit averages": (["optim.states=int8"], {"F32"}, {"U8", "F32"}),
}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy, what",
    [
        pytest.param("zero3", "bf16 weights and averages", marks=pytest.mark.slow),
        ("zero1", "bf16 weights, 8-bit averages"),
        pytest.param("ddp", "bf16 weights", marks=pytest.mark.slow),
        pytest.param("zero2", "8-bit averages", marks=pytest.mark.slow),
        pytest.param("zero3", "bf16 weights, 8-bit averages", marks=pytest.mark.slow),
    ],
)
def test_other_formats_resume_to_the_last_bit_and_move_between_strategies(
    tmp_path: Path, strategy: str, what: str
) -> None:
    more, weights, averages = FORMATS[what]
    if "optim.states=int8" in more:
        pytest.importorskip("bitsandbytes")
    given = arguments(tmp_path, f"parallel.strategy={strategy}", *more)
    whole = run(tmp_path / "whole", given, 2)
    assert whole.codes == [0, 0], whole.text
    last = whole.directory / "checkpoints" / "step-8"
    found: dict[str, set[str]] = {}
    for path in last.glob("rank-*"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                found.setdefault(key.split("/")[0], set()).add(file.get_slice(key).get_dtype())
    scales = {"exp_avg_scale": {"F32"}, "exp_avg_sq_scale": {"F32"}} if "U8" in averages else {}
    assert found == {"weight": weights, "exp_avg": averages, "exp_avg_sq": averages, **scales}
    killed = run(tmp_path / "run", given, 2, KILLED_AT_6)
    resumed = run(killed.directory, given, 2)
    assert resumed.codes == [0, 0] and metrics(resumed) == metrics(whole), resumed.text
    assert read_manifest(resumed.directory / "checkpoints" / "step-8").files == read_manifest(last).files
    # Another strategy and another world size restore the same numbers, to the last bit.
    other = "zero3" if strategy != "zero3" else "zero1"
    moved = [*arguments(tmp_path, f"parallel.strategy={other}", *more), f"run.dir={whole.directory}", "run.epochs=2"]
    assert restored_by(3, tmp_path / "three", moved) == stored_in(last)


EVERY_STRATEGY = [("ddp", 1, 1), ("zero1", 3, 1), ("zero2", 4, 1), ("zero3", 3, 1), ("hsdp", 4, 2)]
MOVED = {
    **{what: more for what, (more, *_) in FORMATS.items()},
    "nf4 base, 8-bit averages": ["model.lora.rank=64", "model.lora.base=nf4", "optim.states=int8"],
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("what", MOVED)
@pytest.mark.parametrize("written_by", ["ddp", "hsdp"])
def test_what_two_ranks_wrote_is_restored_by_every_strategy(tmp_path: Path, written_by: str, what: str) -> None:
    """The numbers as they are stored, with their scales, to the last bit, on 1, 3 and 4 ranks."""
    more = MOVED[what]
    for library in ("bitsandbytes", "peft"):
        pytest.importorskip(library)
    given = arguments(tmp_path, f"parallel.strategy={written_by}", *more)
    whole = run(tmp_path / "whole", given, 2)
    assert whole.codes == [0, 0], whole.text
    stored = stored_in(whole.directory / "checkpoints" / "step-8")
    assert any(key.startswith("exp_avg_scale/") for key in stored) == ("optim.states=int8" in more)
    for strategy, ranks, hosts in EVERY_STRATEGY:
        moved = [*arguments(tmp_path, f"parallel.strategy={strategy}", *more), f"run.dir={whole.directory}"]
        found = restored_by(ranks, tmp_path / strategy, [*moved, "run.epochs=2"], hosts)
        assert found == stored, f"{strategy} on {ranks} ranks"


def stored_in(checkpoint: Path) -> dict[str, str]:
    """The whole tensors of a checkpoint, read without rmcore, in hexadecimal."""
    parts: dict[str, str] = {}
    for path in checkpoint.glob("rank-*"):
        with safe_open(path, framework="pt") as file:
            parts |= {key: file.get_tensor(key).view(torch.uint8).numpy().tobytes().hex() for key in file.keys()}  # noqa: SIM118
    return joined(parts)


def restored_by(ranks: int, folder: Path, arguments: list[str], hosts: int = 1) -> dict[str, str]:
    """The whole tensors that these ranks continue from, in hexadecimal."""
    parts: dict[str, str] = {}
    for result in run_ranks(restored, ranks, folder, arguments, hosts=hosts, timeout=300):
        parts |= result.value
    return joined(parts)


def restored(rendezvous: str, arguments: list[str]) -> dict[str, str]:
    """This rank's share of what a run continues from: KEY@FIRST -> bytes."""
    from rmcore.checkpoint.resume import choose_start
    from rmcore.checkpoint.state import HostCopy, pieces
    from rmcore.parallel.world import running_world
    from rmcore.training.assembly import assemble

    torch.set_num_threads(1)
    config = load_config(None, arguments)
    with running_world(60.0, config.run.seed, init_method=rendezvous) as world:
        run = assemble(config, world, choose_start(config, world))
        copy = HostCopy()
        copy.take(pieces(run.strategy, world))
        return {f"{key}@{first}": part.view(torch.uint8).numpy().tobytes().hex() for key, first, part in copy.slices}


def joined(parts: dict[str, str]) -> dict[str, str]:
    """The whole tensors of slices KEY@FIRST."""
    whole: dict[str, str] = {}
    for name in sorted(parts, key=lambda name: (name.rpartition("@")[0], int(name.rpartition("@")[2]))):
        key = name.rpartition("@")[0]
        whole[key] = whole.get(key, "") + parts[name]
    return whole


@pytest.mark.distributed
def test_averages_in_8_bits_are_not_those_of_another_format(tmp_path: Path) -> None:
    killed = run(tmp_path / "run", arguments(tmp_path), 1, [Fault("save.copy", "kill", 0, 3)])
    refused = run(killed.directory, arguments(tmp_path, "optim.states=int8"), 1)
    assert refused.codes == [2]
    assert "optim.states=int8 " in refused.text and "Traceback" not in refused.text


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_checkpoint_after_an_evaluation_in_bf16_holds_fp32_weights_and_averages(
    tmp_path: Path, strategy: str
) -> None:
    """zero2 keeps the gathered bf16 weights registered after an evaluation; the checkpoint must hold the shards."""
    more = [f"parallel.strategy={strategy}", "parallel.precision=bf16", "run.evals=4", "run.keep=4"]
    more += [f"data.eval.path={tmp_path}/pairs.jsonl", "data.eval.split=train[:20%]"]
    whole = run(tmp_path / "whole", arguments(tmp_path, *more), 2)
    assert whole.codes == [0, 0], whole.text
    for step in (2, 4, 6, 8):
        kinds: dict[str, set[str]] = {}
        for path in (whole.directory / "checkpoints" / f"step-{step}").glob("rank-*"):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    kinds.setdefault(key.split("@")[0], set()).add(file.get_slice(key).get_dtype())
        names = {key.partition("/")[2] for key in kinds}
        assert set(kinds) == {f"{part}/{name}" for part in ("weight", "exp_avg", "exp_avg_sq") for name in names}
        assert all(dtypes == {"F32"} for dtypes in kinds.values())
    killed = run(tmp_path / "run", arguments(tmp_path, *more), 2, KILLED_AT_6)
    resumed = run(killed.directory, arguments(tmp_path, *more), 2)
    assert resumed.codes == [0, 0] and same(resumed, whole) and metrics(resumed) == metrics(whole), resumed.text


@pytest.mark.distributed
def test_hsdp_over_two_hosts_of_two(tmp_path: Path) -> None:
    hosts = {"LOCAL_WORLD_SIZE": "2"}
    given = arguments(tmp_path, "parallel.strategy=hsdp")
    whole = run(tmp_path / "whole", given, 4, environment=hosts)
    assert whole.codes == [0] * 4, whole.text
    killed = run(tmp_path / "run", given, 4, KILLED_AT_6, environment=hosts)
    sizes = [path.stat().st_size for path in (killed.directory / "checkpoints").glob("step-4/rank-*")]
    assert len(sizes) == 4 and max(sizes) < 1.1 * min(sizes), "the replicas divide the writing"
    resumed = run(killed.directory, given, 4, environment=hosts)
    assert resumed.codes == [0] * 4 and same(resumed, whole), resumed.text


@pytest.mark.distributed
def test_a_half_full_log_interval_goes_on(tmp_path: Path) -> None:
    """log.every=3, stopped after step 4: the line of step 6 is the mean of steps 4, 5 and 6."""
    given = arguments(tmp_path, "log.every=3")
    whole = run(tmp_path / "whole", given, 2)
    killed = run(tmp_path / "run", given, 2, KILLED_AT_6)
    resumed = run(killed.directory, given, 2)
    assert "continuing at step 4" in resumed.text
    for mine, theirs in zip(metrics(resumed), metrics(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-12), "sums of fp64, added in another order"


def test_files_are_plain_safetensors_of_equal_size_and_ordinary_mode(tmp_path: Path) -> None:
    whole = run(tmp_path / "run", arguments(tmp_path), 4)
    newest = whole.directory / "checkpoints" / "step-8"
    files = sorted(newest.iterdir())
    assert [path.name for path in files] == ["manifest.json", *(f"rank-0000{r}-of-00004.safetensors" for r in range(4))]
    sizes = [path.stat().st_size for path in files[1:]]
    assert max(sizes) < 1.05 * min(sizes), "each rank writes its part, no rank the whole"
    assert sum(sizes) < 1.05 * 12 * 362_240, "every element once: fp32 weight and two averages"
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with safe_open(files[1], framework="pt") as file:
        assert {name.split("/")[0] for name in file.keys()} == {"weight", "exp_avg", "exp_avg_sq"}  # noqa: SIM118
    manifest = read_manifest(newest)
    assert (manifest.step, manifest.episode, manifest.updates, manifest.world_size) == (8, 48, 8, 4)


def test_keep_and_keep_best(tmp_path: Path) -> None:
    """keep=1, keep_best=2 over four evaluations: the newest, and the two best by accuracy, then by loss."""
    data = [f"data.eval.path={tmp_path}/pairs.jsonl", "data.eval.split=train[:80%]"]
    more = ["run.evals=4", "run.keep=1", "run.keep_best=2", "run.save_every=8", "optim.lr=3e-2", *data]
    outcome = run(tmp_path / "run", arguments(tmp_path, *more), 1)
    assert outcome.codes == [0], outcome.text
    figures = {line["step"]: line for line in metrics(outcome) if "eval/rm/accuracy" in line}
    quality = {step: (line["eval/rm/accuracy"], -line["eval/rm/loss"]) for step, line in figures.items()}
    best = sorted(quality, key=lambda step: quality[step])[-2:]
    assert directory.steps(outcome.directory / "checkpoints") == sorted({*best, 8}, reverse=True)


def test_saving_by_the_clock_alone(tmp_path: Path) -> None:
    """A thousandth of a second between saves: one at every boundary."""
    more = ["run.save_every=null", "run.save_minutes=1e-5", "run.keep=9"]
    outcome = run(tmp_path / "run", arguments(tmp_path, *more), 2)
    assert outcome.codes == [0, 0] and directory.steps(outcome.directory / "checkpoints") == list(range(8, 0, -1))


def test_without_a_schedule_only_a_signal_saves(tmp_path: Path) -> None:
    more = ["run.save_every=null", "run.save_minutes=null"]
    quiet = run(tmp_path / "quiet", arguments(tmp_path, *more), 1)
    assert quiet.codes == [0] and directory.steps(quiet.directory / "checkpoints") == []
    stopped = run(tmp_path / "stopped", arguments(tmp_path, *more), 1, [Fault("compute", "term", 0, 3)])
    assert stopped.codes == [3] and directory.steps(stopped.directory / "checkpoints") == [3]


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    outcome = run(tmp_path / "run", arguments(tmp_path), 1, [Fault("compute", "twice", 0, 6)])
    assert outcome.codes == [128 + 15] and "a second signal: leaving at once" in outcome.text
    assert 2 in directory.steps(outcome.directory / "checkpoints"), "the save at step 4 waited for it"
    assert run(outcome.directory, arguments(tmp_path), 1).codes == [0]


def test_a_signal_before_the_first_step_ends_the_run(tmp_path: Path) -> None:
    given = arguments(tmp_path)
    run(tmp_path / "run", given, 1, [Fault("save.copy", "kill", 0, 2)])
    stopped = run(tmp_path / "run", given, 1, [Fault("resume.read", "term")])
    assert stopped.codes == [3] and stopped.status["status"] == "preempted"
    assert run(tmp_path / "run", given, 1).codes == [0]


@pytest.mark.parametrize(("background", "code"), [("true", 0), pytest.param("false", 1, marks=pytest.mark.slow)])
def test_the_next_step_does_not_wait_for_the_disk(tmp_path: Path, background: str, code: int) -> None:
    """The write is held up until the next step computes; without the background it would wait for ever (30 s)."""
    outcome = run(
        tmp_path / "run",
        arguments(tmp_path, f"run.background_save={background}"),
        2,
        [Fault("save.sync", "until-next-step", rank, 1) for rank in range(2)],
    )
    assert outcome.codes == [code] * 2, outcome.text
    assert code or same(outcome, reference(tmp_path))


def test_a_completed_run_says_so_and_goes_on_when_it_grew(tmp_path: Path) -> None:
    given = arguments(tmp_path)
    done = run(tmp_path / "run", given, 1)
    again = run(done.directory, given, 1)
    assert again.codes == [0] and "is completed already" in again.text and not again.weights
    other = run(done.directory, arguments(tmp_path, "optim.lr=2e-3"), 1)
    assert other.codes == [2] and "holds a completed run with other settings (optim.lr: 0.001 -> 0.002)" in other.text
    assert read_status(done.directory)["status"] == "completed"
    longer = run(done.directory, [*given, "run.epochs=2"], 1)
    assert longer.codes == [0] and "continuing at step 8" in longer.text and longer.status["step"] == 16, longer.text


def test_a_plan_that_ends_before_the_checkpoint_is_refused(tmp_path: Path) -> None:
    """A plan that ends at the checkpoint completes the run."""
    given = arguments(tmp_path)
    stopped = run(tmp_path / "run", given, 1, [Fault("compute", "term", 0, 5)])
    assert stopped.codes == [3], stopped.text
    refused = run(stopped.directory, [*given, "batch.pairs=24", "run.allow_changes=[batch.pairs]"], 1)
    assert refused.codes == [2] and "Traceback" not in refused.text, refused.text
    assert "with these settings and data the run ends after step 2: " in refused.text
    ends = run(stopped.directory, [*given, "run.max_steps=5"], 1)
    assert ends.codes == [0] and ends.status["status"] == "completed" and ends.status["step"] == 5, ends.text


def test_a_named_checkpoint_and_never(tmp_path: Path) -> None:
    given = arguments(tmp_path, "run.keep=9")
    whole = run(tmp_path / "run", given, 1)
    back = run(whole.directory, [*given, f"run.resume={whole.directory}/checkpoints/step-4"], 1)
    assert back.codes == [0] and "continuing at step 4" in back.text and same(back, whole), back.text
    names = {path.name for path in (whole.directory / "checkpoints").iterdir()}
    assert {"undone-step-8", "undone-step-6", "step-8", "step-6", "step-4", "step-2"} == names
    missing = run(tmp_path / "other", [*given, "run.resume=nowhere/step-4"], 1)
    assert missing.codes == [2] and "run.resume: nowhere/step-4 is not a good checkpoint" in missing.text
    elsewhere = run(tmp_path / "other", [*given, f"run.resume={whole.directory}/checkpoints/step-4"], 1)
    assert elsewhere.codes == [0] and same(elsewhere, whole)
    anew = run(whole.directory, [*given, "run.resume=never"], 1)
    assert anew.codes == [0] and same(anew, whole) and (whole.directory / "checkpoints.1" / "step-4").is_dir()


def test_the_end_is_done_again_after_a_kill_before_the_export(tmp_path: Path) -> None:
    """Killed when all steps, their evaluation and the last checkpoint are done: evaluated once more, logged once."""
    data = [f"data.eval.path={tmp_path}/pairs.jsonl", "data.eval.split=train[:50%]", "run.evals=1"]
    given = arguments(tmp_path, *data)
    killed = run(tmp_path / "run", given, 1, [Fault("retain.delete", "kill", 0, 2)])
    assert killed.codes == [-9] and directory.steps(killed.directory / "checkpoints")[0] == 8, killed.text
    resumed = run(killed.directory, given, 1)
    assert resumed.codes == [0] and resumed.weights and resumed.status["eval"]["accuracy"] is not None
    assert [line["step"] for line in metrics(resumed)] == [2, 4, 6, 8, 8]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slices_written_by_some_ranks_are_read_by_others(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any cutting of tensors into files, any range wanted back: the same elements, or Damaged when one is missing."""
    folder = tmp_path_factory.mktemp("shards")
    length = data.draw(st.integers(1, 40))
    whole = {name: torch.randn(length) for name in ("weight/a", "exp_avg/a")}
    ranks = data.draw(st.integers(1, 5))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, length), min_size=ranks - 1, max_size=ranks - 1))), length]
    paths = []
    for rank in range(ranks):
        path = folder / f"{rank}.safetensors"
        start, end = cuts[rank], cuts[rank + 1]
        slices = [(name, start, tensor[start:end].clone()) for name, tensor in whole.items() if end > start]
        assert write_shard(path, slices) == hash_file(path)
        paths.append(path)
    start = data.draw(st.integers(0, length))
    end = data.draw(st.integers(start, length))
    wanted = {name: (start, torch.full((end - start,), torch.nan)) for name in whole}
    order = data.draw(st.permutations(paths))
    read_slices(order, wanted)
    for name, (_, tensor) in wanted.items():
        assert torch.equal(tensor, whole[name][start:end])
    lost = data.draw(st.integers(0, ranks - 1))
    overlap = min(end, cuts[lost + 1]) - max(start, cuts[lost])
    if overlap > 0:
        with pytest.raises(Damaged):
            read_slices([path for path in order if path != paths[lost]], wanted)


def manifest(**more: object) -> Manifest:
    fields = {
        "step": 4,
        "episode": 24,
        "epoch": 0.5,
        "updates": 4,
        "world_size": 1,
        "strategy": "ddp",
        "rmcore": "1",
        "data": "f",
        "config": {},
        "interval": [],
        "figures": None,
    }
    return Manifest(**{**fields, **more})  # type: ignore[arg-type]


def test_every_changed_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    """A flipped bit gives Damaged, or the same manifest (white space); never another one."""
    place = tmp_path / "step-4"
    place.mkdir()
    written = manifest(config={"run": {"seed": 1}}, interval=[0.1, 1e-300])
    write_manifest(place, written)
    path = place / "manifest.json"
    content = path.read_bytes()
    assert read_manifest(place) == written
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        try:
            assert read_manifest(place) == written
        except Damaged:
            continue


def test_a_checkpoint_under_another_name_is_none(tmp_path: Path) -> None:
    place = tmp_path / "step-5"
    place.mkdir()
    write_manifest(place, manifest())
    with pytest.raises(Damaged, match="is of step 4"):
        read_manifest(place)
    assert check_file(place, "rank-00000-of-00001.safetensors", hash_file(place / "manifest.json")) is not None


def test_only_changes_that_matter_are_reported() -> None:
    base = ["model.name=synthetic", "data.train.path=synthetic"]
    before = json.loads(json.dumps(load_config(None, base).model_dump(mode="json")))
    after = load_config(None, [*base, "optim.lr=1e-5", "log.every=3", "parallel.strategy=zero2", "run.seed=4"])
    assert [str(change) for change in changes(before, after)] == ["optim.lr: 3e-06 -> 1e-05", "run.seed: 1 -> 4"]
    assert changes({}, after) == [], "keys that an older version does not have"
    newer = load_config(None, [*NEEDED, "model.weights=bf16"])
    assert list(map(str, changes({}, newer))) == ['model.weights: "fp32" -> "bf16"'], "older versions had fp32 only"
    older = json.loads(json.dumps(load_config(None, base).model_dump(mode="json")))
    del older["model"]["lora"]["base"], older["model"]["lora"]["dora"]
    assert changes(older, load_config(None, base)) == [], "keys of LoRA that an older version does not have"
    [change] = changes(older, load_config(None, [*base, "model.lora.rank=4", "model.lora.base=bf16"]))
    assert change.key == "model.lora"


@pytest.mark.distributed
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_signal_to_one_rank_during_the_last_save_stops_all_ranks(tmp_path: Path, background: str) -> None:
    """The loop agreed for the last time before this save; rank 0, which got no signal, must not start the export."""
    more = f"run.background_save={background}"
    stopped = run(tmp_path / "run", arguments(tmp_path, more), 2, [Fault("save.open", "int", 1, 4)])
    assert stopped.codes == [3, 3] and stopped.status["status"] == "preempted", stopped.text
    resumed = run(stopped.directory, arguments(tmp_path, more), 2)
    assert resumed.codes == [0, 0] and same(resumed, reference(tmp_path, more)), resumed.text
