"""Child of `rmcore.bench train` and `gpu`: runs TRL's RewardTrainer over one epoch, with the Python of its environment.

Input: settings as JSON, see train.py. Arm `default` recomputes activations, as TRL does by default; `best` does not;
`grouped` does not and draws rows of similar length together, for which TRL needs a length column that it does not make.
Output: one JSON line, as train_rmcore.py prints it.
Example: 256 pairs in 32 steps of 8, of which 28 count.

TRL's loop, collator and defaults are unchanged; a callback laps a clock after each step. With `random_weights` (see
gpu_trl.py) the model is built from its configuration, and the rows hold token ids. rmcore need not be installed in
TRL's environment, so this file imports nothing of it.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any


def load_measure() -> ModuleType:
    """Loads measure.py by its path, because rmcore need not be installed next to TRL."""
    spec = importlib.util.spec_from_file_location("measure", Path(__file__).with_name("measure.py"))
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load measure.py from {Path(__file__).parent}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments_of(settings: dict[str, Any]) -> Any:
    """TRL's RewardConfig: its defaults, except for batch, precision and the settings of the arm."""
    import torch
    from trl import RewardConfig

    grouped = {
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "length",
        "remove_unused_columns": False,
    }
    return RewardConfig(
        output_dir=tempfile.mkdtemp(prefix="rmcore-bench-trl-"),
        per_device_train_batch_size=settings["batch"] // settings.get("accumulate", 1),
        gradient_accumulation_steps=settings.get("accumulate", 1),
        learning_rate=1e-5,
        num_train_epochs=1,
        max_steps=settings.get("max_steps") or -1,
        max_length=1024,
        bf16=settings["precision"] == "bf16",
        gradient_checkpointing=settings["arm"] == "default",
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=42,
        model_init_kwargs=None if settings.get("random_weights") else {"dtype": "float32"},
        **(grouped if settings["arm"] == "grouped" else {}),
    )


def model_of(settings: dict[str, Any]) -> Any:
    """A directory for TRL to load, or a model of random weights on the device where it will be trained."""
    if not settings.get("random_weights"):
        return settings["model"]
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(settings["model"])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)


def main(settings: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.utils import logging
    from trl import RewardTrainer
    from trl import __version__ as trl_version

    measure = load_measure()
    torch.set_num_threads(settings["threads"])
    torch.backends.cuda.enable_cudnn_sdp(settings.get("cudnn", True))
    logging.set_verbosity_error()
    arm = settings["arm"]
    with open(settings["data"], encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][: settings.get("limit")]
    laps: list[dict[str, float]] = []

    class Stopwatch(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.clock = measure.Clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            laps.append(self.clock.lap())

    trainer = RewardTrainer(
        model=model_of(settings),
        args=arguments_of(settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        callbacks=[Stopwatch()],
    )
    if arm == "grouped":
        trainer.train_dataset = trainer.train_dataset.map(
            lambda row: {"length": max(len(row["chosen_ids"]), len(row["rejected_ids"]))}
        )
    trainer.train()
    warm = min(settings.get("warm", 4), len(laps) - 1)
    kept, whole = measure.add_up(laps[warm:]), measure.add_up(laps)
    pairs = len(rows) / len(laps) if not settings.get("max_steps") else settings["batch"]
    measure.report(
        {
            "arm": f"trl {arm}",
            "trl": trl_version,
            "torch": torch.__version__,
            "steps": len(laps),
            "warm": warm,
            "pairs_per_s": pairs * (len(laps) - warm) / kept["wall_s"],
            "epoch_pairs_per_s": pairs * len(laps) / whole["wall_s"],
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
            **kept,
        }
    )


if __name__ == "__main__":
    sys.path.pop(0)  # the script's directory: its profile.py would hide the module of the standard library
    main(json.loads(sys.argv[-1]))
