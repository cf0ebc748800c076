"""Imports a function of the user by its name in the configuration.

Input: "package.module:function", and the key that holds it. Output: the function, or a UserError.
Example: `loss.name: losses:exponential` imports losses.py from the current directory, or from wherever Python finds it.

Nothing is imported when a configuration is checked, only when the function is needed: a model that was trained with it
loads, scores and exports without the module.
"""

import contextlib
import hashlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rmcore.host.command import UserError
from rmcore.host.terminal import one_line


def imported(name: str, key: str) -> Callable[..., Any]:
    """The function of "module:function". Raises UserError, with the key, if it cannot be imported or called.

    The current directory is searched last, because a console script does not have it on its search path.
    """
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
        place = f"{frames[-1].filename}:{frames[-1].lineno}: " if len(frames) > 1 else ""
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{key}={name}: the module {module_name} cannot be imported: {place}{reason}") from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise UserError(f"{key}={name}: the module {module_name} has no function {attribute}")
    return found


def source_hash(function: Callable[..., Any]) -> str:
    """A hash of the file that defines the function, so that what was made by another version of it is not reused.

    For a function of a notebook, the hash is of its own text; for one that is not written in Python, of its name.
    """
    text = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', '')}".encode()
    with contextlib.suppress(OSError, TypeError):
        path = inspect.getsourcefile(function)
        is_file = path is not None and Path(path).is_file()
        text += Path(str(path)).read_bytes() if is_file else inspect.getsource(function).encode()
    return hashlib.sha256(text).hexdigest()
