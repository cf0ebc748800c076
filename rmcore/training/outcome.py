"""How a run ended: one message, run_status.json, and the exit code.

Enters: whatever ends the body of a `with`. Leaves: the status file, and an `Ending` with the exit code.
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
from rmcore.host.files import write_text_atomically
from rmcore.parallel.world import LEAVING, SAVING
from rmcore.tracking.status import record_status
from rmcore.training.heartbeat import Pulse
from rmcore.training.signals import Signals, Stopped

DONE, FAILED, REFUSED, STOPPED = 0, 1, 2, 3  # exit codes


TOO_MUCH = "out_of_memory.json"  # in the run directory: the micro batch that did not fit


class Ending(Exception):
    """The run is over, and what there is to say has been said."""

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(f"exit code {code}")


@contextmanager
def recorded(run_dir: str, pulse: Pulse, signals: Signals) -> Iterator[None]:
    """Around a run that holds its directory: say and write what became of it; raises Ending for what was raised."""
    pulse.run_dir = run_dir
    try:
        yield
    except Stopped as stop:
        if pulse.is_main:
            step = stop.step or pulse.step  # 0: outside the loop, where nothing that counts is unsaved
            print(f"rmcore.train: {stop} at step {step}; the same command goes on from there", file=sys.stderr)
            record_status(run_dir, "preempted", step=step, episode=stop.episode, reason=str(stop))
        raise Ending(STOPPED) from None
    except Exception as error:
        signals.ignore()  # torchrun ends the others with SIGTERM as soon as one rank has left
        if isinstance(error, torch.OutOfMemoryError):
            write_text_atomically(Path(run_dir) / TOO_MUCH, json.dumps({"tokens": pulse.tokens}) + "\n")
        pulse.failed(error)
        raise Ending(REFUSED if isinstance(error, UserError) else FAILED) from error


def leave_process(code: int) -> NoReturn:
    """End this process with the exit code, also when threads of a failed group still wait for peers out of reach.

    Closing the interpreter would join gloo's threads, which wait out their timeout: an hour for a save.
    """
    waiting = [thread for thread in threading.enumerate() if thread.name in (LEAVING, SAVING) and thread.is_alive()]
    if waiting:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
