"""The schema: every key of a configuration, with its type, default, limits and meaning.

Input: plain values. Output: a frozen `Config`, or pydantic's list of mistakes. Example:
`Config.model_validate({"model": {"name": "m"}, "data": {"train": {"path": "p.jsonl"}}}).optim.lr == 3e-06`.

`--help`, the error messages and the JSON schema are all made from these classes; load.py reads files into them.
"""

import os
import re
from datetime import date
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic.config import JsonDict

from rmcore.config.export import ExportConfig
from rmcore.config.layers import TAG, plain_kind
from rmcore.config.lora import LoraConfig
from rmcore.config.loss import BESIDES, TRAITS, LossConfig
from rmcore.config.optim import OptimConfig
from rmcore.config.parallel import ParallelConfig
from rmcore.config.section import ImportPath, Section, conflict

Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]  # may begin with ~; shells expand it only in front


def _as_date(value: str) -> str:
    """The text of a date, as YYYY-MM-DD. Raises ValueError."""
    return date.fromisoformat(value).isoformat()


class ModelConfig(Section):
    """the language model that gets the score head"""

    name: PathText = Field(description="hub id or directory of the base model; `synthetic`: the embedded tiny model")
    revision: Text | None = Field(None, description="branch, tag or commit on the hub")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="pretrained weights, or random weights for the architecture in the model's config"
    )
    trust_remote_code: bool = Field(False, description="run Python code from the model repository")
    attention: Literal["auto", "shared", "packed", "padded", "alone"] = Field(
        "auto", description="shared computes each prompt once; auto: the fastest path that the self-test finds exact"
    )
    head: Literal["fresh", "stored"] = Field(
        "fresh", description="draw a new score head, or keep the one stored in a sequence-classification checkpoint"
    )
    outputs: list[Text] | None = Field(
        None, description="names of the score head's outputs: [helpfulness, verbosity]; null: reward, or those stored"
    )
    reward: Text | dict[str, float] | None = Field(
        None,
        description="the reward that everything else reads: an output, or weights of outputs {helpfulness: 0.65, ...}; "
        "null: the first output, or the stored one",
    )
    weights: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of the trained weights. bf16: half the memory; updates are rounded at random, without bias",
    )
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        outputs = self.outputs
        if outputs is not None and (not outputs or len(set(outputs)) < len(outputs)):
            raise conflict("model.outputs", "must have at least one name, and each only once")
        known = outputs if outputs is not None else None if self.head == "stored" else ["reward"]
        named = [self.reward] if isinstance(self.reward, str) else list(self.reward or ())
        if known is not None and (unknown := [name for name in named if name not in known]):
            raise conflict("model.reward", f"has {unknown[0]}, which is not one of model.outputs: {', '.join(known)}")
        if isinstance(self.reward, dict) and not any(self.reward.values()):
            raise conflict("model.reward", "must have a weight that is not 0")
        return self

    @property
    def rewarded(self) -> tuple[str, ...]:
        """The outputs of a fresh head that have weight in the reward."""
        if isinstance(self.reward, dict):
            return tuple(name for name, weight in self.reward.items() if weight)
        return (self.reward or (self.outputs or ["reward"])[0],)

    @property
    def trains_bf16(self) -> bool:
        """Whether the optimizer updates bf16 weights."""
        return self.weights == "bf16"


def _no_required_keys(schema: JsonDict) -> None:
    """Require no key of a source in the JSON schema, because an eval source may take its path from data.train."""
    schema.pop("required")


UNNAMED = "rm"  # the set of the evaluation data without a name: its metrics are eval/rm/accuracy, eval/rm/loss, ...
SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# The only split of a published evaluation set, so that its path is enough.
ONLY_SPLIT = {"allenai/reward-bench": "filtered", "allenai/reward-bench-2": "test"}


