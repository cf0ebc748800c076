"""A checkpoint as a model, and as a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmcore.checkpoint.manifest import Manifest
from rmcore.config import Config, UserError, config_from_values
from rmcore.data.prepare import PreparedData
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.data.tokens.templates import Template
from rmcore.model.lora import Adapted
from rmcore.model.reward_model import RewardModel
from rmcore.scoring.normalisation import Normalisation


def export(
    run: str, out: str, overrides: Sequence[str] = (), normalise: bool = False, max_shard_size: str = "5GB"
) -> list[str]:
    """Write and check the directory; lines about what was done. Raises UserError, ExportError."""
    import torch

    from rmcore.hf_export.card import model_card
    from rmcore.hf_export.directory import Package, export_model
    from rmcore.model.lora import merged

    checkpoint, manifest, lines = find_checkpoint(Path(run))
    config = config_of(manifest, overrides)
    loaded = load(config, checkpoint, manifest)
    if loaded.data is None:
        lines.append(f"note: checked on built-in texts: {loaded.lacking}")
    normalisation = measured(loaded, config) if normalise else None
    bf16 = config.parallel.precision == "bf16"
    package = Package(
        model_class=type(loaded.hf_model),
        hf_config=loaded.hf_model.config,
        tokenizer=loaded.tokenizer,
        template=loaded.template,
        dtype=torch.bfloat16 if bf16 else torch.float32,
        card=model_card(
            config,
            wants_text=loaded.template.wants_text,
            data=loaded.data.train if loaded.data else None,
            figures={name.removeprefix("eval/rm/"): value for name, value in (manifest.figures or {}).items()},
            normalisation=normalisation,
        ),
        config_yaml=config.dump_yaml(),
        normalisation=normalisation,
        max_shard_size=max_shard_size,
    )
    state = merged(loaded.model.state_dict(), loaded.adapted)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parity = export_model(shapes, state.items(), package, out, probe(loaded, config))
    if normalisation is not None:
        lines.append(f"held-out rewards: mean {normalisation.mean:.6g}, deviation {normalisation.deviation:.6g}")
    told = f"differ by {parity.difference:.1e} (allowed {parity.allowed:.1e})"
    return [*lines, f"{out}: step {manifest.step}; rewards reloaded by transformers {told}"]


def find_checkpoint(path: Path) -> tuple[Path, Manifest, list[str]]:
    """The checkpoint that is meant, every byte of it verified, and a line for each newer one that is damaged."""
    from rmcore.checkpoint import directory
    from rmcore.checkpoint.manifest import FILE, check_file, read_manifest
    from rmcore.checkpoint.shards import Damaged

    root = path / "checkpoints"
    candidates = [path] if (path / FILE).is_file() else [root / f"step-{step}" for step in directory.steps(root)]
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


def config_of(manifest: Manifest, overrides: Sequence[str]) -> Config:
    """The run's configuration, as its checkpoint holds it, with overrides on top."""
    return config_from_values(manifest.config, overrides, where="configuration of the checkpoint")


@dataclass(frozen=True)
class Loaded:
    """A checkpoint as a model, with its tokenizer, template and, where they can be read, its data."""

    model: RewardModel
    hf_model: Any
    tokenizer: Any
    template: Template
    data: PreparedData | None
    lacking: str  # why there are no data
    trial: TokenizedComparisons  # what the self-test and the check of the export look at
    share: bool
    adapted: Sequence[Adapted]  # the layers that LoRA trained, none without it


