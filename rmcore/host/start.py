"""Checks the directory in which a command is started, before anything else is imported.

Input: the current directory and Python's search path. Output: nothing, or one message and exit code 2.
Example: with a folder `datasets` that holds an __init__.py in the current directory, `python -m rmcore.train` would
import it in place of the package: "rmcore: ./datasets/__init__.py hides the package datasets, which rmcore needs".

`python -m` puts the current directory in front of the search path. A folder without __init__.py hides nothing.
rmcore/__init__.py calls the check, because no other file of rmcore is imported before a library.
"""

import os
import sys
import traceback
from importlib.machinery import PathFinder
from types import TracebackType

# What rmcore and the libraries that it uses import.
PACKAGES = (
    *(
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "datasets",
        "numpy",
        "pyarrow",
        "pandas",
    ),
    *("pydantic", "pydantic_core", "yaml", "rich", "jinja2", "filelock", "fsspec", "regex", "requests", "httpx"),
    *("tqdm", "packaging", "xxhash", "sympy", "triton", "tensorboard", "matplotlib", "fastapi", "uvicorn", "wandb"),
    *("peft", "torchao", "prometheus_client", "zstandard", "aiohttp", "dill", "multiprocess", "anyio", "typer"),
)


def check_start() -> None:
    """Exit with 2 and a message if the current directory is gone, or hides a package that rmcore needs."""
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:
        _leave("the current directory does not exist any more: change to another one")
    others = [entry for entry in sys.path if os.path.realpath(entry or here) != here]
    if len(others) == len(sys.path):
        return
    for name in PACKAGES:
        origin = getattr(PathFinder.find_spec(name), "origin", None)
        if origin and _is_in(here, name, origin) and PathFinder.find_spec(name, others) is not None:
            _leave(_hidden(origin, f"the package {name}"))
    sys.excepthook = _explain


def _explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Explain an uncaught error if a file of the current directory was imported in place of the standard library's."""
    here = os.path.realpath(os.getcwd())
    for name in sys.stdlib_module_names & sys.modules.keys():
        origin = getattr(sys.modules[name], "__file__", None)
        if origin and _is_in(here, name, origin):
            _leave(_hidden(origin, f"{name} of the standard library"))
    traceback.print_exception(kind, error, trace)


def _is_in(folder: str, name: str, origin: str) -> bool:
    """Whether a module is a file of the folder, or a package right below it."""
    return os.path.dirname(os.path.realpath(origin)) in (folder, os.path.join(folder, name))


def _hidden(origin: str, what: str) -> str:
    return f"{os.path.relpath(origin)} hides {what}, which rmcore needs: rename it, or start in another directory"


def _leave(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"rmcore: {message}\n")  # names of files here; nothing else of rmcore is imported yet
        sys.stderr.flush()
    os._exit(2)
