"""`rmcore export RUN -o DIR`: a Hugging Face directory from a checkpoint, checked as at the end of a training.

In: a run directory (its newest good checkpoint) or one checkpoint, of any strategy and number of ranks. Out: what
rmcore/hf_export/directory.py describes. One process does it; it needs memory for the weights alone, not for the
optimizer.
Example: `rmcore export runs/hh/checkpoints/step-120 -o hh-120` prints "hh-120: step 120; rewards reloaded by
transformers differ by 2.4e-07 (allowed 1.0e-05)".

The base model's config and tokenizer are read where the run read them (override: model.name=...); its weights are not,
except after LoRA.
Where the data of the run can still be read, they give the texts of the check and the counts of the model card.
`--normalise` measures mean and deviation of the rewards of all held-out answers, and stores them (see
rmcore/scoring/normalisation.py).
"""

from __future__ import annotations

import argparse
import sys

from rmcore.config import UserError


def main(argv: list[str]) -> int:
    """Exit codes: 0 done, 1 the directory is not what was trained, 2 refused (checkpoint, config, files)."""
    parser = argparse.ArgumentParser(
        prog="rmcore export", description="A Hugging Face directory from a checkpoint, checked by reloading it."
    )
    parser.add_argument("run", metavar="RUN", help="run directory (its newest good checkpoint), or a checkpoint")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="the directory to write")
    parser.add_argument(
        "--normalise", action="store_true", help="store mean and deviation of the rewards of all held-out answers"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of one safetensors file (5GB)")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="where things are now: model.name=..., data.train.path=..."
    )
    given = parser.parse_intermixed_args(argv)
    from rmcore.hf_export.from_checkpoint import export
    from rmcore.hf_export.parity import ExportError

    try:
        for line in export(given.run, given.out, given.overrides, given.normalise, given.max_shard_size):
            print(line)
    except (UserError, ExportError) as error:
        print(f"rmcore export: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
