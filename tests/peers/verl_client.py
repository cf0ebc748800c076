"""Runs verl's reward loop in its environment: python -m tests.peers.verl_client KIND ADDRESS MODEL COUNT.

Input: `model` (a discriminative reward model) or `function` (a reward function), HOST:PORT, the model's directory for
its tokenizer, and the size of a batch of rollouts.
Output: a JSON object on the last line: the prompts, the answers and their rewards, or the error; verl's version.
"""

import asyncio
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from verl.experimental.reward_loop.reward_loop import RewardLoopWorker
from verl.protocol import DataProto

PROMPT_TOKENS, ANSWER_TOKENS = 4, 40  # the widths of verl's padded tensors


def worker(kind: str, address: str, model: str) -> Any:
    own = str(Path(__file__).with_name("verl_reward.py")) if kind == "function" else None
    config = {
        "actor_rollout_ref": {"model": {"path": model, "tokenizer_path": model}},
        "reward": {
            "reward_model": {"enable": True, "model_path": model, "rollout": {"name": "vllm"}},
            "custom_reward_function": {"path": own, "name": "compute_score"},
            "reward_manager": {"source": "register", "name": "naive"},
        },
    }
    return RewardLoopWorker(OmegaConf.create(config), address)


def rollouts(tokenizer: Any, questions: list[str], answers: list[str]) -> Any:
    """A batch as verl's rollout workers give it: padded responses, the raw prompts, the columns of the data."""
    count = len(questions)
    responses = torch.full((count, ANSWER_TOKENS), tokenizer.pad_token_id)
    mask = torch.ones(count, PROMPT_TOKENS + ANSWER_TOKENS, dtype=torch.int64)
    for place, answer in enumerate(answers):
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        responses[place, : len(ids)] = torch.tensor(ids)
        mask[place, PROMPT_TOKENS + len(ids) :] = 0
    columns: dict[str, list[Any]] = {
        "raw_prompt": [[{"role": "user", "content": question}] for question in questions],
        "data_source": ["questions"] * count,
        "reward_model": [{"ground_truth": ""}] * count,
        "extra_info": [{"question": question} for question in questions],
    }
    objects = {}
    for name, values in columns.items():
        objects[name] = np.empty(count, dtype=object)
        objects[name][:] = values
    return DataProto.from_dict(tensors={"responses": responses, "attention_mask": mask}, non_tensors=objects)


async def main(kind: str, address: str, model: str, count: str) -> None:
    made = worker(kind, address, model)
    questions = [f"Question {number}?" for number in range(int(count))]
    answers = [f"{number * 7 % 31} is the answer." for number in range(int(count))]
    found: dict[str, Any] = {"version": importlib.metadata.version("verl"), "prompts": questions, "answers": answers}
    try:
        batch = rollouts(made.input_tokenizer, questions, answers)
        found["rewards"] = [one["reward_score"] for one in await made.compute_score_batch(batch)]
    except Exception as error:
        found["error"] = f"{type(error).__name__} {getattr(error, 'status', error)}"
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
