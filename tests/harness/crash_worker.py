"""A rank under a real torchrun, with faults planted: `-m tests.harness.crash_worker SETTINGS [arguments of
rmcore.train]`.

SETTINGS is JSON: the run directory, and the faults, which act only in the first attempt. Example of one:
{"point": "compute", "action": "kill", "rank": 1, "nth": 3}.
"""

import json
import os
import sys
from pathlib import Path

import rmcore.train
from rmcore.config import config_from_argv
from rmcore.training.outcome import leave_process
from tests.harness.crash import Fault, prepare

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    faults = [Fault(**fault) for fault in settings["faults"]] if attempt == 0 else []
    prepare(int(os.environ["RANK"]), faults, Path(settings["directory"]), attempt)
    place = [] if any(word.startswith("run.dir=") for word in sys.argv) else [f"run.dir={settings['directory']}"]
    config = config_from_argv([*sys.argv[2:], *place], "rmcore.train")
    leave_process(rmcore.train.main(config))
