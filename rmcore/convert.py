"""`rmcore convert DIR -o DIR` rewrites a reward model of another trainer as a plain Hugging Face directory.

Input: a directory or hub id of LLaMA-Factory, OpenRLHF, XTuner, TRL (value heads and adapters), safe-rlhf or the like.
Output: a directory that `AutoModelForSequenceClassification` and all commands of rmcore load.
Example: `rmcore convert lf-rm -o rm` prints "rm: v_head.summary.weight is its score head; rewards reloaded by
transformers differ by 1.2e-07 (allowed 1.0e-05)".

rmcore/hf_export/other_trainers.py describes what is read, and what is refused.
"""

import argparse
import sys

from rmcore.host.command import run_command
from rmcore.host.terminal import print_text


def main(argv: list[str]) -> int:
    """Exit codes: 0 written, 1 the written directory has other rewards, 2 refused (model, files)."""
    parser = argparse.ArgumentParser(
        prog="rmcore convert",
        description="Rewrite a reward model of another trainer (LLaMA-Factory, OpenRLHF, XTuner, TRL, safe-rlhf) as a "
        "plain Hugging Face directory, and check it by reloading it.",
    )
    parser.add_argument("model", metavar="DIR", help="directory or hub id: a decoder with a linear head, or an adapter")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="directory to write")
    parser.add_argument("--base", metavar="MODEL", help="base model of an adapter (default: as its config says)")
    parser.add_argument("--max-shard-size", default="5GB", help="largest safetensors file (default: 5GB)")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="data.template=..., data.max_tokens=..., ...")
    given = parser.parse_intermixed_args(argv)

    def work() -> None:
        from rmcore.hf_export.other_trainers import convert

        for line in convert(given.model, given.out, given.overrides, given.base, given.max_shard_size):
            print_text(line)

    return run_command("rmcore convert", work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
