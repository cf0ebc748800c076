"""Rewrites reward models of other trainers as plain directories.

Input: a directory or hub id with a causal decoder and a linear head: TRL and LLaMA-Factory (v_head, also in
value_head.safetensors or .bin), OpenRLHF (value_head or score; mean and std in config.json), XTuner (v_head), safe-rlhf
(score_head and normalizer), UltraRM (regression_head), GRM's linear form, and adapters of peft, with the head in
modules_to_save or in a file of its own. Output: the directory of rmcore/hf_export/directory.py, checked by reloading.
Example: convert("lf-rm", "rm") on LLaMA-Factory's files reads v_head.summary.weight [1, 4096] and v_head.summary.bias
0.25, writes score.weight, and stores the bias as {"logit_mean": -0.25, "logit_sigma": 1.0} in config.json.

The formula of all these heads is reward = (w h + b - mean) / std, where h is the last hidden state at the last token of
the text. w becomes score.weight; b, mean and std become the directory's normalisation, so that raw rewards differ from
the original ones by a shift and a scale, which change no ranking, and `--normalise` gives the original ones. Dropout of
a head acts in its training only.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import cached_file

from rmcore.config import Config, UserError, config_from_values
from rmcore.data.tokens.templates import Template, template_of
from rmcore.data.tokens.tokenizer import fix_padding, load_tokenizer
from rmcore.evaluation.trained import TrainedModel
from rmcore.hf_export.card import converted_card
from rmcore.hf_export.directory import Package, export_model
from rmcore.hf_export.parity import PROBE_TURNS, probe_text
from rmcore.hf_export.probe import built_in, probe_of
from rmcore.hf_export.weights import SHARD_SIZE, check_shard_size
from rmcore.host.model_directory import indexed_files, is_own_adapter, refuse_lfs_pointer, refuse_missing_directory
from rmcore.model.backbone import load_model, load_model_config, position_limit
from rmcore.model.classifier import is_made, towers
from rmcore.model.found_weights import HEAD_FILES, OTHER_HEAD
from rmcore.scoring.normalisation import Normalisation

NORMALIZER = "normalizer."  # buffers of safe-rlhf; their values are in its config.json, too
EPSILON = 1e-8  # that safe-rlhf adds to the deviation
# Keys of other trainers in config.json, which have no meaning for the written directory.
FOREIGN_KEYS = (
    *("mean", "std", "normalize_reward", "value_head_prefix"),  # OpenRLHF
    *("var", "do_normalize", "normalizer_type", "score_type", "score_dim"),  # safe-rlhf
    *("vhead_layer_type", "vhead_num_neurons", "vhead_num_layers"),  # GRM
)


class Head(NamedTuple):
    """A linear head: its name in the checkpoint, weight [1, D] and bias."""

    name: str
    weight: Tensor
    bias: float


def convert(
    source: str, out: str, overrides: Sequence[str] = (), base: str | None = None, max_shard_size: str = SHARD_SIZE
) -> list[str]:
    """Write and check the directory `out`; returns lines about it.

    Args:
        base: the base model of an adapter, in place of the one that its adapter_config.json refers to.
    Raises:
        UserError: the model cannot be a plain directory with the same rewards, or its files cannot be read.
        ExportError: the written directory has other rewards.
    """
    check_shard_size(max_shard_size)
    refuse_missing_directory(source)
    if is_own_adapter(Path(source)):
        raise UserError(f"{source} is an adapter that rmcore exported: `rmcore export {source} -o {out}` merges it")
    adapter = Adapter.of(source, base)
    config = conversion_config(adapter.base if adapter else source, overrides)
    tokenizer = _tokenizer(source, config, adapter is not None)
    weights = Weights.of(source, adapter is not None)
    head = linear_head(source, weights)
    pad = int(tokenizer.pad_token_id)
    hf_model = load_model(config.model, seed=0, vocabulary=len(tokenizer), pad_token_id=pad)
    if adapter is not None:
        hf_model = adapter.merged_into(hf_model)
    score: Any = hf_model.score
    if head.weight.shape != score.weight.shape:
        raise UserError(
            f"{source}: {head.name} {list(head.weight.shape)} is not one linear layer {list(score.weight.shape)} "
            "from the last hidden state to a reward, so that no plain directory has its rewards"
        )
    with torch.no_grad():
        score.weight.copy_(head.weight)
    own_config = load_model_config(config.model) if adapter is None else PretrainedConfig()
    normalisation = normalisation_of(source, head.bias, own_config)
    hf_config = hf_model.config
    for key in FOREIGN_KEYS:
        vars(hf_config).pop(key, None)

    trained = TrainedModel(config, hf_model, tokenizer, torch.device("cpu"))
    template = template_of(config, tokenizer)
    lines = scored_token(source, template, tokenizer, own_config)
    positions = position_limit(hf_config)
    trial = built_in(template, tokenizer, positions)
    trained.choose_path(trial)
    probe = probe_of(trained.model, trial, trained.device, trained.share, trained.dtype)
    package = Package(
        model_class=type(hf_model),
        hf_config=hf_config,
        tokenizer=tokenizer,
        template=template,
        dtype=torch.bfloat16 if adapter is None and weights.dtypes == {torch.bfloat16} else torch.float32,
        card=converted_card(
            source, wants_text=template.wants_text, normalisation=normalisation, made=is_made(type(hf_model))
        ),
        config_yaml=_used_later(config, positions),
        normalisation=normalisation,
        max_shard_size=max_shard_size,
        towers=towers(hf_model),
        trust_remote_code=config.model.trust_remote_code,
    )
    state = trained.model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    parity = export_model(shapes, state.items(), package, out, probe)
    if normalisation is not None:
        lines.append(
            f"original reward = (score - {normalisation.mean:.6g}) / {normalisation.deviation:.6g}: config.json holds "
            "both numbers, and --normalise of rmcore score and serve applies them"
        )
    difference = f"differ by {parity.difference:.1e} (allowed {parity.allowed:.1e})"
    lines.append(f"{out}: {head.name} is its score head; rewards reloaded by transformers {difference}")
    return [*lines, *parity.notes]


def conversion_config(model: str, overrides: Sequence[str]) -> Config:
    """The config under which the decoder is read and the rewards are compared, in fp32."""
    values = {
        "data": {"template": "tokenizer", "train": {"path": "synthetic"}},
        "model": {"name": model},
        "parallel": {"precision": "fp32"},
        "run": {"evals": 0},
    }
    return config_from_values(values, list(overrides), where="command line")


def _used_later(config: Config, positions: int | None) -> str:
    """rmcore_config.yaml: what evaluation, scoring and serving read of it."""
    comment = (
        "# Written by rmcore convert. Only the template and the limits of data, and parallel.precision, are used.\n"
    )
    parallel = config.parallel.model_copy(update={"precision": "auto"})
    most = config.data.max_tokens if positions is None else min(config.data.max_tokens, positions)
    data = config.data.model_copy(update={"max_tokens": most})
    return comment + config.model_copy(update={"parallel": parallel, "data": data}).dump_yaml()


def _tokenizer(source: str, config: Config, adapter: bool) -> PreTrainedTokenizerFast:
    """The tokenizer next to an adapter, or else that of the model."""
    if not adapter or _file(source, "tokenizer_config.json") is None:
        return load_tokenizer(config)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise UserError(f"{source}: rmcore needs a fast tokenizer (a tokenizer.json) with an EOS token")
    fix_padding(tokenizer)
    return tokenizer


def _file(source: str, name: str) -> Path | None:
    """A file of a directory or of the hub, None if there is none. Raises UserError for a Git LFS pointer."""
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors")}
    found = cached_file(source, name, **quiet)
    if found is None:
        return None
    refuse_lfs_pointer(Path(found))
    return Path(found)


class Weights(NamedTuple):
    """Of the files of a model or adapter: the weights of its heads, and the dtypes of all weights."""

    heads: Mapping[str, Tensor]
    dtypes: set[torch.dtype]

    @classmethod
    def of(cls, source: str, adapter: bool) -> "Weights":
        """Read the files. Raises UserError if one cannot be read."""
        heads: dict[str, Tensor] = {}
        dtypes = set()
        for path in _weight_files(source, adapter):
            for name, tensor in _tensors(path):
                dtypes.add(tensor.dtype)
                short = name.removeprefix("base_model.model.").removeprefix("pretrained_model.")
                short = short.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
                if not OTHER_HEAD.match(short):
                    continue
                if short in heads and not torch.equal(heads[short], tensor.float()):
                    raise UserError(f"{source} holds two different {short}, one of them in {path.name}")
                heads[short] = tensor.float()
        return cls(heads, dtypes)


def _weight_files(source: str, adapter: bool) -> list[Path]:
    stem = "adapter_model" if adapter else "model"
    kinds = ([f"{stem}.safetensors"], [f"{stem}.bin" if adapter else "pytorch_model.bin"])
    files: list[Path] = []
    for [name] in kinds:
        index = _file(source, f"{name}.index.json")
        names = indexed_files(index) if index is not None else [name]
        files = [path for part in names if (path := _file(source, part)) is not None]
        if files:
            break
    if not files:
        raise UserError(f"{source} holds no weights: no {kinds[0][0]} and no {kinds[1][0]}")
    own = [path for name in HEAD_FILES if (path := _file(source, name)) is not None]
    return [*files, *own[:1]]  # of several, safetensors first, as LLaMA-Factory reads them


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a file, one after the other; of a .bin file, only what torch reads without running code."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                    yield name, file.get_tensor(name)
            return
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # both libraries raise many kinds for files that are not of theirs
        raise UserError(
            f"{path} cannot be read ({type(error).__name__}): {' '.join(str(error).split())[:200]}"
        ) from None
    yield from ((name, tensor) for name, tensor in loaded.items() if isinstance(tensor, Tensor))


def linear_head(source: str, weights: Weights) -> Head:
    """The one linear head of a checkpoint. Raises UserError if it has none, several, or one that is not linear."""
    found = {name: tensor for name, tensor in weights.heads.items() if not name.startswith(NORMALIZER)}
    names = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(found.items()))
    if not found:
        raise UserError(f"{source} holds no reward head: train one first (model.name={source})")
    matrices = [name for name, tensor in found.items() if tensor.ndim == 2 and tensor.shape[0] == 1]
    [name] = matrices if len(matrices) == 1 else [""]
    bias_name = f"{name.removesuffix('.weight')}.bias"
    bias = found.get(bias_name)
    if not name.endswith(".weight") or found.keys() - {name, bias_name} or (bias is not None and bias.numel() != 1):
        raise UserError(
            f"{source}: its head ({names}) is not one linear layer from the last hidden state to a reward, so that no "
            "plain directory has its rewards"
        )
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        raise UserError(f"{source}: NaN or Inf in its head ({names}): the file is damaged, or its training diverged")
    return Head(name, found[name], float(bias) if bias is not None else 0.0)


def normalisation_of(source: str, bias: float, hf_config: PretrainedConfig) -> Normalisation | None:
    """The bias and the stored mean and deviation as one normalisation; None if there is nothing to apply.

    OpenRLHF writes numbers `mean` and `std`, safe-rlhf lists `mean` and `var` that apply if `do_normalize` is set, to
    costs without the mean. Raises UserError if these are not a number and a positive deviation.
    """
    values = vars(hf_config)
    mean, deviation = 0.0, 1.0
    try:
        if "std" in values:
            mean, deviation = float(values["mean"]), float(values["std"])
        elif values.get("do_normalize"):
            [mean], [variance] = (
                map(float, values.get(key) or [default]) for key, default in (("mean", 0), ("var", 1))
            )
            deviation = math.sqrt(variance) + EPSILON
            mean = 0.0 if values.get("score_type") == "cost" else mean
    except (TypeError, ValueError, KeyError):
        deviation = math.nan
    if not (math.isfinite(mean) and math.isfinite(deviation) and deviation > 0):
        raise UserError(f"{source}: mean and std (or var) in its config.json are not a number and a positive deviation")
    return Normalisation(mean - bias, deviation) if (mean - bias, deviation) != (0.0, 1.0) else None


def scored_token(
    source: str, template: Template, tokenizer: PreTrainedTokenizerFast, hf_config: PretrainedConfig
) -> list[str]:
    """A line about the token at which the score is read, the last one of a text as the template writes it.

    Raises UserError if the model reads it at a token that the template does not write at the end: XTuner and InternLM
    append `reward_token_id` of config.json to every text.
    """
    texts = [text for turns in PROBE_TURNS if (text := probe_text(template, turns)) is not None]
    eos = str(tokenizer.eos_token)
    token = getattr(hf_config, "reward_token_id", None)
    appended = None if token is None else tokenizer.convert_ids_to_tokens(token)
    last = [tokenizer(text, add_special_tokens=False).input_ids[-1] for text in texts] or [tokenizer.eos_token_id]
    if appended is not None and last[0] != token:
        raise UserError(
            f"{source} reads its reward at the token {appended!r} (reward_token_id) behind the text, and a text of the "
            f"template ends with {tokenizer.convert_ids_to_tokens(last[0])!r}: append {appended!r} to the template "
            "(data.template=FILE.jinja)"
        )
    shown = repr(tokenizer.convert_ids_to_tokens(last[0]))
    if last[0] == tokenizer.eos_token_id or appended is not None:
        return [f"the score is read at the last token of a text, {shown}"]
    return [
        f"note: the score is read at the last token of a text, {shown} as the template writes it; OpenRLHF and "
        f"safe-rlhf append {eos!r} in training: if yours did, use a template that ends with it"
    ]


class Adapter(NamedTuple):
    """An adapter of peft and its base model."""

    source: str
    base: str

    @classmethod
    def of(cls, source: str, base: str | None) -> "Adapter | None":
        """The adapter at `source`, None if it is a whole model. Raises UserError for a wrong `base`."""
        path = _file(source, "adapter_config.json")
        if path is None:
            if base is not None:
                raise UserError(f"--base is for adapters, and {source} has no adapter_config.json")
            return None
        try:
            found = base or yaml.safe_load(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            found = None
        if not isinstance(found, str) or not found:
            raise UserError(f"{path} does not say which base model it belongs to: give it with --base")
        try:
            refuse_missing_directory(found)
        except UserError as error:
            raise UserError(f"{source} is an adapter, and its base model is not there: {error}; give --base") from None
        return cls(source, found)

    def merged_into(self, hf_model: PreTrainedModel) -> PreTrainedModel:
        """The base model with the adapter merged by peft. Raises UserError if they do not fit each other."""
        try:
            import peft
        except ImportError:
            raise UserError("merging an adapter needs the package peft: pip install 'rmcore[lora]'") from None
        settings = peft.PeftConfig.from_pretrained(self.source)
        kind = str(getattr(settings.peft_type, "value", settings.peft_type))
        settings.inference_mode = True
        settings.task_type = None  # peft's class of a task expects the model of this task, a generator for one
        try:
            adapted: Any = peft.get_peft_model(hf_model, settings)
            weights = peft.load_peft_weights(self.source, device="cpu")
            own = {name: tensor for name, tensor in weights.items() if not name.startswith(("v_head.", "value_head."))}
            result: Any = peft.set_peft_model_state_dict(adapted, own)
            unexpected = result.unexpected_keys
            merged = adapted.merge_and_unload()
        except UserError:
            raise
        except (
            Exception
        ) as error:  # peft raises many kinds for an adapter of another model or of a kind without merging
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.source}, an adapter of the kind {kind}, cannot be merged into {self.base} "
                f"({type(error).__name__}): {reason}"
            ) from None
        if unexpected:
            raise UserError(
                f"{self.source} holds weights that {self.base} has no place for, {min(unexpected)} among them: is it "
                "the right base model?"
            )
        return merged.eval()
