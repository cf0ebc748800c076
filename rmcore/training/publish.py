"""Exports the trained model as a Hugging Face directory, checks it, and pushes it to the hub if configured.

Input: a `Run` and the last evaluations.
Output: `<run.dir>/model/`. Its rewards, when plain transformers reloads it, equal the engine's.
Example: 6 texts of the longest and some other comparisons, largest difference 2.4e-07, allowed 1.0e-05.

Rank 0 checks and pushes alone, which may take longer than a collective of the training may wait. The other ranks wait
in a group of their own, with a timeout of PATIENCE.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rmcore.config import UserError
from rmcore.config.schema import Config
from rmcore.evaluation.evaluate import Evaluations
from rmcore.hf_export.adapter import adapter_parts
from rmcore.hf_export.card import model_card
from rmcore.hf_export.directory import Package, check_texts, check_weights, set_aside, take_place, write_model
from rmcore.hf_export.parity import ExportError, Parity, Probe, check_export
from rmcore.hf_export.parts import exported_parts
from rmcore.hf_export.probe import probe_of
from rmcore.hf_export.upload import PushError, push
from rmcore.host.command import ExplainedError
from rmcore.host.cores import usable_cores
from rmcore.host.faults import fault
from rmcore.host.memory import available_memory
from rmcore.host.terminal import print_text
from rmcore.model.classifier import is_made
from rmcore.model.language_head import WEIGHT as LM_HEAD
from rmcore.model.lazy_model import open_exported
from rmcore.model.lora import merged
from rmcore.model.outputs import Outputs
from rmcore.model.reward_model import computes_alone
from rmcore.parallel.fsdp import materialise, shard
from rmcore.parallel.strategy import Strategy
from rmcore.parallel.world import RankError, World, broadcast_json, device_mesh, first_error, second_group
from rmcore.tracking.tracker import Tracker
from rmcore.training.run import Run

RELOAD_SHARE = 0.25  # share of the available host memory that one whole fp32 copy of the model may take
ROOM_ON_DEVICE = 1.2  # free device memory that the check needs, relative to the fp32 weights
WORTH_ALL_CORES = 10**7  # weights; threads only slow smaller models down, the more so the busier the cores are
PATIENCE = 6 * 3600.0  # seconds that the other ranks wait for rank 0 to check and to push


def publish(run: Run, evaluations: Evaluations | None, tracker: Tracker) -> None:
    """Export the model, one whole weight at a time; a collective.

    Raises RankError, on all ranks, if the export cannot be written or does not compute what was trained.
    """
    world, directory = run.world, model_directory(run)
    probe = make_probe(run)
    run.strategy.adamw.state.clear()  # the training is over, and the check may need the memory
    package = package_of(run, evaluations)
    waiting = second_group(PATIENCE) if world.size > 1 else None
    temporary = first_error(world, "the export", lambda: written(run, package, directory), waiting)
    place = Path(broadcast_json(world, str(temporary)))
    # A model that was loaded whole, because transformers rearranges its weights, is reloaded whole, too.
    by_parts = broadcast_json(world, run.in_parts and _too_large(run.strategy))

    def check() -> Parity | None:
        fault("export.check")
        return checked(run, package, place, probe, by_parts)

    try:
        parity = first_error(world, "the export", check, waiting)
    except RankError as error:
        aside = f" (left in {set_aside(place, directory)})" if world.is_main else ""
        raise RankError(f"{error}{aside}") from error
    first_error(world, "the export", lambda: take_place(place, directory) if world.is_main else None)
    if parity:
        tracker.say(
            f"model in {directory}: rewards reloaded by transformers{' from shards' if by_parts else ''} differ by "
            f"{parity.difference:.1e} (allowed {parity.allowed:.1e})"
        )
        for note in parity.notes:
            tracker.say(note)


def push_model(run: Run) -> None:
    """With hub.push, upload the exported model, after everything else of the run is done; a collective.

    Raises PushError, on all ranks, if the hub does not accept it.
    """
    world, hub = run.world, run.config.hub
    if not hub.push:
        return
    waiting = second_group(PATIENCE) if world.size > 1 else None
    try:
        first_error(
            world, "the push to the hub", lambda: push(model_directory(run), hub) if world.is_main else None, waiting
        )
    except ExplainedError as error:
        raise PushError(str(error)) from error
    if world.is_main:
        print_text(f"pushed to {hub.repo}")


def model_directory(run: Run) -> Path:
    """Where the run exports its model."""
    return Path(run.config.run.dir) / "model"


def package_of(run: Run, evaluations: Evaluations | None) -> Package:
    """Everything of the export except the weights."""
    config = run.config
    adapter = None
    if config.export.adapter:
        adapter = adapter_parts(config.model, run.adapted, run.model_class, run.tokenizer, run.base_weights)
    parts = exported_parts(config, run.model_class, run.hf_config, run.towers)
    return Package(
        model_class=parts.model_class,
        hf_config=parts.hf_config,
        tokenizer=run.tokenizer,
        template=run.data.template,
        dtype=export_dtype(config),
        adapter=adapter,
        card=model_card(
            config,
            wants_text=run.data.template.wants_text,
            data=run.data.train,
            metrics=evaluations.metrics if evaluations else None,
            outputs=Outputs.stored(run.hf_config),
            made=is_made(parts.model_class),
            adapter=adapter,
            alone=computes_alone(run.strategy.model),
            parts=parts,
        ),
        config_yaml=config.dump_yaml(),
        towers=parts.towers,
        trust_remote_code=config.model.trust_remote_code,
        lm_head=config.export.lm_head,
    )


def export_dtype(config: Config) -> torch.dtype:
    """The dtype of the exported weights."""
    return torch.bfloat16 if config.parallel.bf16 else torch.float32


def written(run: Run, package: Package, directory: Path) -> Path | None:
    """Write the files on rank 0, with the weights that all ranks gather; a collective. Returns their directory."""
    shapes, whole = exported_shapes(run), run.strategy.whole_tensors()
    tensors = ((name, tensor) for name, tensor in whole if name in shapes)
    try:
        if not run.world.is_main:
            return None
        if not run.adapted or package.adapter:
            return write_model(shapes, tensors, package, directory)
        plain = merged(dict(tensors), run.adapted)
        return write_model({n: tuple(t.shape) for n, t in plain.items()}, plain.items(), package, directory)
    finally:
        for _ in whole:  # the other ranks gather all weights, so this rank must too, even if its disk failed
            pass


def exported_shapes(run: Run) -> dict[str, tuple[int, ...]]:
    """The shape of every whole weight that an export holds; of the language-model head only with export.lm_head."""
    left_out = () if run.config.export.lm_head else (LM_HEAD,)
    return {name: shape for name, shape in run.strategy.shapes().items() if name not in left_out}


def _too_large(strategy: Strategy) -> bool:
    """Whether a whole fp32 copy would take more than RELOAD_SHARE of the available host memory."""
    need = 4 * sum(p.numel() for p in strategy.named_parameters().values())
    return need > RELOAD_SHARE * available_memory()


def checked(run: Run, package: Package, place: Path, probe: Probe, by_parts: bool) -> Parity | None:
    """Run transformers' own code on the export: the whole model on rank 0, or a part of it on each rank."""
    if by_parts:
        parity = check_export(exported_shards(place, run.config, run.world), probe, package.dtype)
    elif run.world.is_main:
        weights = sum(map(math.prod, run.strategy.shapes().values()))
        with _all_cores() if weights > WORTH_ALL_CORES else nullcontext():
            parity = check_weights(place, package, probe, lambda model: _on_device(model, run.world.device))
    else:
        return None
    check_texts(place, package, probe.token_ids)
    return parity


