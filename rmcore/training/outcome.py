"""Records how a run ended: one message, run_status.json, and the exit code.

Input: the exception that ends the body of a `with`.
Output: the status file, and an `Ending` with the exit code.
Example: rank 3 raises ValueError at step 7 -> {"status": "failed", "step": 7, "reason": "rank 3 of 8 failed at step 7,
phase compute: ..."}, exit code 1 on every rank, one traceback on rank 0's console.
"""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from rmcore.config import UserError
from rmcore.hf_export.upload import PushError
from rmcore.host.files import write_text_atomically
from rmcore.host.terminal import print_text
from rmcore.parallel.world import LEAVING, SAVING
from rmcore.tracking.status import record_status
from rmcore.training.heartbeat import Heartbeat
from rmcore.training.signals import Signals, Stopped

FAILED, REFUSED, STOPPED = 1, 2, 3  # exit codes; 0: done
OUT_OF_MEMORY_FILE = "out_of_memory.json"  # in the run directory: tokens of the micro batch that did not fit


class Ending(Exception):
    """The run is over, and its message is printed."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"exit code {code}")


@contextmanager
def recorded(run_dir: str, heartbeat: Heartbeat, signals: Signals) -> Iterator[None]:
    """Goes around a run that owns its directory. Prints and writes how it ended; raises Ending for any exception."""
    heartbeat.run_dir, signals.watch = run_dir, heartbeat.watch_after
    try:
        yield
    except Stopped as stop:
        if heartbeat.is_main:
            step = stop.step or heartbeat.step  # 0: the signal came outside the loop, where everything is saved
            if heartbeat.prints:
                print_text(f"rmcore.train: {stop} at step {step}; run the same command again to resume", sys.stderr)
            record_status(run_dir, "preempted", step=step, episode=stop.episode, reason=str(stop))
        raise Ending(STOPPED) from None
    except PushError as error:  # the run is completed, and its status stays
        if heartbeat.is_main and heartbeat.prints:
            print_text(f"rmcore.train: {error}", sys.stderr)
        raise Ending(FAILED) from error
    except Exception as error:
        signals.ignore()  # torchrun sends SIGTERM to the other ranks as soon as one rank has left
        if isinstance(error, torch.OutOfMemoryError):
            path = Path(run_dir) / OUT_OF_MEMORY_FILE
            write_text_atomically(path, json.dumps({"tokens": heartbeat.tokens}) + "\n")
        heartbeat.failed(error)
        raise Ending(REFUSED if isinstance(error, UserError) else FAILED) from error


def leave_process(code: int) -> NoReturn:
    """End this process with the exit code, even if threads of a failed group still wait for unreachable ranks.

    A normal exit of the interpreter would join gloo's threads, which wait for their timeout: an hour for a save.
    """
    waiting = [thread for thread in threading.enumerate() if thread.name in (LEAVING, SAVING) and thread.is_alive()]
    if waiting:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
