"""`rmcore validate CONFIG [key=value ...] [--json]` checks everything that can be checked before a GPU hour is spent.

Input: a configuration. Output: one line per check, and exit code 0, or 2 if a check fails. The checks are: config,
tokenizer, model (only its config), template, data (every row is read, rendered and tokenised, and the run will find the
result in the cache), plan, export (the model with random weights is exported and reloaded, as at the end of a run), run
directory (writable, with room for checkpoints and export, and without a run of other settings or data). After a failed
check, all checks that do not depend on it still run.

Example:
    ok       tokenizer  PreTrainedTokenizerFast, 50277 tokens; padding token <|padding|> (id 1): the tokenizer's own
    failed   template   data.template: unknown name 'zephir' (did you mean zephyr?); known: ...
    skipped  data       needs the template
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rmcore.config import Config, UserError, config_from_argv
from rmcore.host.command import run_command
from rmcore.host.terminal import print_text

ABOUT = (
    "Check config, tokenizer, model, template and data before a run. --json prints one JSON object and nothing else."
)


@dataclass
class Check:
    """The result of one check; `status` is ok, warning, failed or skipped."""

    name: str
    status: str
    detail: str
    warnings: list[str] = field(default_factory=list)


class Checks:
    """Runs checks in order, passes on what they found, and skips a check if one that it needs has failed."""

    def __init__(self) -> None:
        self.done: list[Check] = []
        self.found: dict[str, Any] = {}

    def run(self, name: str, check: Callable[[], tuple[Any, str, list[str]]], needs: tuple[str, ...] = ()) -> None:
        """Run one check: `check()` returns (what it found, a line about it, warnings) or raises UserError."""
        missing = [need for need in needs if need not in self.found]
        if missing:
            self.done.append(Check(name, "skipped", f"needs the {' and the '.join(missing)}"))
            return
        try:
            self.found[name], detail, warnings = check()
        except UserError as error:
            self.done.append(Check(name, "failed", str(error)))
            return
        self.done.append(Check(name, "warning" if warnings else "ok", detail, warnings))

    @property
    def passed(self) -> bool:
        return all(check.status in ("ok", "warning") for check in self.done)


def check_all(config: Config) -> Checks:
    """Run every check on a configuration that has been read."""
    from rmcore.data.prepare import describe, prepare_data
    from rmcore.data.tokens.templates import template_of
    from rmcore.evaluation.criterion import Criterion, check_best_metric
    from rmcore.evaluation.own_metrics import check_functions
    from rmcore.model.backbone import position_limit
    from rmcore.tracking.data_progress import DataProgress

    checks = Checks()
    found = checks.found
    checks.run("config", lambda: _config(config))
    checks.run("tokenizer", lambda: _tokenizer(config))
    # Both come from the same directory: if it is missing, one message is enough.
    checks.run("model", lambda: _model(config), needs=("tokenizer",))
    checks.run("template", lambda: _template(template_of(config, found["tokenizer"])), ("tokenizer",))

    def data() -> tuple[Any, str, list[str]]:
        Criterion.of(config)
        check_functions(config)
        with DataProgress() as progress:
            positions = position_limit(found["model"]) if "model" in found else None
            prepared = prepare_data(config, found["tokenizer"], positions, progress)
        check_best_metric(config, prepared)
        warnings, prepared.warnings[:] = list(prepared.warnings), []
        return prepared, describe(prepared, config), warnings

    checks.run("data", data, needs=("tokenizer", "template"))
    checks.run("plan", lambda: _plan(config, found["data"].train), needs=("data",))
    checks.run("export", lambda: _export(found["config"], found["tokenizer"], found["data"]), needs=("model", "data"))
    checks.run("run.dir", lambda: _run_directory(config, found))
    return checks


def _config(config: Config) -> tuple[Any, str, list[str]]:
    """What the run trains on what, and its config with the precision that it would have on this machine."""
    import torch

    from rmcore.ops.blockwise import check_bitsandbytes
    from rmcore.parallel.precision import bf16_of, with_precision
    from rmcore.training.assembly import untrained_outputs

    if config.optim.states == "int8":
        check_bitsandbytes("optim.states=int8")
    data = ", ".join(source.path for source in config.data.train)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved, lines = with_precision(config, bf16_of(device))
    warnings = [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]
    warnings += [line.removeprefix("warning: ") for line in untrained_outputs(config)]
    notes = [f"\non this machine {line}" for line in lines if not line.startswith("warning: ")]
    return resolved, f"{config.model.name} on {data}{''.join(notes)}", warnings


def _tokenizer(config: Config) -> tuple[Any, str, list[str]]:
    from rmcore.data.tokens.tokenizer import load_tokenizer

    notes: list[str] = []
    tokenizer = load_tokenizer(config, notes.append)
    padding = notes[0] if notes else f"padding token {tokenizer.pad_token} (id {tokenizer.pad_token_id})"
    return tokenizer, f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens; {padding}", []


def _model(config: Config) -> tuple[Any, str, list[str]]:
    from rmcore.model.backbone import load_model_config, position_limit

    found = load_model_config(config.model)
    positions = position_limit(found)
    return found, f"{found.model_type}, " + (f"{positions:,} positions" if positions else "no limit of positions"), []


def _template(template: Any) -> tuple[Any, str, list[str]]:
    shown = "texts unchanged, EOS appended" if template.wants_text else f"{template.name} renders chat turns"
    return template, shown, []


def _plan(config: Config, train: Any) -> tuple[Any, str, list[str]]:
    from rmcore.data.batches.step_plan import Plan

    longest = int(train.tokens_N.max())
    budget = longest if config.batch.tokens == "auto" else config.batch.tokens
    plan = Plan.of(config, train, train.tokens_N, token_budget=budget, world_size=1)
    warnings = []
    if plan.steps < 10:
        warnings.append(f"only {plan.steps} steps: lower batch.pairs={config.batch.pairs}, or raise run.epochs")
    of = f"{config.batch.pairs} {config.unit}"
    shown = f"{plan.steps:,} steps of {of}; the longest comparison has {longest:,} tokens"
    return plan, shown, warnings


def _export(config: Config, tokenizer: Any, data: Any) -> tuple[Any, str, list[str]]:
    from rmcore.hf_export.rehearsal import rehearse

    sizes, line = rehearse(config, tokenizer, data.template, data.eval or data.train)
    return sizes, line, []


def _run_directory(config: Config, found: dict[str, Any]) -> tuple[Any, str, list[str]]:
    """Check that the directory, or its nearest existing parent, is writable, has room, and does not hold another run.

    Nothing is created.
    """
    from rmcore.checkpoint.resume import look_ahead
    from rmcore.training.run_directory import check_disk

    directory = Path(config.run.dir).absolute()
    existing = next(folder for folder in (directory, *directory.parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"run.dir={config.run.dir}: {existing} is a file, not a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={config.run.dir}: cannot write to {existing}")
    start = look_ahead(config)
    if not start.completed:
        data = found.get("data")
        if data is not None and data.template.date in (None, config.data.date):  # else the run keeps its own date
            start.check_data(config, data.train.fingerprint)
        if "plan" in found:
            start.check_steps(found["plan"].steps)
        if "export" in found:
            check_disk(config, found["export"])
    state = " (will be created)" if existing != directory else ""
    if start.checkpoint is not None:
        state = f"; the run continues at step {start.step} from {start.checkpoint}"
    if start.completed:
        state = "; the run in it is completed"
    return directory, f"{directory}{state}", []


def table(checks: list[Check]) -> str:
    """One line per check; further lines of its detail and its warnings follow below, indented."""
    lines = []
    for check in checks:
        first, *more = check.detail.split("\n")
        lines.append(f"{check.status:<8} {check.name:<10} {first}".rstrip())
        lines += [f"{'':<19} {line}" for line in more]
        lines += [f"{'':<19} warning: {line}" for line in check.warnings]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Exit codes: 0 all checks passed, perhaps with warnings; 2 at least one failed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--json", action="store_true")
    options, rest = parser.parse_known_args(argv)
    config = config_from_argv(rest, "rmcore validate", ABOUT)
    return run_command("rmcore validate", lambda: _print_checks(check_all(config), as_json=options.json))


def _print_checks(checks: Checks, *, as_json: bool) -> None:
    """Raises UserError if a check failed."""
    if as_json:
        print_text(json.dumps({"passed": checks.passed, "checks": [asdict(check) for check in checks.done]}))
    else:
        print_text(table(checks.done))
    if checks.passed:
        return
    failed = [check for check in checks.done if check.status == "failed"]
    shown = "\n".join(f"  {check.name}: {check.detail}" for check in failed)
    raise UserError(f"{len(failed)} of {len(checks.done)} checks failed:\n{shown}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
