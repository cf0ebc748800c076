"""`rmcore plan CONFIG --gpus N --gpu h100 [--nodes M] [--json] [key=value ...]`: what a run takes, before it starts.

In: a configuration. Out, without weights: memory a rank by part, the largest token budget and the recompute, steps,
tokens before and after sharing, FLOPs, hours at an assumed MFU, bytes sent by link and whether compute hides them, disk
a checkpoint, the cheapest strategy that fits, and a table over 1, 8, 64 and 512 GPUs. Whatever is assumed is said.

Example: `rmcore plan configs/hh.yaml --gpus 8 --gpu h100 --pairs 112000 --tokens-a-pair 227`. Exit codes: 0 planned, 2
refused (config, a model that cannot be had).
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from rmcore.config import Config, UserError, config_from_argv
from rmcore.host.command import run_command

if TYPE_CHECKING:
    from rmcore.cost.report import RunPlan

ABOUT = """What a run takes before it starts: memory, time, disk, communication. It reads no weights. Its options:
  --gpus N             ranks (1)
  --gpu NAME           a100, a100-40gb, h100 (default), h200, or cpu: its rate is measured
  --nodes M            hosts; default: 8 GPUs a host
  --mfu X              share of the peak that is reached (GPU 0.4; cpu 1: the rate is that of the model's products)
  --rate TFLOPS        the device's peak in the config's precision, in place of the data sheet's or of measuring
  --pairs N, --tokens-a-pair T   the data, where they cannot or need not be read (both: they are not); T: computed once
  --sharing R          tokens in both texts for each one computed, with the above (1.58, as hh-rlhf's)
  --model-config FILE  a config.json in place of the model's own
  --json               one JSON object and nothing else"""

MFU = {False: 0.4, True: 1.0}
GPUS_A_HOST, TABLE = 8, (1, 8, 64, 512)


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 2 refused."""
    options, rest = _parser().parse_known_args(argv)
    config = config_from_argv(rest, "rmcore plan", ABOUT)

    def work() -> None:
        found = _planned(config, options)
        from rmcore.cost.report import as_dict, lines

        print(json.dumps(as_dict(found)) if options.json else "\n".join(lines(found)))

    return run_command("rmcore plan", work)


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


def plan_of(config: Config, flags: list[str]) -> RunPlan:
    """The plan of a config with the command's flags. Raises UserError."""
    return _planned(config, _parser().parse_args(flags))


def _planned(config: Config, options: argparse.Namespace) -> RunPlan:
    _check(options)
    from rmcore.cost.run_cost import plan_run
    from rmcore.training.run_data import prepared

    if options.gpu == "cpu":
        import rmcore.training.assembly  # noqa: F401  (a rank on a CPU holds what a run imports: it is measured)

    return plan_run(config, options, lambda config: prepared(config)[1], MFU, GPUS_A_HOST, TABLE)


def _check(options: argparse.Namespace) -> None:
    """Raises UserError that lists every flag out of range."""
    from rmcore.cost.machines import NAMES

    wrong = [
        f"--{name.replace('_', '-')} must be more than 0"
        for name in ("gpus", "nodes", "mfu", "rate", "pairs", "tokens_a_pair")
        if getattr(options, name) is not None and getattr(options, name) <= 0
    ]
    if options.mfu is not None and options.mfu > 1:
        wrong.append("--mfu is a share: at most 1")
    if options.sharing is not None and not 1 <= options.sharing <= 2:
        wrong.append("--sharing lies between 1 (nothing shared) and 2 (a pair that is all prompt)")
    if options.gpu not in NAMES:
        wrong.append(f"--gpu {options.gpu} is not known; there are {', '.join(NAMES)}")
    if options.nodes and options.gpus % options.nodes:
        wrong.append(f"--gpus {options.gpus} do not divide into --nodes {options.nodes} hosts")
    if wrong:
        raise UserError("; ".join(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
