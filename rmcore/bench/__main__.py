"""`python -m rmcore.bench COMMAND ...` runs a benchmark.

Input: the name of a benchmark and its options.
Output: results on the screen, and one JSON file in rmcore/bench/results.
Example: `python -m rmcore.bench train --model DIR --data rows.jsonl --peers VENV`; then `python -m rmcore.bench tables`
prints the results files as Markdown.
"""

import sys
from importlib import import_module

COMMANDS = {
    "prepare": "write rows and models for the other commands, from a tokenizer and preference files",
    "kernels": "the ops' kernels, compared with eager PyTorch and torch.compile",
    "train": "training, compared with TRL's RewardTrainer",
    "curves": "what is learned with weights and averages stored in fewer bits, compared with fp32",
    "scaling": "weak scaling: 2 ranks of one thread, compared with 1",
    "score": "scoring, compared with transformers' padded forward",
    "serve": "the HTTP service: many clients at once, compared with one",
    "data": "preparing and planning data, compared with datasets.map and TRL",
    "models": "every decoder of the installed transformers: its path, and whether it can be exported",
    "gpu": "one GPU: exactness, ceilings, training rates compared with a padded loop and TRL",
    "nullgpu": "a GPU that does nothing: waits, launches, memory and graphs of a step, without a GPU",
    "profile": "the time of a training step by kind of work and by operation",
    "checkpoint": "saving and loading 500 MB, compared with dd on the same disk",
    "scale": "a billion pairs on 1,024 ranks, extrapolated: start, order, balance",
    "memory": "peak memory of each rank while a large model is loaded, trained and exported",
    "plan": "predictions of `rmcore plan`, compared with measurements",
    "tables": "print the results files as Markdown tables",
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m rmcore.bench COMMAND [arguments]\n")
        print("\n".join(f"  {name:<10} {meaning}" for name, meaning in COMMANDS.items()))
        print("\n`COMMAND --help` explains what is measured, with what it is compared, and what a ratio means.")
        return 0
    if arguments[0] not in COMMANDS:
        print(f"rmcore.bench: unknown command `{arguments[0]}`; known are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return import_module(f"rmcore.bench.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
