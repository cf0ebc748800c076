"""A reward function for verl that asks `rmcore serve`: reward.custom_reward_function.path=tests/peers/verl_reward.py.

Input: what verl's reward managers hand over. Output: the reward of the answer.
Example: the question "2+2?" in extra_info and the answer "4" -> {"rows": [{"prompt": "2+2?", "answer": "4"}]} is posted
to /rewards, and 1.25 is returned.
"""

from typing import Any

import aiohttp


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any],
    reward_router_address: str,
    reward_model_tokenizer: Any = None,
) -> float:
    rows = [{"prompt": extra_info["question"], "answer": solution_str}]
    url = f"http://{reward_router_address}/rewards"
    async with aiohttp.ClientSession() as session, session.post(url, json={"rows": rows}) as response:
        response.raise_for_status()
        return (await response.json())["rows"][0]["reward"]
