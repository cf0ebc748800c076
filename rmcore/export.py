"""`rmcore export RUN -o DIR` writes a Hugging Face directory from a checkpoint and checks it by reloading it.

Input: a run directory or one checkpoint, of any strategy and number of ranks; or an adapter that rmcore exported, which
is merged into its base model. Of a run directory it is the newest intact checkpoint, or the best one of a completed run
with run.best_metric or run.patience.
Output: the directory that rmcore/hf_export/directory.py describes, the same as at the end of a training.
Example: `rmcore export runs/hh/checkpoints/step-120 -o hh-120` prints "hh-120: step 120; rewards reloaded by
transformers differ by 2.4e-07 (allowed 1.0e-05)".

One process does the work; it needs memory for the weights only, not for the optimizer. The config and the tokenizer of
the base model are read from where the run read them (override: model.name=...). Its weights are read only after LoRA.
If the data of the run can still be read, they give the texts for the check and the counts for the model card, and must
have the token ids of the training.
`--normalise` measures mean and deviation of the rewards of all held-out answers and stores them
(rmcore/scoring/normalisation.py), `--calibrate` the temperature with which `rmcore score` and `rmcore serve` return
probabilities (rmcore/scoring/calibration.py).
"""

import argparse
import sys

from rmcore.host.command import run_command
from rmcore.host.terminal import print_text


def main(argv: list[str]) -> int:
    """Exit codes: 0 exported, 1 the export differs from the trained model, 2 refused (checkpoint, config, files)."""
    parser = argparse.ArgumentParser(
        prog="rmcore export",
        description="Write a Hugging Face directory from a checkpoint and check it by reloading it.",
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="run directory (its newest intact checkpoint; of a completed run with run.best_metric or run.patience the "
        "best one), one checkpoint, or an exported adapter",
    )
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="directory to write")
    parser.add_argument(
        "--normalise", action="store_true", help="store mean and deviation of the rewards of all held-out answers"
    )
    parser.add_argument(
        "--calibrate", action="store_true", help="fit and store a temperature on the held-out data, for probabilities"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest safetensors file (default: 5GB)")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="new places: model.name=..., data.train.path=..."
    )
    given = parser.parse_intermixed_args(argv)

    def work() -> None:
        from rmcore.hf_export.from_checkpoint import export

        lines = export(
            given.run, given.out, given.overrides, given.normalise, given.max_shard_size, calibrated=given.calibrate
        )
        for line in lines:
            print_text(line)

    return run_command("rmcore export", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
