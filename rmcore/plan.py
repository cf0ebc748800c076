"""`rmcore plan CONFIG [--gpus N] [--gpu h100] [--json] [key=value ...]`: predicts what a run takes before it starts.

Input: a configuration; no weights are read.
Output: memory per rank by part, the largest token budget and the recompute, steps, tokens before and after sharing,
FLOPs, hours at an assumed MFU, bytes sent by link and whether compute hides them, disk per checkpoint, the cheapest
strategy that fits, and a table over 1, 8, 64 and 512 GPUs. Every assumption is printed.
Example: `rmcore plan configs/hh.yaml --gpus 8 --gpu h100 --pairs 112000 --tokens-a-pair 227`.

Exit codes: 0 done, 2 refused (config, flags, a model whose config cannot be found).
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rmcore.config import Config, UserError, config_from_argv
from rmcore.host.command import run_command
from rmcore.host.terminal import print_text

if TYPE_CHECKING:
    from rmcore.cost.data_size import Comparisons
    from rmcore.cost.run_cost import RunEstimate

ABOUT = """Predicts what a run takes before it starts: memory, time, disk, communication. Reads no weights. Options:
  --gpus N             ranks (1)
  --gpu NAME           rtx4090, l40s, a100, a100-40gb, h100 (default), h200, or cpu: its rates are measured
  --nodes M            hosts; default: 8 GPUs per host
  --mfu X              share of the peak that the run reaches (GPU 0.4; cpu 1, because its rate is measured)
  --rate TFLOPS        the device's peak in the config's precision; default: the data sheet, or for a cpu a measurement
  --pairs N            pairs of the training data
  --tokens-a-pair T    mean of the tokens that are computed per pair; with both flags the data are not read
  --sharing R          tokens in both texts per computed token, for --tokens-a-pair (1.58, as in hh-rlhf)
  --model-config FILE  a config.json that replaces the model's own
  --json               print one JSON object and nothing else"""


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 refused."""
    options, rest = _parser().parse_known_args(argv)
    config = config_from_argv(rest, "rmcore plan", ABOUT)

    def work() -> None:
        from rmcore.cost.report import as_dict, as_lines

        run = _estimate(config, options)
        print_text(json.dumps(as_dict(run)) if options.json else "\n".join(as_lines(run)))

    return run_command("rmcore plan", work)


def estimate_for(config: Config, flags: list[str]) -> RunEstimate:
    """The prediction for a config with the command's flags. Raises UserError."""
    return _estimate(config, _parser().parse_args(flags))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rmcore plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--mfu", type=float)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--tokens-a-pair", type=float)
    parser.add_argument("--sharing", type=float)
    parser.add_argument("--model-config")
    parser.add_argument("--json", action="store_true")
    return parser


def _estimate(config: Config, options: argparse.Namespace) -> RunEstimate:
    from rmcore.cost.run_cost import estimate_run
    from rmcore.training.run_data import prepared

    _check(options)
    if options.gpu == "cpu":  # the memory of this process is part of the prediction: import what a run imports
        import rmcore.training.assembly  # noqa: F401
        from rmcore.ops.blockwise import functional

        if (config.optim.states == "int8" or config.model.lora.base in ("int8", "nf4")) and find_spec("bitsandbytes"):
            functional()

    def comparisons(config: Config) -> Comparisons:
        data = prepared(config)[1]
        return data.train, *data.evals.values()

    return estimate_run(config, options, prepare=comparisons)


def _check(options: argparse.Namespace) -> None:
    """Raises one UserError that lists every flag out of range."""
    from rmcore.cost.machines import NAMES

    wrong = [
        f"--{name.replace('_', '-')} must be more than 0"
        for name in ("gpus", "nodes", "mfu", "rate", "pairs", "tokens_a_pair")
        if getattr(options, name) is not None and getattr(options, name) <= 0
    ]
    if options.mfu is not None and options.mfu > 1:
        wrong.append("--mfu is a share: at most 1")
    if options.sharing is not None and not 1 <= options.sharing <= 2:
        wrong.append("--sharing must be between 1 (nothing shared) and 2 (a pair that is all prompt)")
    if options.gpu not in NAMES:
        wrong.append(f"--gpu {options.gpu} is unknown; known are {', '.join(NAMES)}")
    if options.nodes and options.gpus % options.nodes:
        wrong.append(f"--gpus {options.gpus} do not divide into --nodes {options.nodes} hosts")
    if wrong:
        raise UserError("; ".join(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
