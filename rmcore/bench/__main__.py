"""`python -m rmcore.bench COMMAND ...`: the benchmarks, side by side with peers where those are installed.

Example: `python -m rmcore.bench train --model DIR --data rows.jsonl --peers VENV` -> one JSON file in
rmcore/bench/results, of which `python -m rmcore.bench tables` makes the README's tables.
"""

import sys
from importlib import import_module

COMMANDS = {
    "prepare": "rows and models for the other commands, from a tokenizer and preference files",
    "kernels": "the ops' kernels: rmcore, eager PyTorch and torch.compile in turn",
    "train": "training: rmcore and TRL's RewardTrainer in turn",
    "scaling": "weak scaling: 2 ranks of one thread against 1",
    "score": "scoring: rmcore and transformers' padded forward in turn",
    "serve": "the HTTP service: one client after another, and many at once",
    "data": "preparing and planning data: rmcore, datasets.map and TRL in turn",
    "gpu": "one GPU: exactness, ceilings, training rates",
    "profile": "where a training step goes: a table and a trace",
    "checkpoint": "saving and loading a state of 500 MB against the disk's own speed",
    "scale": "a billion pairs on 1,024 ranks: start, order, balance",
    "memory": "peak memory of each rank while a large model is loaded, trained and exported",
    "plan": "what `rmcore plan` foretells beside what is measured",
    "tables": "Markdown tables of the results",
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m rmcore.bench COMMAND [arguments]\n")
        print("\n".join(f"  {name:<10} {meaning}" for name, meaning in COMMANDS.items()))
        return 0
    if arguments[0] not in COMMANDS:
        print(f"rmcore.bench: unknown command `{arguments[0]}`; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return import_module(f"rmcore.bench.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
