"""Runs vLLM on exported models: python tests/peers/vllm_client.py TASKS FOUND, with a Python that has vLLM.

Input: the JSON file that tests/peers/vllm.py wrote. Output: the JSON file FOUND: vLLM's version, and for each model the
rewards of each way to call it, such as {"LLM.classify": [0.3127, -1.0442]}. It is written after each way, so that a
failure loses none. This file uses nothing of rmcore.
"""

import gc
import http.client
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

# Next to this file lies vllm.py, which must not be imported in place of the package.
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
START_SECONDS = 900  # of a server on a machine that is busy


def main(tasks: str, found: str) -> None:
    import vllm

    given = json.loads(Path(tasks).read_text(encoding="utf-8"))
    results: list[dict[str, list[float]]] = [{} for _ in given]

    def keep(result: dict[str, list[float]], more: dict[str, list[float]]) -> None:
        result |= more
        Path(found).write_text(json.dumps({"version": vllm.__version__, "results": results}), encoding="utf-8")

    for task, result in zip(given, results, strict=True):
        keep(result, offline(task))
    for task, result in zip(given, results, strict=True):
        keep(result, served(task, "vllm serve, ", []))
        if task["card_command"]:
            options = shlex.split(task["card_command"])[3:]
            keep(result, served(task, "vllm serve --pooler-config, ", options))


def offline(task: dict[str, Any]) -> dict[str, list[float]]:
    """The rewards by vllm.LLM, of token ids, of rendered texts, and of a prompt and an answer as two texts."""
    from vllm import LLM

    llm = LLM(model=task["directory"], runner="pooling", dtype="float32", enforce_eager=True, max_model_len=256)
    prompts = [{"prompt_token_ids": ids} for ids in task["token_ids"]]
    found = {
        "LLM.encode": flat(o.outputs.data.tolist() for o in llm.encode(prompts, pooling_task="classify")),
        "LLM.classify": flat(o.outputs.probs for o in llm.classify(task["texts"])),
    }
    if task["single"]:
        found["LLM.score"] = [o.outputs.score for o in llm.score(prompts_of(task), task["answers"])]
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    return found


def flat(outputs: Iterable[list[float]]) -> list[float]:
    """The outputs of all texts, one after the other."""
    return list(chain.from_iterable(outputs))


def prompts_of(task: dict[str, Any]) -> list[str]:
    """The texts in front of the answers."""
    return [text.removesuffix(answer) for text, answer in zip(task["texts"], task["answers"], strict=True)]


def served(task: dict[str, Any], name: str, options: list[str]) -> dict[str, list[float]]:
    """The rewards by the server: texts and conversations to /classify, a prompt and an answer to /score."""
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        place = f"{folder}/socket"
        options = options or ["--runner", "pooling"]
        # `vllm serve` looks its version up under the name vllm, which the package vllm-cpu does not have.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", task["directory"], *options]
        command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--uds", place]
        with open(f"{folder}/log", "w+", encoding="utf-8") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                wait_for(server, place)
                model = {"model": task["directory"]}
                texts = ask(place, "/classify", {**model, "input": task["texts"]})
                turns = [ask(place, "/classify", {**model, "messages": one}) for one in task["conversations"]]
                pairs = {"text_1": prompts_of(task), "text_2": task["answers"]}
                scores = ask(place, "/score", {**model, **pairs}) if task["single"] else None
            except BaseException:
                log.seek(0)
                print(log.read()[-5000:], file=sys.stderr)
                raise
            finally:
                server.terminate()
                server.wait(60)
    found = {
        f"{name}/classify of texts": flat(one["probs"] for one in texts["data"]),
        f"{name}/classify of conversations": flat(one["data"][0]["probs"] for one in turns),
    }
    return found | ({f"{name}/score": [one["score"] for one in scores["data"]]} if scores else {})


def wait_for(server: subprocess.Popen, place: str) -> None:
    """Return once the server answers; raise if it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            ask(place, "/health", None)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the server does not answer after {START_SECONDS} s")


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket, which needs no free port."""

    def __init__(self, place: str) -> None:
        super().__init__("localhost", timeout=120)
        self._place = place

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._place)


def ask(place: str, path: str, body: dict[str, Any] | None) -> Any:
    """The answer to a POST of `body`, or to a GET if there is none. Raises RuntimeError unless it is 200."""
    connection = UnixConnection(place)
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status} {text[:1000]}")
    return json.loads(text) if text else None


if __name__ == "__main__":
    main(*sys.argv[1:])
