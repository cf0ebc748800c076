"""Explains pydantic's findings to the user: the place, the dotted key, what is wrong, and what was probably meant.

Input: pydantic's ValidationError and the `Layers` that were checked. Output: pairs of a place and a text.
Example: `optim: {lrr: 1e-5}` on line 12 of configs/hh.yaml becomes
`configs/hh.yaml:12: optim.lrr: unknown key; did you mean optim.lr?`
"""

import difflib
from collections.abc import Iterator
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rmcore.config.help import keys_of, kind_of_field, section_class
from rmcore.config.layers import SOURCE_LISTS, KeyPath, Layers, Origin, dotted, plain_kind

# Keys of other trainers (TRL, open-instruct, OpenRLHF). configs/README.md has the table for readers.
ELSEWHERE = {
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.schedule",
    "warm_up_steps": "optim.warmup_steps",
    "min_lr_rate": "optim.min_lr_ratio",
    "adam_epsilon": "optim.eps",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "per_device_train_batch_size": "batch.pairs",
    "gradient_accumulation_steps": "batch.pairs",
    "train_batch_size": "batch.pairs",
    "micro_train_batch_size": "batch.tokens",
    "per_device_eval_batch_size": "batch.tokens",
    "model_name_or_path": "model.name",
    "base_model": "model.name",
    "pretrain": "model.name",
    "model_revision": "model.revision",
    "attn_implementation": "model.attention",
    "dataset_name": "data.train.path",
    "dataset": "data.train.path",
    "dataset_mixer": "data.train",
    "dataset_mixer_list": "data.train",
    "dataset_mixer_list_splits": "data.train.split",
    "dataset_eval_mixer": "data.eval.path",
    "dataset_mixer_eval_list": "data.eval.path",
    "dataset_local_cache_dir": "data.cache",
    "dataset_train_split": "data.train.split",
    "dataset_eval_split": "data.eval.split",
    "chat_template": "data.template",
    "max_length": "data.max_tokens",
    "max_token_length": "data.max_tokens",
    "max_prompt_token_length": "data.max_prompt_tokens",
    "sanity_check": "data.limit",
    "num_train_epochs": "run.epochs",
    "total_episodes": "run.max_steps",
    "num_evals": "run.evals",
    "metric_for_best_model": "run.best_metric",
    "load_best_model_at_end": "run.best_metric",
    "early_stopping_patience": "run.patience",
    "output_dir": "run.dir",
    "run_name": "run.dir",
    "exp_name": "run.dir",
    "save_steps": "run.save_every",
    "save_total_limit": "run.keep",
    "logging_steps": "log.every",
    "report_to": "log.wandb",
    "with_tracking": "log.wandb",
    "bf16": "parallel.precision",
    "mixed_precision": "parallel.precision",
    "gradient_checkpointing": "parallel.recompute",
    "zero_stage": "parallel.strategy",
    "push_to_hub": "hub.push",
    "hub_model_id": "hub.repo",
    "hf_repo_id": "hub.repo",
    "hf_entity": "hub.repo",
    "hf_repo_revision": "hub.revision",
}


def explain(error: ValidationError, schema: type[BaseModel], layers: Layers) -> Iterator[tuple[Origin | None, str]]:
    """Yield one (place, text) per mistake. A union counts as one mistake; a missing key may have no place."""
    seen: set[KeyPath] = set()
    findings = error.errors(include_url=False)
    for finding in findings:
        path, field, section = _resolve(finding["loc"], schema)
        is_reported = any(unread[: len(path)] == path for unread in layers.unread)
        if path in seen or is_reported or _follows_from_train(path, finding, findings):
            continue
        seen.add(path)
        name = display(path, layers)
        if finding["type"] == "extra_forbidden":
            yield layers.origin(path), f"{name}: unknown key{_meant(path, section, schema, layers)}"
        elif finding["type"] == "missing" and path == finding["loc"]:
            place, meaning = layers.origin(path), field.description if field else "a section"
            if path[:2] == ("data", "eval"):
                meaning = "set a data set, or (with one train source) set data.eval.split to another split of it"
            elif place and place.layer > 0:  # an override created the section, but the missing key is not its mistake
                place = None
            yield place, f"{name} is missing: {meaning}"
        elif finding["type"] == "conflict":
            key = tuple(int(part) if part.isdecimal() else part for part in finding["ctx"]["key"].split("."))
            yield layers.origin(key), finding["msg"]
        else:
            kind = kind_of_field(field) if field else "mapping of keys"
            origin = layers.origin(path)
            value = layers.get(path)
            shown = f"`{origin.text}`" if origin and origin.text is not None else _short(value)
            yield origin, f"{name}: expected {kind}, got {shown}{_hint(kind, value, name, origin)}"


