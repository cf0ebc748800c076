"""Trains a tiny policy by GRPO, in TRL's environment: python -m tests.peers.trl_client FOLDER STEPS COMPLETIONS.

Input: FOLDER/model, a reward model with its tokenizer.
Output: FOLDER/found.json with, for prompts as text and as turns, the completions, their rewards, the means that TRL
logs, and how far the policy's weights have moved.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

import rmcore

PROMPTS = [f"Question {n}?" for n in range(8)]


def train(folder: Path, kind: str, steps: int, completions: int) -> dict[str, Any]:
    """One run of GRPO."""
    prompts: list[Any] = PROMPTS if kind == "text" else [[{"role": "user", "content": text}] for text in PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **shape, **ids))
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    found: dict[str, Any] = {"rows": [], "rewards": []}
    reward = rmcore.load(folder / "model", precision="fp32").as_reward_function()

    def record(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        """A second reward function, of weight 0, sees what the first one sees."""
        found["rows"] += [{"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=True)]
        found["rewards"] += reward(prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    arguments = GRPOConfig(
        output_dir=str(folder / f"grpo-{kind}"), max_steps=steps, per_device_train_batch_size=completions,
        num_generations=4, max_completion_length=12, learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True,
        bf16=False, save_strategy="no", reward_weights=[1.0, 0.0], beta=0.0, seed=1, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=[reward, record],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    trainer.train()
    found["logged"] = [
        line["rewards/rmcore/mean"] for line in trainer.state.log_history if "rewards/rmcore/mean" in line
    ]
    after = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    found["moved"] = max(float((after[name].cpu() - before[name]).abs().max()) for name in before)
    return found


def main(directory: str, steps: str, completions: str) -> None:
    folder = Path(directory)
    runs = {kind: train(folder, kind, int(steps), int(completions)) for kind in ("text", "turns")}
    (folder / "found.json").write_text(json.dumps({"version": trl.__version__, "runs": runs}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