class SourceConfig(Section):
    """one data set"""

    model_config = ConfigDict(json_schema_extra=_no_required_keys)
    path: PathText = Field(description="hub id, file, directory, glob pattern, or `synthetic` (the embedded task)")
    name: Text | None = Field(None, description="configuration name of a hub data set")
    split: Text = Field("train", description="split to read; slices such as train[:10%] work")
    revision: Text | None = Field(None, description="branch, tag or commit on the hub")
    amount: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=100)] | None = Field(
        None, description="number of rows (a whole number) or share of all rows (0.5; 2.0: each row twice); null: all"
    )
    columns: dict[str, str] = Field(
        {}, description="rmcore's column names mapped to those in the data: {chosen: better, ...}"
    )
    keep: Text | None = Field(
        None,
        description="use only the rows for which this expression over their columns is true, such as "
        "'reward_margin > 0'; amount and data.limit count these rows",
    )
    format: ImportPath | None = Field(
        None, description="a function of yours that turns a row into one with rmcore's columns; null: they are detected"
    )
    set: Text | None = Field(
        None,
        description="for data.eval: evaluate this source apart, as eval/SET/accuracy, ...; sources may share a set",
    )

    loss: LossConfig | None = Field(
        None, description="the objective of this source, with the keys of the section loss; null: that section"
    )

    @model_serializer(mode="wrap")
    def _without_empty_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out null in later keys, and defaults of `loss`: checkpoints of versions without them must still fit."""
        later = ("set", "keep", "format", "loss")
        values = {key: value for key, value in handler(self).items() if key not in later or value is not None}
        return values | ({"loss": self.loss.changed()} if self.loss is not None else {})


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict | SourceConfig) else [] if value is None else value


def _one_or_many(schema: JsonDict) -> None:
    """Allow a source, a list of sources, or null in the JSON schema."""
    array: JsonDict = {"type": "array", "items": schema.pop("items")}
    schema.pop("type")
    schema["anyOf"] = [array["items"], array, {"type": "null"}]


Sources = Annotated[
    tuple[SourceConfig, ...], BeforeValidator(_as_list), Field(strict=False, json_schema_extra=_one_or_many)
]


def _with_path_of(train: Any, source: Any) -> Any:
    """Complete an eval source without a path by the path of the train source, unless both would be the same rows."""
    if not isinstance(source, dict) or not isinstance(train, dict) or "path" in source or "path" not in train:
        return source
    completed = {key: train[key] for key in ("path", "name", "revision", "columns") if key in train} | source
    split = SourceConfig.model_fields["split"].default
    rows = [(each.get("name"), each.get("revision"), each.get("split", split)) for each in (train, completed)]
    return completed if rows[0] != rows[1] else source


def _with_split(source: Any) -> Any:
    if isinstance(source, dict) and "split" not in source and source.get("path") in ONLY_SPLIT:
        return {**source, "split": ONLY_SPLIT[source["path"]]}
    return source


class DataConfig(Section):
    """the preference pairs"""

    train: Sources = Field(description="training data: one source or a list of sources, each with the keys below")
    eval: Sources = Field(
        (),
        description="evaluation data, like data.train; without a path: the data set of the only train source. "
        "RewardBench 1 and 2 are scored by their rules, too",
    )
    template: PathText = Field(
        "tokenizer",
        description="simple_concat_with_space, simple_concat_with_new_line, simple_chat, assistant_message_only, "
        "zephyr, tulu, tokenizer (its own template; tokenizer:NAME, one of several), a .jinja file, or none (texts "
        "unchanged, EOS appended)",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="variables of the chat template: {enable_thinking: false}; a row's own come first"
    )
    date: Annotated[Text, AfterValidator(_as_date)] | None = Field(
        None,
        description="YYYY-MM-DD, for chat templates that read the clock; null: the day on which the run began",
    )
    max_tokens: int = Field(1024, ge=1, description="longest prompt plus answer, in tokens")
    max_prompt_tokens: int | None = Field(None, ge=1, description="longest prompt, in tokens; null: no limit")
    length_policy: Literal["drop", "truncate_left"] = Field(
        "drop", description="rows that are too long: drop them, or cut the first tokens of the prompt"
    )
    group_by_prompt: bool = Field(
        False, description="merge the pairs of one prompt into one comparison, so that its prompt is computed once"
    )
    drop_repeated: bool = Field(False, description="drop rows that repeat an earlier row; they are counted in any case")
    drop_contradicted: bool = Field(
        False, description="drop rows that judge the same answers to a prompt differently; they are counted in any case"
    )
    limit: int | None = Field(
        None, ge=1, description="use at most this many rows of train and of eval; 100 is a sanity check"
    )
    shuffle: bool = Field(True, description="shuffle the rows in every epoch")
    eval_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of train held out for evaluation, by prompt; excludes sources of eval without a set",
    )
    cache: PathText | None = Field(
        None, description="directory for tokenised data; null: $RMCORE_CACHE or ~/.cache/rmcore"
    )

    workers: int | None = Field(
        None,
        ge=1,
        description="processes that tokenise large data; null: one per core that this process may use, at most 16; "
        "1: none besides the process itself",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        """Complete eval sources: the path by the data set of the only train source, the split if there is only one."""
        if isinstance(values, dict) and values.get("eval"):
            train, sources = _as_list(values.get("train")), _as_list(values["eval"])
            if isinstance(sources, list):
                if isinstance(train, list) and len(train) == 1:
                    sources = [_with_path_of(train[0], source) for source in sources]
                return {**values, "eval": [_with_split(source) for source in sources]}
        return values

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if not self.train:
            raise conflict("data.train", "needs at least one source")
        for number, source in enumerate(self.train):
            if source.set is not None:
                raise conflict(
                    f"data.train.{number}.set", "divides data.eval only; data.train mixes all of its sources"
                )
        for number, source in enumerate(self.eval):
            if source.set is not None and (not SET_NAME.fullmatch(source.set) or source.set == UNNAMED):
                raise conflict(
                    f"data.eval.{number}.set",
                    f"cannot be {source.set!r}: use letters, digits, _, - and ., and not {UNNAMED}, which is the name "
                    "of the sources without a set",
                )
        if self.eval_fraction > 0 and any(source.set is None for source in self.eval):
            raise conflict("data.eval_fraction", "and data.eval exclude each other, except for sources with a set")
        return self

    @property
    def eval_sets(self) -> dict[str, tuple[int, ...]]:
        """The names of the evaluation sets, each with the numbers of its sources in `eval`; `UNNAMED` comes first.

        That is the only set without sources of its own: if rows of `train` are held out.
        """
        names = [source.set or UNNAMED for source in self.eval]
        unnamed = [UNNAMED] if self.eval_fraction > 0 or UNNAMED in names else []
        return {
            name: tuple(number for number, other in enumerate(names) if other == name)
            for name in dict.fromkeys([*unnamed, *names])
        }


class BatchConfig(Section):
    """the size of a step and of a micro batch"""

    pairs: int = Field(
        64, ge=1, description="global batch: pairs per step, over all ranks (regression: scored answers)"
    )
    tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="token budget of a micro batch on one rank"
    )
    shrink: bool = Field(
        False, description="after a run ended out of memory: resume with 3/4 of the tokens that did not fit"
    )


class RunConfig(Section):
    """length, evaluation and checkpoints of the run"""

    dir: PathText = Field(
        "runs/default", description="run directory; with a config file, the default is runs/<name of the file>"
    )
    epochs: int = Field(1, ge=1, description="passes over the training data")
    max_steps: int | None = Field(None, ge=1, description="stop after this many steps; null: only epochs count")
    seed: int = Field(1, ge=0, lt=2**31, description="determines data order, score head and sampling")
    evals: int = Field(1, ge=0, description="number of evaluations, spread evenly, the last one at the end; 0: none")
    metrics: list[ImportPath] = Field(
        [], description="functions of yours that compute further metrics of each evaluation: [my.module:function]"
    )
    save_every: int | None = Field(None, ge=1, description="steps between checkpoints; null: no checkpoints by steps")
    save_minutes: float | None = Field(
        30.0,
        gt=0,
        description="minutes between checkpoints; null: none by time, and none at the end without save_every",
    )
    background_save: bool = Field(
        True,
        description="write checkpoints during training, from a copy in host memory (12 bytes per parameter, 16 with "
        "optim.ema)",
    )
    keep: int = Field(2, ge=1, description="number of newest checkpoints to keep")
    keep_best: int = Field(
        0, ge=0, description="number of further checkpoints to keep, the best by run.best_metric or else by accuracy"
    )
    best_metric: Text | None = Field(
        None,
        description="metric of the evaluations, such as eval/rm/accuracy, by which to choose the best checkpoint; that "
        "checkpoint is kept, and exported at the end; a metric of run.metrics needs an attribute `better`, more or "
        "less; null: export the last weights",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="end the run after this many evaluations in a row without a new best run.best_metric (default: "
        "accuracy), and export the best checkpoint",
    )
    resume: PathText = Field(
        "auto", description="auto (newest intact checkpoint, if any), never, or the path of a checkpoint"
    )
    allow_changes: list[Text] = Field(
        [], description="keys or sections that may differ from the checkpoint on resume: [data, run.seed]"
    )
    weights: Literal["trained", "ema"] = Field(
        "trained", description="which weights to evaluate and to export: the trained ones, or their average (optim.ema)"
    )
    max_bad_steps: int = Field(3, ge=1, description="end the run after this many NaN or Inf steps in a row")

    @property
    def exports_best(self) -> bool:
        """Whether the best checkpoint is exported, and not the last weights."""
        return self.best_metric is not None or self.patience is not None

    @property
    def kept_best(self) -> int:
        """Number of best checkpoints to keep; the one to export is among them."""
        return max(self.keep_best, int(self.exports_best))

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        for key in ("best_metric", "patience"):
            if getattr(self, key) is not None and self.evals == 0:
                raise conflict(f"run.{key}", "needs evaluations: run.evals is 0")
        if self.patience is not None and self.patience >= self.evals:
            raise conflict(
                "run.patience", f"of {self.patience} cannot end a run of {self.evals} evaluations: raise run.evals"
            )
        return self


class LogConfig(Section):
    """logs and reports"""

    every: int = Field(10, ge=1, description="steps between log lines")
    tensorboard: bool = Field(True, description="write TensorBoard events")
    wandb: bool = Field(False, description="log to Weights & Biases (extra: wandb)")
    trackio: bool = Field(False, description="log to Trackio (extra: trackio)")
    mlflow: bool = Field(False, description="log to MLflow, at MLFLOW_TRACKING_URI (extra: mlflow)")
    samples: int = Field(10, ge=0, description="rows in the table of samples at each evaluation")
    report: Literal["none", "html", "png"] = Field(
        "html", description="at the end write <run.dir>/report.html; png: also its pictures, in <run.dir>/plots"
    )


class HubConfig(Section):
    """upload of the exported model to the Hugging Face hub"""

    push: bool = Field(False, description="push the exported model at the end of the run")
    repo: Text | None = Field(None, description="user/name of the hub repository")
    revision: Text | None = Field(None, description="branch to push to; null: main")
    private: bool = Field(True, description="create the repository as private")

    @model_validator(mode="after")
    def _check(self) -> "HubConfig":
        if self.push and self.repo is None:
            raise conflict("hub.push", "needs hub.repo, the user/name to push to")
        return self


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts which layers.py would not read as text, and escapes unprintable characters."""

    def resolve(self, kind: type[yaml.Node], value: str, implicit: tuple[bool, bool]) -> str:
        if kind is yaml.ScalarNode and implicit[0] and plain_kind(value) != "str":
            return TAG + plain_kind(value)
        return str(super().resolve(kind, value, implicit))

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar(f"{TAG}str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


class Config(Section):
    """The configuration of a whole run."""

    model: ModelConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    run: RunConfig = RunConfig()
    log: LogConfig = LogConfig()
    export: ExportConfig = ExportConfig()
    hub: HubConfig = HubConfig()

    @model_validator(mode="after")
    def _check(self) -> "Config":
        for loss in self.losses:
            if self.data.group_by_prompt and ":" not in loss.name and TRAITS[loss.name].counts != "pairs":
                raise conflict(
                    "data.group_by_prompt",
                    f"merges rows of pairs, from which loss.name={loss.name} cannot make rankings or scores",
                )
        places = [("loss", self.loss)] if self.loss in self.losses else []
        places += [(f"data.train.{n}.loss", source.loss) for n, source in enumerate(self.data.train) if source.loss]
        for number, source in enumerate(self.data.eval):
            if source.loss is not None and source.loss not in self.losses:
                raise conflict(f"data.eval.{number}.loss", "must be the loss of a source of data.train, or be left out")
        known = self.model.outputs or (None if self.model.head == "stored" else ["reward"])
        for place, loss in places:
            if known is not None and (unknown := [name for name in loss.outputs if name not in known]):
                raise conflict(
                    f"{place}.output", f"has {unknown[0]}, which is not one of model.outputs: {', '.join(known)}"
                )
        if random := [name for name in self.untrained if name in self.model.rewarded]:
            default = " (by default the first output)" if self.model.reward is None else ""
            raise conflict(
                "model.reward",
                f"has weight on {', '.join(random)}{default}, which no loss trains: set it to outputs that loss.output "
                "lists",
            )
        for key in ("best_metric", "patience"):
            if getattr(self.run, key) is not None and not self.data.eval_sets:
                raise conflict(f"run.{key}", "needs evaluation data: set data.eval.path or data.eval_fraction")
        if self.model.weights == "bf16" and self.parallel.precision == "fp32":
            raise conflict("model.weights", "is bf16, which needs parallel.precision=bf16 or auto")
        if self.model.weights == "bf16" and self.model.lora.rank is not None:
            raise conflict("model.weights", "is bf16, but LoRA trains few weights: set model.lora.base=bf16 instead")
        if self.model.lora.base != "fp32" and self.parallel.offload:
            raise conflict("model.lora.base", "and parallel.offload exclude each other: this combination is untested")
        if self.export.adapter and self.model.lora.rank is None:
            raise conflict("export.adapter", "needs model.lora.rank, because only LoRA trains an adapter")
        if self.export.adapter and self.model.init == "random":
            raise conflict("export.adapter", "needs a base model on disk or on the hub: model.init=random has none")
        if self.model.lora.base != "fp32" and self.parallel.compile:
            raise conflict("model.lora.base", "and parallel.compile exclude each other: this combination is untested")
        for key, value in (
            ("parallel.fp8", self.parallel.fp8),
            ("parallel.context", self.parallel.context > 1),
            ("optim.ema", self.optim.ema is not None),
            ("loss.sft", bool(self.loss.sft)),
        ):
            if self.model.weights == "bf16" and value:
                raise conflict("model.weights", f"of bf16 and {key} exclude each other: this combination is untested")
        if self.run.weights == "ema" and self.optim.ema is None:
            raise conflict("run.weights", "of ema needs optim.ema, the decay of the average")
        if self.loss.sft and self.model.lora.rank is not None:
            raise conflict("loss.sft", "and model.lora exclude each other: this combination is untested")
        if self.parallel.context > 1 and self.model.attention in ("padded", "alone"):
            raise conflict("parallel.context", f"needs a packed row: model.attention cannot be {self.model.attention}")
        for key in ("sft", "router_aux"):
            if self.parallel.context > 1 and getattr(self.loss, key):
                raise conflict(
                    "parallel.context", f"and loss.{key} exclude each other: each rank sees only a part of a text"
                )
        if self.parallel.fp8 and self.model.lora.rank is not None:
            raise conflict("parallel.fp8", "and model.lora exclude each other: this combination is untested")
        if self.parallel.context > 1 and (self.losses != (self.loss,) or len(self.model.outputs or ()) > 1):
            raise conflict("parallel.context", "and several outputs or losses exclude each other: untested")
        for number, source in enumerate(self.data.train):
            for key in BESIDES:
                if source.loss is not None and getattr(source.loss, key) not in (0, getattr(self.loss, key)):
                    raise conflict(
                        f"data.train.{number}.loss.{key}", "belongs into the section loss: it is one for all data"
                    )
        if self.loss.router_aux and self.parallel.compile:
            raise conflict("loss.router_aux", "and parallel.compile exclude each other: this combination is untested")
        if self.export.lm_head and not self.loss.sft:
            raise conflict("export.lm_head", "needs loss.sft, which trains the language-model head")
        if self.export.adapter and not self.export.towers:
            raise conflict("export.towers", "is false, but an adapter belongs to its base model, which has the towers")
        return self

    def computes_with_copies(self, *, cuda: bool) -> bool:
        """Whether the model computes with bf16 copies of its fp32 weights (rmcore.parallel.half_copies): full training
        in bf16 on GPUs, under ddp and zero1."""
        parallel, model = self.parallel, self.model
        casts = cuda and parallel.bf16 and not parallel.traits.shards_weights and not parallel.fp8
        return casts and not model.trains_bf16 and model.lora.rank is None

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        """The different objectives of data.train, in its order; sources with equal settings share one."""
        losses: list[LossConfig] = []
        for loss in (source.loss or self.loss for source in self.data.train):
            losses += [loss] if loss not in losses else []
        return tuple(losses)

    @property
    def untrained(self) -> tuple[str, ...]:
        """The outputs of a fresh head that no loss trains; a loss without `output` trains those of the reward."""
        if self.model.head == "stored" or not self.losses:
            return ()
        trained = {name for loss in self.losses for name in loss.outputs or self.model.rewarded}
        return tuple(name for name in self.model.outputs or ["reward"] if name not in trained)

    def loss_number(self, own: LossConfig | None) -> int:
        """The number in `losses` of the objective of a source with the key `loss`: own; of several, -1 for none."""
        losses, loss = self.losses, own or self.loss
        return 0 if len(losses) == 1 else losses.index(loss) if loss in losses else -1

    @property
    def unit(self) -> str:
        """The unit of `batch.pairs`, in words."""
        return " and ".join(dict.fromkeys(loss.traits.unit for loss in self.losses))

    @property
    def attributes(self) -> tuple[str, ...]:
        """The attributes of answers that are read from the data, for all objectives."""
        return tuple(dict.fromkeys(name for loss in self.losses for name in loss.attributes))

    def dump_yaml(self) -> str:
        """The whole configuration as YAML, which `load_config` reads back into an equal `Config`."""
        values = self.model_dump(mode="json")
        for key in ("train", "eval"):  # write a single source as a mapping, without a list
            sources = values["data"][key]
            values["data"][key] = sources[0] if len(sources) == 1 else sources or None
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
