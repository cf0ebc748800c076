"""Makes a Hugging Face directory from a checkpoint of any strategy, in one process.

Input: a run directory or one of its checkpoints, and overrides of its config. Output: the directory that
rmcore/hf_export/directory.py writes and checks, and lines about it.
Example: export("runs/hh", "hh-rm") -> ["hh-rm: step 120; rewards reloaded by transformers differ by 2.4e-07 (allowed
1.0e-05)"].

The weights come from the checkpoint. The base model's config and tokenizer are read from the place that the run used;
its weights are read only after LoRA. If the run's data can still be read, they give the texts of the check and the
counts of the model card, and their token ids must be those of the training; otherwise built-in texts are used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from rmcore.checkpoint import directory
from rmcore.checkpoint.changes import allowed
from rmcore.checkpoint.manifest import FILE, Manifest, check_file, read_manifest
from rmcore.checkpoint.resume import Start
from rmcore.checkpoint.shards import Damaged, read_slices
from rmcore.checkpoint.state import EMA
from rmcore.config import Config, UserError, config_from_values
from rmcore.config.schema import ModelConfig
from rmcore.data.prepare import PreparedData, prepare_data
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.templates import Template, template_of
from rmcore.data.tokens.tokenizer import load_tokenizer
from rmcore.evaluation.metrics import from_log
from rmcore.evaluation.trained import TrainedModel, evaluation_config
from rmcore.hf_export.adapter import adapter_parts
from rmcore.hf_export.card import converted_card, model_card
from rmcore.hf_export.directory import Package, export_model
from rmcore.hf_export.parity import Probe
from rmcore.hf_export.parts import exported_parts
from rmcore.hf_export.probe import built_in, probe_of
from rmcore.hf_export.weights import SHARD_SIZE, check_shard_size
from rmcore.host.model_directory import ADAPTER
from rmcore.model.adapter import BaseWeights
from rmcore.model.backbone import base_rows, load_model, load_model_config, position_limit, train_text_only
from rmcore.model.classifier import brings_code, is_made, text_model, towers
from rmcore.model.language_head import WEIGHT as LM_HEAD
from rmcore.model.language_head import empty_head
from rmcore.model.lazy_model import stored_buffers
from rmcore.model.lora import Adapted, add_lora, frozen_fingerprint, merged, store_base
from rmcore.model.meta_model import model_on_meta
from rmcore.model.outputs import Outputs
from rmcore.model.reward_model import RewardModel, computes_alone
from rmcore.parallel.precision import bf16_of, with_precision
from rmcore.parallel.world import running_world
from rmcore.scoring.calibration import calibrate, read_temperature
from rmcore.scoring.normalisation import KEY as NORMALISATION
from rmcore.scoring.normalisation import measure, read_normalisation
from rmcore.tracking.status import read_status


def export(
    run: str,
    out: str,
    overrides: Sequence[str] = (),
    normalise: bool = False,
    max_shard_size: str = SHARD_SIZE,
    *,
    calibrated: bool = False,
) -> list[str]:
    """Write and check the directory `out`; returns lines about it. Raises UserError, ExportError.

    `normalise`, `calibrated`: measure a mean and deviation, and fit a temperature, on the held-out data.
    """
    check_shard_size(max_shard_size)
    if (Path(run) / ADAPTER).is_file():
        if normalise or calibrated:
            raise UserError(f"{run} is an adapter, without the data of its run: export a checkpoint of the run instead")
        return merge_adapter(run, out, overrides, max_shard_size)
    checkpoint, manifest, lines = find_checkpoint(Path(run))
    config, precision_lines = config_of(manifest, overrides)
    loaded = load(config, checkpoint, manifest)
    lines += [*precision_lines, *loaded.notes]
    normalisation, calibration = None, None
    if normalise or calibrated:
        held_out, rewards_A = held_out_rewards(loaded, "--normalise" if normalise else "--calibrate")
        normalisation = measure(rewards_A) if normalise else None
        targets = any(loss.traits.targets for loss in config.losses)
        calibration = calibrate(held_out, rewards_A, targets=targets) if calibrated else None
    temperature = calibration.temperature if calibration else None
    evaluated = manifest.config["run"].get("weights", "trained")  # the weights whose metrics the checkpoint holds
    trained = loaded.trained
    adapter = None
    if config.export.adapter:
        adapter = adapter_parts(
            config.model, loaded.adapted, type(trained.hf_model), trained.tokenizer, loaded.base_weights
        )
    parts = exported_parts(config, type(trained.hf_model), trained.hf_model.config, towers(trained.hf_model))
    package = Package(
        model_class=parts.model_class,
        hf_config=parts.hf_config,
        tokenizer=trained.tokenizer,
        template=loaded.template,
        dtype=trained.dtype,
        card=model_card(
            config,
            wants_text=loaded.template.wants_text,
            data=loaded.data.train if loaded.data else None,
            metrics=from_log(manifest.figures or {}) if evaluated == config.run.weights else None,
            normalisation=normalisation,
            outputs=Outputs.stored(trained.hf_model.config),
            temperature=temperature,
            made=is_made(parts.model_class),
            adapter=adapter,
            alone=computes_alone(trained.model),
            parts=parts,
        ),
        config_yaml=config.dump_yaml(),
        normalisation=normalisation,
        temperature=temperature,
        max_shard_size=max_shard_size,
        towers=parts.towers,
        trust_remote_code=config.model.trust_remote_code,
        lm_head=config.export.lm_head,
        adapter=adapter,
    )
    whole = trained.model.state_dict()
    state = whole if package.adapter else merged(whole, loaded.adapted)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parity = export_model(shapes, state.items(), package, out, probe(loaded))
    if normalisation is not None:
        lines.append(f"held-out rewards: mean {normalisation.mean:.6g}, deviation {normalisation.deviation:.6g}")
    if calibration is not None:
        lines.append(
            f"temperature {calibration.temperature:.6g}: held-out log loss {calibration.before:.4f} at temperature 1, "
            f"{calibration.after:.4f} with it"
        )
    difference = f"differ by {parity.difference:.1e} (allowed {parity.allowed:.1e})"
    return [*lines, f"{out}: step {manifest.step}; rewards reloaded by transformers {difference}", *parity.notes]


def merge_adapter(source: str, out: str, overrides: Sequence[str], max_shard_size: str) -> list[str]:
    """Write the whole model of an exported adapter; returns lines about it. Raises UserError, ExportError."""
    config, lines = with_precision(
        evaluation_config(source, "synthetic", list(overrides)), bf16_of(torch.device("cpu"))
    )
    tokenizer, hf_config = load_tokenizer(config), load_model_config(config.model)
    trained = TrainedModel.load(config, tokenizer, torch.device("cpu"))
    template = template_of(config, tokenizer)
    trial = built_in(template, tokenizer, position_limit(hf_config))
    trained.choose_path(trial)
    with trained.autocast():
        probe = probe_of(trained.model, trial, trained.device, trained.share, trained.dtype)
    normalisation = read_normalisation(hf_config, source) if hasattr(hf_config, NORMALISATION) else None
    parts = exported_parts(config, type(trained.hf_model), trained.hf_model.config, towers(trained.hf_model))
    saved, made = Path(source) / "rmcore_config.yaml", is_made(parts.model_class)
    package = Package(
        model_class=parts.model_class,
        hf_config=parts.hf_config,
        tokenizer=tokenizer,
        template=template,
        dtype=trained.dtype,
        card=converted_card(
            source,
            wants_text=template.wants_text,
            normalisation=normalisation,
            made=made,
            parts=parts,
        ),
        config_yaml=saved.read_text(encoding="utf-8") if saved.is_file() else config.dump_yaml(),
        normalisation=normalisation,
        temperature=read_temperature(hf_config, source),
        max_shard_size=max_shard_size,
        towers=parts.towers,
        trust_remote_code=config.model.trust_remote_code,
    )
    state = trained.model.state_dict()
    parity = export_model({name: tuple(t.shape) for name, t in state.items()}, state.items(), package, out, probe)
    difference = f"differ by {parity.difference:.1e} (allowed {parity.allowed:.1e})"
    return [
        *lines,
        f"{out}: the adapter {source}, merged; rewards reloaded by transformers {difference}",
        *parity.notes,
    ]


def find_checkpoint(path: Path) -> tuple[Path, Manifest, list[str]]:
    """The checkpoint at `path`, or the one of the run directory that is exported, with all its bytes verified.

    That is the best one of a completed run with run.best_metric or run.patience, else the newest.

    Returns its path, its manifest and a line for each newer checkpoint that is damaged.
    Raises UserError if there is no good checkpoint.
    """
    root = path / "checkpoints"
    best = read_status(path).get("best") or {}
    steps = sorted(directory.steps(root), key=lambda step: step != best.get("step"))  # the others remain newest first
    candidates = [path] if (path / FILE).is_file() else [root / f"step-{step}" for step in steps]
    lines: list[str] = []
    for candidate in candidates:
        try:
            manifest = read_manifest(candidate)
            for name, record in manifest.files.items():
                if reason := check_file(candidate, name, record):
                    raise Damaged(reason)
            return candidate, manifest, lines
        except Damaged as error:
            lines.append(f"warning: bad checkpoint {candidate}: {error}")
    reasons = "".join(f"\n  {line}" for line in lines)
    raise UserError(f"{path} is neither a checkpoint nor a run directory with a good one{reasons}")


def config_of(manifest: Manifest, overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """The run's configuration, from its checkpoint, with overrides applied, and lines about its precision."""
    config = config_from_values(manifest.config, overrides, where="configuration of the checkpoint")
    return with_precision(config, bf16_of(torch.device("cpu")), manifest.config["parallel"].get("precision"))


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as a model, with its template and, where they can be read, its data."""

    trained: TrainedModel
    template: Template
    data: PreparedData | None
    no_data: str  # why `data` is None
    notes: list[str]  # about the data, for the user
    trial: TokenizedComparisons  # comparisons for the self-test and for the check of the export
    adapted: Sequence[Adapted]  # the layers that LoRA trained; empty without LoRA
    base_weights: BaseWeights | None  # with export.adapter


def load(config: Config, checkpoint: Path, manifest: Manifest) -> Loaded:
    """The model of a checkpoint on the CPU.

    Raises UserError if the checkpoint does not fit the base model's files, or the texts have other token ids now.
    """
    tokenizer = load_tokenizer(config)
    template = template_of(config, tokenizer)
    hf_config = load_model_config(config.model)
    positions = position_limit(hf_config)
    data, no_data = None, ""
    try:
        data = prepare_data(config, tokenizer, positions)
    except UserError as error:
        no_data = str(error)
        notes = [
            f"note: checked on built-in texts: {no_data}",
            "note: without the train data, the tokenizer and the template are not compared with those of the training",
        ]
    else:
        fraction = manifest.config["data"]["eval_fraction"]
        as_trained = data
        if config.data.eval_fraction != fraction:  # --normalise and --calibrate may hold out other rows than the run
            changes: dict[str, Any] = {"data": config.data.model_copy(update={"eval_fraction": fraction})}
            changes["run"] = config.run.model_copy(update={"evals": 0})
            as_trained = prepare_data(config.model_copy(update=changes), tokenizer, positions)
        notes = compared_with_training(config, checkpoint, manifest, as_trained)
    # Every trained weight comes from the checkpoint. The base model's files are read only if they hold others.
    lora, seed = config.model.lora, config.run.seed
    some = lora.rank is not None or holds_others(hf_config, config.model)
    settled = Outputs.settled(config.model, hf_config)
    shape = settled if some else settled.model_copy(update={"init": "random", "head": "fresh"})
    pad = int(tokenizer.pad_token_id)
    hf_model: Any = load_model(shape, seed=seed, vocabulary=len(tokenizer), pad_token_id=pad)
    adapted = add_lora(text_model(hf_model), lora, seed) if lora.rank else []
    base_weights = None
    if adapted:
        Start(checkpoint, manifest).check_base(frozen_fingerprint(text_model(hf_model)))
        if config.export.adapter:
            base_weights = BaseWeights.of(text_model(hf_model), base_rows(config.model))
        store_base(text_model(hf_model), lora)
    head = empty_head(hf_model) if config.export.lm_head else None
    trained = TrainedModel(config, hf_model, tokenizer, torch.device("cpu"), head)
    read_weights(trained.model, checkpoint, manifest, config.run.weights)
    trial = (data.eval or data.train) if data else built_in(template, tokenizer, positions)
    trained.choose_path(trial)
    return Loaded(trained, template, data, no_data, notes, trial, adapted, base_weights)


def compared_with_training(config: Config, checkpoint: Path, manifest: Manifest, data: PreparedData) -> list[str]:
    """Raises UserError if the train data have other token ids now; with run.allow_changes=[data] it is a note."""
    now = data.train.fingerprint
    if now == manifest.data:
        return []
    changed = (
        f"the train data, the chat template or the tokenizer have changed since {checkpoint} was written (fingerprint "
        f"{manifest.data[:12]} then, {now[:12]} now)"
    )
    if allowed(config, "data.train"):
        return [f"note: {changed}"]
    raise UserError(
        f"{changed}, so the export may give texts other token ids than the training: bring the old ones back, or, if "
        "only the rows have changed, accept that with 'run.allow_changes=[data]'"
    )


def holds_others(hf_config: PretrainedConfig, model: ModelConfig) -> bool:
    """Whether the model has weights or stored buffers that are not trained."""
    if brings_code(hf_config, trust_remote_code=model.trust_remote_code):
        return True
    skeleton = train_text_only(model_on_meta(hf_config))
    return not all(p.requires_grad for p in skeleton.parameters()) or bool(stored_buffers(skeleton))


def read_weights(model: RewardModel, checkpoint: Path, manifest: Manifest, weights: str) -> None:
    """Fill every trained parameter from the checkpoint's files; `weights` is run.weights.

    Raises UserError if the names or sizes do not fit.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kind = "weight" if weights == "trained" else EMA
    if kind == EMA and not any(key.startswith(f"{EMA}/") for key in manifest.keys):
        raise UserError(f"{checkpoint} holds no moving average: export it with run.weights=trained")
    wanted = {f"{kind}/{name}": (0, parameter.detach().view(-1)) for name, parameter in trained.items()}
    if unknown := {key for key in manifest.keys if key.startswith(f"{kind}/")} - {f"{kind}/{LM_HEAD}"} - set(wanted):
        raise UserError(f"{checkpoint} holds {min(unknown)}, which this model does not have: is it the same model?")
    try:
        read_slices([checkpoint / name for name in sorted(manifest.files)], wanted)
    except Damaged as error:
        raise UserError(f"{checkpoint} does not fit this model: {error}") from None


def probe(loaded: Loaded) -> Probe:
    """The texts of the check and the engine's rewards for them, in the arithmetic of the training."""
    trained = loaded.trained
    with trained.autocast():
        logits = trained.config.export.lm_head
        return probe_of(trained.model, loaded.trial, trained.device, trained.share, trained.dtype, logits=logits)


def held_out_rewards(loaded: Loaded, option: str) -> tuple[TokenizedComparisons, np.ndarray]:
    """The held-out data and the rewards of all their answers, for the command line's `option`.

    Raises UserError if the run has no held-out data, or they cannot be read.
    """
    if loaded.data is None:
        raise UserError(f"{option} needs the run's held-out data: {loaded.no_data}")
    if loaded.data.eval is None:
        raise UserError(f"{option} needs held-out data: set data.eval_fraction=0.1, or data.eval.path")
    trained = loaded.trained
    with running_world() as world:
        if world.device != trained.device:
            trained.to(world.device)
            trained.choose_path(loaded.data.eval)
        evaluation = trained.evaluate(loaded.data.eval, world)
    trained.to(torch.device("cpu"))
    return loaded.data.eval, evaluation.rewards_A
