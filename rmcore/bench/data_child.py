"""Child of `rmcore.bench data`: runs one arm in a process of its own, so that CPU time and memory belong to that arm.

Input: settings as JSON, see data.py.
Output: one JSON line.
Example: {"arm": "rmcore", "rows": "rows.jsonl", ...} -> {"kept": 25000, "cpu_s": 13.6, "peak_anonymous_mb": 348, ...}.

Arms: `rmcore` prepares rows into an empty cache on one core; `workers` does the same with a worker process per core.
The others use one core: `again` reads the cache that `rmcore` left; `map` is `datasets.map` with the same fast
tokenizer in batches; `trl` is TRL's own preparation; `plan` plans an epoch. Each arm imports what it needs. The arm
`trl` runs this file as a script, with the Python of TRL's environment, in which rmcore need not be installed.
"""

import importlib.util
import json
import os
import resource
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

EOS = "<|endoftext|>"
Work = Callable[[], dict[str, Any]]


def leave_own_folder() -> None:
    """Removes this folder, which Python adds for a script, from the search path: profile.py hides the library's."""
    sys.path[:] = [path for path in sys.path if not path or Path(path).resolve() != Path(__file__).resolve().parent]


def load_measure() -> Any:
    """Loads measure.py by its path, because rmcore need not be installed next to TRL."""
    spec: Any = importlib.util.spec_from_file_location("measure", Path(__file__).with_name("measure.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Memory:
    """The peak of this process's anonymous memory, without mapped files; sampled 50 times per second."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._sample()

    def _sample(self) -> None:
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:  # not Linux
            return
        kilobytes = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
        self.peak_mb = max(self.peak_mb, kilobytes / 1024)

    def stop(self) -> float:
        self._done.set()
        self._thread.join()
        self._sample()
        return self.peak_mb


def prepare_with_rmcore(settings: dict[str, Any]) -> Work:
    from rmcore.config import load_config
    from rmcore.data.prepare import prepare_data
    from rmcore.data.tokens.tokenizer import load_tokenizer
    from rmcore.host.cores import usable_cores

    workers = usable_cores() if settings["arm"] == "workers" else 1
    overrides = [
        f"model.name={settings['model']}",
        f"data.train.path={settings['rows']}",
        f"data.max_tokens={settings['max_tokens']}",
        f"data.cache={settings['cache']}",
        "data.template=none",
        f"data.workers={workers}",
        "run.evals=0",
    ]
    config = load_config(None, overrides)
    tokenizer = load_tokenizer(config)

    def work() -> dict[str, Any]:
        train = prepare_data(config, tokenizer, None).train
        return {"kept": len(train), "tokens": int(train.text_length_A.sum()), "workers": workers}

    return work


def prepare_with_map(settings: dict[str, Any]) -> Work:
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])

    def tokenise(batch: dict[str, Any]) -> dict[str, Any]:
        return {
            f"{side}_ids": tokenizer([text + EOS for text in batch[side]], add_special_tokens=False)["input_ids"]
            for side in ("chosen", "rejected")
        }

    def fits(batch: dict[str, Any]) -> list[bool]:
        longest = settings["max_tokens"]
        return [
            len(c) <= longest and len(r) <= longest
            for c, r in zip(batch["chosen_ids"], batch["rejected_ids"], strict=True)
        ]

    def work() -> dict[str, Any]:
        rows = datasets.load_dataset("json", data_files=settings["rows"], split="train", cache_dir=settings["cache"])
        rows = rows.map(tokenise, batched=True, remove_columns=["chosen", "rejected"])
        rows = rows.filter(fits, batched=True)
        return {"kept": len(rows)}

    return work


def prepare_with_trl(settings: dict[str, Any]) -> Work:
    import datasets
    import trl
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    arguments = types.SimpleNamespace(dataset_num_proc=None, max_length=settings["max_tokens"])

    def work() -> dict[str, Any]:
        rows = datasets.load_dataset("json", data_files=settings["rows"], split="train", cache_dir=settings["cache"])
        rows = trl.RewardTrainer._prepare_dataset(None, rows, tokenizer, arguments, "train")
        return {"kept": len(rows), "trl": trl.__version__}

    return work


def plan_an_epoch(settings: dict[str, Any]) -> Work:
    import numpy as np

    from rmcore.data.batches.step_plan import Plan, work

    rng = np.random.Generator(np.random.PCG64(0))
    pairs = settings["pairs"]
    tokens_N = np.clip(rng.lognormal(5.0, 0.7, pairs), 8, 2048).astype(np.int64)
    ones = np.ones(pairs, dtype=np.int64)

    def plan_steps() -> dict[str, Any]:
        plan = Plan(
            tokens_N, work(tokens_N), ones, ones.astype(np.float64), pairs_per_step=256, token_budget=16384,
            world_size=8, seed=1,
        )  # fmt: skip
        steps = range(plan.steps) if settings["every_step"] else range(0, plan.steps, max(1, plan.steps // 100))
        seen = sum(len(micro_batch) for index in steps for rank in plan.step(index).ranks for micro_batch in rank)
        return {"steps": plan.steps, "steps_cut": len(steps), "pairs_seen": seen}

    return plan_steps


ARMS = {
    "rmcore": prepare_with_rmcore,
    "workers": prepare_with_rmcore,
    "again": prepare_with_rmcore,
    "map": prepare_with_map,
    "trl": prepare_with_trl,
    "plan": plan_an_epoch,
}


def main(settings: dict[str, Any]) -> None:
    leave_own_folder()
    measure = load_measure()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    work = ARMS[settings["arm"]](settings)  # imports and loading the tokenizer are not measured
    if settings["arm"] != "workers" and hasattr(os, "sched_setaffinity"):  # threads would use a second core
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    memory, clock = Memory(), measure.Clock()
    record = work()
    lap, children = clock.lap(), resource.getrusage(resource.RUSAGE_CHILDREN)
    of_workers = children.ru_utime + children.ru_stime  # the clock takes it for the time of other programs
    lap["cpu_s"] += of_workers
    lap["others_cpu_s"] = max(0.0, lap["others_cpu_s"] - of_workers)
    lap = measure.add_up([lap])
    measure.report({**record, **lap, "peak_anonymous_mb": memory.stop()})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
