"""How a command ends: errors that are explained in a message, and their exit codes.

Input: a function that does the work of a command. Output: the exit code of the process, and on stderr one message in
place of a traceback.
Example: if `work` raises UserError("rows.jsonl: no such file"), `run_command("rmcore score", work)` prints "rmcore
score: rows.jsonl: no such file" and returns 2.

Any other exception is a bug in rmcore or a failure of the machine; it passes through with its traceback.
"""

import errno
import os
import sys
from collections.abc import Callable

from rmcore.host.terminal import discard_output, escape_what_cannot_be_encoded, print_text

INTERRUPTED = 130
LOST_OUTPUT = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO)


class ExplainedError(Exception):
    """A failure whose message tells the user everything: no traceback is printed.

    All ranks raise it alike, so rank 0 prints it, unless `only_this_rank` is set because no other rank knows of it.
    """

    exit_code = 1
    only_this_rank = False


class UserError(ExplainedError):
    """A mistake of the user: the message says what is wrong, where, and what to do."""

    exit_code = 2


def is_first_rank() -> bool:
    """Whether this process is rank 0 by torchrun's environment, or runs without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def run_command(prog: str, work: Callable[[], object]) -> int:
    """Do the work of a command and return its exit code: 0, 1 after an ExplainedError, 2 after a UserError.

    After Ctrl-C it is 130, as of a process that SIGINT ends in a shell. It is 1 if standard output cannot be written.
    """
    escape_what_cannot_be_encoded()
    try:
        work()
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a failure can still be explained
    except ExplainedError as error:
        if error.only_this_rank or is_first_rank():
            print_text(f"{prog}: {error}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if is_first_rank():
            print_text(f"{prog}: interrupted", sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if error.errno not in LOST_OUTPUT or error.filename is not None:
            raise
        discard_output()
        if error.errno != errno.EPIPE:  # the reader of a pipe may leave early, such as `head`
            print_text(f"{prog}: the output cannot be written: {error.strerror}", sys.stderr)
        return 1
    return 0
