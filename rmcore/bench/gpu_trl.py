"""Runs TRL's RewardTrainer for `rmcore.bench gpu`, on the same random weights and rows of random tokens.

Input: a model's configuration, rows, the Python of an environment that has TRL.
Output: pairs per second and peak memory, as train_trl.py reports them.
Example: 64 pairs per step as 4 micro batches of 16, bf16, without recompute.

TRL accepts token ids as a prepared data set, so neither text nor the hub is needed.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from rmcore.bench.gpu_train import WARM, Rows
from rmcore.bench.measure import run_child

MEMORY_WORDS = ("OutOfMemoryError", "out of memory")  # in the error of a run that exceeds the memory


def python_with_trl(peers: str | None) -> str | None:
    """The Python of the environment `peers`, or this one if it has TRL; None without TRL."""
    if peers is not None:
        python = str(Path(peers, "bin", "python"))
        found = subprocess.run([python, "-c", "import trl, datasets"], capture_output=True).returncode == 0
        return python if found else None
    return sys.executable if all(importlib.util.find_spec(name) for name in ("trl", "datasets")) else None


def prepare(directory: Path, config: PretrainedConfig, rows: Rows) -> None:
    """Writes what TRL reads: config.json, a tokenizer with a padding token and few words, rows of token ids."""
    config.save_pretrained(directory)
    words = {"<pad>": 1, "<eos>": 0}
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<eos>")), pad_token="<pad>", eos_token="<eos>"
    )
    wrapped.save_pretrained(directory)
    comparisons = [rows.data.comparison(n) for n in range(len(rows.data))]
    texts = [[[*one.prefix.tolist(), *tail.tolist()] for tail in one.tails] for one in comparisons]
    lines = [json.dumps({"chosen_ids": chosen, "rejected_ids": rejected}) for chosen, rejected in texts]
    (directory / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def trl_run(
    python: str,
    config: PretrainedConfig,
    rows: Rows,
    *,
    arm: str,
    steps: int,
    pairs: int,
    threads: int,
    cudnn: bool = True,
    limit_s: float | None = None,
) -> dict[str, Any]:
    """`arm` as in train_trl.py; `cudnn`: PyTorch may choose cuDNN's attention; `limit_s`: seconds for each process.

    Micro batches are halved until they fit. Raises RuntimeError like `run_child`.
    """
    script = str(Path(__file__).with_name("train_trl.py"))
    with tempfile.TemporaryDirectory(prefix="rmcore-bench-") as name:
        prepare(Path(name), config, rows)
        settings = {
            "model": name,
            "data": str(Path(name, "rows.jsonl")),
            "random_weights": True,
            "arm": arm,
            "precision": "bf16",
            "batch": pairs,
            "threads": threads,
            "warm": WARM,
            "cudnn": cudnn,
            "max_steps": steps + WARM,
        }
        accumulate = 1
        while accumulate <= pairs:
            try:
                record = run_child([python, script], threads, settings | {"accumulate": accumulate}, limit_s)
                return record | {"pairs_at_once": pairs // accumulate}
            except RuntimeError as error:
                if not any(word in str(error) for word in MEMORY_WORDS):
                    raise
            accumulate *= 2
    return {"missing": "does not fit in the memory"}
