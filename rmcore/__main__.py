"""The console script `rmcore COMMAND ...` runs the module of that command.

Input: the command line. Output: the output and the exit code of the module.
Example: `rmcore train configs/hh.yaml optim.lr=1e-5` runs rmcore/train.py as `__main__`, with the two arguments.
"""

import difflib
import runpy
import sys

from rmcore import __version__
from rmcore.host.terminal import print_text

COMMANDS = {
    "train": "train a reward model: CONFIG [key=value ...]",
    "validate": "check config, data, tokenizer and template before a GPU hour is spent",
    "inspect": "the data doctor: rows kept and dropped, lengths, sharing, the first example",
    "prepare": "tokenise the data of a run ahead of time",
    "plan": "predict memory, steps, hours and disk of a run before it starts",
    "evaluate": "metrics and a report of a trained model on a data set",
    "score": "rewards for the rows of a file",
    "serve": "rewards over HTTP, for RL loops and best-of-n",
    "export": "write a Hugging Face directory from a checkpoint",
    "convert": "write a Hugging Face directory from a reward model of another trainer",
    "average": "average the weights of reward models (WARM)",
    "push": "push an exported model to the hub",
    "bench": "benchmarks against other libraries",
}
# inspect.py would shadow the module of the standard library when a file of this folder is run as a script.
MODULES = {"inspect": "inspect_data"}


def main() -> None:
    """Run a command. Exits with 2 if the command is unknown, else with the exit code of its module."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("--help", "-h"):
        print_text("usage: rmcore COMMAND [arguments]\n")
        print_text("\n".join(f"  {name:<10} {meaning}" for name, meaning in COMMANDS.items()))
        print_text("\nrmcore COMMAND --help shows the arguments of a command; rmcore --version shows the version")
        raise SystemExit(0)
    if command == "--version":
        print_text(f"rmcore {__version__}")
        raise SystemExit(0)
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        print_text(f"rmcore: unknown command `{command}`; {hint}", sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"rmcore {command}", *arguments]
    runpy.run_module(f"rmcore.{MODULES.get(command, command)}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
