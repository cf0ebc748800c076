"""Computes rewards with TRL's own evaluation: python tests/harness/peer_trl.py MODEL ROWS, with a Python that has TRL.

Input: a model directory, and a JSON file of rows {"chosen": turns, "rejected": turns}. Output: a JSON object on the
last line of standard output: TRL's version, `rewards` [[chosen, rejected], ...] and TRL's metrics. This file uses
nothing of rmcore.

RewardTrainer loads the directory by its path, renders the rows with its chat template and tokenises them. `evaluate`
runs padded batches of 5 pairs; a hook reads their logits.
"""

import json
import sys
import tempfile

import trl
from datasets import Dataset
from trl import RewardConfig, RewardTrainer


def main(model: str, rows: str) -> None:
    with open(rows, encoding="utf-8") as file:
        data = Dataset.from_list(json.load(file))
    seen: list[list[float]] = []

    def look(_module, _arguments, output):  # type: ignore[no-untyped-def]
        chosen, rejected = output.logits[:, 0].float().chunk(2)  # as TRL's collator lays them out
        seen.extend([[float(a), float(b)] for a, b in zip(chosen, rejected, strict=True)])

    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(
            output_dir=folder,
            per_device_eval_batch_size=5,
            max_length=None,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_dropout=True,
            model_init_kwargs={"dtype": "float32"},
            dataloader_pin_memory=False,
        )
        trainer = RewardTrainer(model=model, args=config, train_dataset=data, eval_dataset=data)
        trainer.model.register_forward_hook(look)
        found = trainer.evaluate()
    metrics = {name: value for name, value in found.items() if isinstance(value, float)}
    print(json.dumps({"trl": trl.__version__, "rewards": seen, "metrics": metrics}))


if __name__ == "__main__":
    main(*sys.argv[1:])
