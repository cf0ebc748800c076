"""Computes rewards with RewardBench's default pipeline: python tests/harness/peer_rewardbench.py MODEL ROWS, with a
Python that has rewardbench.

Input: a model directory whose tokenizer has a chat template, and a JSON file of conversations. Output: a JSON object on
the last line of standard output: rewardbench's version, `rewards` per conversation, and why the package cannot be
imported (empty if it can). This file uses nothing of rmcore.

rewardbench 0.1.4 cannot be imported as a package with transformers 5: its models/beaver.py imports _CONFIG_FOR_DOC from
modeling_llama.py, where it no longer exists. So this script loads the file of the default pipeline by itself, and
repeats the steps of rewardbench/rewardbench.py for a model without an entry of its own: the tokenizer padded on the
left, AutoModelForSequenceClassification.from_pretrained, RewardBenchPipeline, raw logits. The texts are those of its
utils.prepare_dialogue_from_tokenizer: the chat template, with BOS removed. The pipeline sends its inputs to "cuda";
without a GPU they stay on the CPU.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding


def main(model: str, rows: str) -> None:
    with open(rows, encoding="utf-8") as file:
        conversations = json.load(file)
    try:
        importlib.import_module("rewardbench")
        imports = ""
    except ImportError as error:
        imports = f"{type(error).__name__}: {error}"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.padding_side = "left"
    loaded = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    if not torch.cuda.is_available():
        BatchEncoding.to = lambda self, *_, **__: self  # type: ignore[method-assign]
    pipe = pipeline_file().RewardBenchPipeline("text-classification", model=loaded, tokenizer=tokenizer)
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]
    if tokenizer.bos_token:
        texts = [text.replace(tokenizer.bos_token, "") for text in texts]
    found = []
    for start in range(0, len(texts), 3):
        how = {"batch_size": 3, "truncation": False, "padding": True, "max_length": 512, "function_to_apply": "none"}
        found += pipe(texts[start : start + 3], **how)[:, 0].float().tolist()
    version = importlib.metadata.version("rewardbench")
    print(json.dumps({"rewardbench": version, "imports": imports, "rewards": found}))


def pipeline_file():  # type: ignore[no-untyped-def]
    """rewardbench/models/pipeline.py, without the package around it."""
    [root] = importlib.util.find_spec("rewardbench").submodule_search_locations  # type: ignore[union-attr, misc]
    spec = importlib.util.spec_from_file_location("rewardbench_pipeline", Path(root) / "models" / "pipeline.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main(*sys.argv[1:])