def load(config: Config, checkpoint: Path, manifest: Manifest) -> Loaded:
    """Raises UserError: base model's files or checkpoint do not fit each other."""
    from rmcore.checkpoint.resume import Start
    from rmcore.data.prepare import prepare_data
    from rmcore.data.tokens.templates import load_template
    from rmcore.data.tokens.tokenizer import load_tokenizer
    from rmcore.model.backbone import load_model, load_model_config
    from rmcore.model.lora import add_lora, frozen_fingerprint
    from rmcore.model.reward_model import SHARED, RewardModel
    from rmcore.model.selftest import choose_path, trial_comparisons

    tokenizer = load_tokenizer(config)
    template = load_template(config.data.template, tokenizer)
    positions = getattr(load_model_config(config.model), "max_position_embeddings", None)
    data, lacking = None, ""
    try:
        data = prepare_data(config, tokenizer, positions)
    except UserError as error:
        lacking = str(error)
    # Every weight comes from the checkpoint: the base model's would be read for nothing. Not so with LoRA.
    lora, seed = config.model.lora, config.run.seed
    shape = config.model if lora.rank else config.model.model_copy(update={"init": "random", "head": "fresh"})
    pad = int(tokenizer.pad_token_id)
    hf_model: Any = load_model(shape, seed=seed, vocabulary=len(tokenizer), pad_token_id=pad)
    adapted = add_lora(hf_model.base_model, lora, seed) if lora.rank else []
    if adapted:
        Start(checkpoint, manifest).check_base(frozen_fingerprint(hf_model.base_model))
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=pad).eval()
    read_weights(model, checkpoint, manifest)
    trial = (data.eval or data.train) if data else built_in(template, tokenizer, positions)
    path, _ = choose_path(model, trial, trial_comparisons(trial.tokens_N), config.model.attention)
    return Loaded(model, hf_model, tokenizer, template, data, lacking, trial, path == SHARED, adapted)


def read_weights(model: RewardModel, checkpoint: Path, manifest: Manifest) -> None:
    """Fill every parameter from the checkpoint's files. Raises UserError where the names or sizes do not fit."""
    from rmcore.checkpoint.shards import Damaged, read_slices

    wanted = {f"weight/{name}": (0, tensor.detach().view(-1)) for name, tensor in model.named_parameters()
              if tensor.requires_grad}  # fmt: skip
    if unknown := {key for key in manifest.keys if key.startswith("weight/")} - set(wanted):
        raise UserError(f"{checkpoint} holds {min(unknown)}, which this model has not: is it the same model?")
    try:
        read_slices([checkpoint / name for name in sorted(manifest.files)], wanted)
    except Damaged as error:
        raise UserError(f"{checkpoint} does not fit this model: {error}") from None


def built_in(template: Template, tokenizer: Any, positions: int | None) -> TokenizedComparisons:
    """Comparisons of texts of a few to some hundred words, written with the run's template."""
    from rmcore.data.tokens.tokenizer import TextEncoder
    from rmcore.scoring.rows import comparison_of, trial_rows
    from rmcore.scoring.scorer import pack

    encoder = TextEncoder(tokenizer)
    pairs = [template.render(comparison_of(row, template, where)[0])[1] for row, where in trial_rows()]
    return pack([[ids[:positions] for ids in encoder.encode(pair)] for pair in pairs])


def probe(loaded: Loaded, config: Config) -> Any:
    """The texts of the check and the engine's rewards for them, in the arithmetic of the training."""
    import torch

    from rmcore.hf_export.probe import probe_of

    bf16 = config.parallel.precision == "bf16"
    with torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext():
        precision = torch.bfloat16 if bf16 else torch.float32
        return probe_of(loaded.model, loaded.trial, torch.device("cpu"), loaded.share, precision)


def measured(loaded: Loaded, config: Config) -> Normalisation:
    """Of the rewards of all held-out answers. Raises UserError where there are none, or they cannot be read."""
    import torch

    from rmcore.evaluation.evaluate import evaluate
    from rmcore.evaluation.trained import ENOUGH_TOKENS
    from rmcore.parallel.world import running_world
    from rmcore.scoring.normalisation import measure

    if loaded.data is None:
        raise UserError(f"--normalise needs the run's held-out data: {loaded.lacking}")
    if loaded.data.eval is None:
        raise UserError("--normalise needs held-out data: set data.eval_fraction=0.1, or data.eval.path")

    def half() -> Any:
        bf16 = config.parallel.precision == "bf16"
        return torch.autocast("cpu", dtype=torch.bfloat16) if bf16 else nullcontext()

    with running_world() as world:
        found = evaluate(
            loaded.model.to(world.device),
            loaded.data.eval,
            world,
            token_budget=ENOUGH_TOKENS,
            share=loaded.share,
            autocast=half,
        )
    loaded.model.cpu()
    return measure(found.rewards_A)