def _resolve(loc: tuple[str | int, ...], schema: type[BaseModel]) -> tuple[KeyPath, FieldInfo | None, type[BaseModel]]:
    """pydantic's location without the names of union branches, its field, and the section that holds the field."""
    section, field, path = schema, None, ()  # type: tuple[type[BaseModel], FieldInfo | None, KeyPath]
    for part in loc:
        if field is not None and (inner := section_class(field.annotation)) is not None:
            if isinstance(part, int):
                path = (*path, part)
                continue
            section = inner
        elif field is not None:  # below a plain value: a key of a mapping, an item of a list, or a branch of a union
            return (*path, part) if get_origin(field.annotation) is dict else path, field, section
        path, field = (*path, part), section.model_fields.get(str(part))
        if field is None:
            break
    return path, field, section


def _follows_from_train(path: KeyPath, finding: ErrorDetails, findings: list[ErrorDetails]) -> bool:
    """Whether an eval source has no path only because the train source, which would supply it, is wrong."""
    train_is_wrong = any(other["loc"][:2] == ("data", "train") or other["loc"] == ("data",) for other in findings)
    return path[:2] == ("data", "eval") and path[3:] == ("path",) and finding["type"] == "missing" and train_is_wrong


def display(path: KeyPath, layers: Layers) -> str:
    """A dotted key as the user would write it: without an index if there is only one source."""
    if path[:2] in SOURCE_LISTS and len(path) > 2 and len(layers.get(path[:2]) or [0]) == 1:
        path = path[:2] + path[3:]
    return dotted(path)


def _meant(path: KeyPath, section: type[BaseModel], schema: type[BaseModel], layers: Layers) -> str:
    """`; did you mean ...?` with a key of the section, else a key of another section, else the list of known keys."""
    word, prefix = str(path[-1]), display(path[:-1], layers)
    near = difflib.get_close_matches(word, section.model_fields, n=1, cutoff=0.7)
    if near:
        return f"; did you mean {f'{prefix}.' if prefix else ''}{near[0]}?"
    if word in ELSEWHERE:
        return f"; did you mean {ELSEWHERE[word]}?"
    leaves = {key.name.split(".")[-1]: key.name for key in keys_of(schema)}
    if near := difflib.get_close_matches(word, leaves, n=1, cutoff=0.8):
        return f"; did you mean {leaves[near[0]]}?"
    return f"; known {'here' if prefix else 'sections'}: {', '.join(section.model_fields)}"


def _hint(kind: str, value: Any, name: str, origin: Origin | None) -> str:
    """Advice on a value of the wrong kind; empty if `expected ..., got ...` is enough."""
    choices = [choice for choice in kind.split(" | ") if " " not in choice]
    typed = (origin.text if origin else None) or ""
    quoted = f"'{name}=\"{typed}\"'" if origin and origin.layer else f'"{typed}"'
    textual = any(choice not in ("true", "false", "null", "number") for choice in choices)
    if isinstance(value, bool) and textual and typed:
        return f" (YAML reads it as {str(value).lower()}; quote it: {quoted})"
    if isinstance(value, int | float) and "text" in choices and typed:
        return f" (YAML reads it as a number; quote it: {quoted})"
    wanted = {"int", "float"} if "number" in kind else {"bool"} if "true" in choices else set()
    if isinstance(value, str) and plain_kind(value) in wanted:
        return " (remove the quotes)"
    if isinstance(value, float) and "whole number" in kind and value.is_integer() and abs(value) < 1e15:
        return f" (write {int(value)})"
    if isinstance(value, str) and name in [dotted(path) for path in SOURCE_LISTS]:
        return f" (write {name}.path)"
    near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def _short(value: Any) -> str:
    """A value for a message, cut to 60 characters."""
    if isinstance(value, dict):
        return "a mapping"
    text = "null" if value is None else f"`{value}`"
    return text if len(text) <= 60 else text[:56] + "...`"
