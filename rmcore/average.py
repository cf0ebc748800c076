"""`rmcore average MODEL... -o DIR` averages the weights of reward models of one kind (WARM) into one model.

Input: two or more directories of reward models with the same architecture, tokenizer and score head, from runs on one
base model with other seeds, orders of the data or learning rates.
Output: a directory like those, with the mean of every weight, checked by reloading it.
Example: `rmcore average runs/a/model runs/b/model runs/c/model -o warm` prints "warm: the average of 3 models; rewards
reloaded by transformers differ by 2.4e-07 (allowed 1.0e-05)".

Ramé et al., arXiv 2401.12187: the average is about as good as an ensemble of the models, more robust to wrong labels,
and costs as much as one model. The mean is taken in fp64 and written in the dtype of the models, file by file.
"""

import argparse
import sys

from rmcore.host.command import run_command
from rmcore.host.terminal import print_text


def main(argv: list[str]) -> int:
    """Exit codes: 0 written, 1 the written model is not the average, 2 refused (models that differ, files)."""
    parser = argparse.ArgumentParser(
        prog="rmcore average",
        description="Average the weights of reward models of one architecture (WARM) and check the result.",
    )
    parser.add_argument("models", metavar="MODEL", nargs="+", help="directories of reward models, two or more")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="directory to write")
    given = parser.parse_args(argv)

    def work() -> None:
        from rmcore.hf_export.average import average

        for line in average(given.models, given.out):
            print_text(line)

    return run_command("rmcore average", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
