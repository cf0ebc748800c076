"""Runs OpenRLHF's client in its environment: python -m tests.peers.openrlhf_client URL COUNT.

Input: the address of a remote reward model, and how many requests to make at once.
Output: a JSON object on the last line: the texts and their rewards (null: none), OpenRLHF's version.

The package's __init__ files import deepspeed, so that the two modules of the client are imported without them. What
generates (vLLM) is replaced by a function that returns given tokens, and the tokenizer by one token per byte.
"""

import asyncio
import importlib.metadata
import importlib.util
import json
import sys
import types
from typing import Any


def client_module() -> Any:
    """openrlhf.utils.agent, without the other modules of the package."""
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None and spec.submodule_search_locations is not None
    root = next(iter(spec.submodule_search_locations))
    for name, place in (("openrlhf", root), ("openrlhf.utils", f"{root}/utils")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [place]
    return importlib.import_module("openrlhf.utils.agent")


class Bytes:
    """A tokenizer of one token per byte."""

    def __call__(self, text: str, **_: Any) -> dict[str, Any]:
        ids = types.SimpleNamespace(tolist=lambda: list(text.encode()))
        return {"input_ids": [ids]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(ids).decode()


class Engine:
    """In place of vLLM: continues each prompt by a text that depends on it."""

    async def generate(self, prompt_ids: list[int], parameters: Any, **_: Any) -> Any:
        answer = f" {sum(prompt_ids) % 97} is the answer.<eos>"
        output = types.SimpleNamespace(token_ids=list(answer.encode()), finish_reason="stop", logprobs=None)
        return types.SimpleNamespace(outputs=[output])


async def main(url: str, count: int) -> None:
    executor = client_module().SingleTurnAgentExecutor(remote_rm_url=url)
    parameters = types.SimpleNamespace(max_tokens=64, logprobs=None)
    prompts = [f"User: Question {number}?\n\nAssistant:" for number in range(count)]
    tokenizer, engine = Bytes(), Engine()
    calls = [executor.execute(prompt, "a label", parameters, 1024, tokenizer, engine) for prompt in prompts]
    outputs = await asyncio.gather(*calls)
    rewards = [None if output["reward"] is None else output["reward"][0] for output in outputs]
    texts = [tokenizer.decode(output["observation_tokens"]) for output in outputs]
    version = importlib.metadata.version("openrlhf")
    sys.stdout.write("\n" + json.dumps({"texts": texts, "rewards": rewards, "version": version}) + "\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