def _on_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on the device of the training if that has the room, else on the CPU."""
    if device.type != "cuda":
        return model
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    need = sum(p.nbytes for p in model.parameters())
    if ROOM_ON_DEVICE * need < free:
        model.to(device)  # type: ignore[arg-type]
    return model


@contextmanager
def _all_cores() -> Iterator[None]:
    """One rank computes and the others wait: it may use the cores of all, not only its share (OMP_NUM_THREADS)."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, usable_cores()))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_probe(run: Run) -> Probe:
    """A few held-out texts, the longest among them, and the engine's rewards for them; a collective under FSDP.

    Raises UserError if the model's code cannot compute in bf16.
    """
    precision = torch.bfloat16 if run.config.parallel.bf16 else torch.float32
    data, world = run.data.eval or run.data.train, run.world
    try:
        with run.strategy.autocast():
            return probe_of(
                run.strategy.model,
                data,
                world.device,
                run.share,
                torch.float8_e4m3fn if run.config.parallel.fp8 else precision,
                world.context,
                logits=run.config.export.lm_head,
            )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if precision != torch.bfloat16 or not re.search("dtype|scalar type", reason):
            raise
        name, strategy = run.config.model.name, run.config.parallel.strategy
        raise UserError(
            f"model.name {name}: its code in transformers cannot compute in bf16 under parallel.strategy={strategy} "
            f"({reason}); set parallel.precision=fp32"
        ) from error


def exported_shards(directory: Path, config: Config, world: World) -> PreTrainedModel:
    """An exported model as transformers runs it, of which each rank holds its rows; a collective.

    Raises ExportError if the files do not hold exactly the weights of the model's class.
    """
    try:
        parts = open_exported(directory)
    except UserError as error:
        raise ExportError(str(error)) from error
    model = parts.build()
    shard(model, device_mesh(world, by_host=config.parallel.traits.by_host))
    materialise(model, parts, world.device)
    return model
