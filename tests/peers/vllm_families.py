"""Loads exports of many families in vLLM: python -m tests.peers.vllm_families WORKDIR PEER_PYTHON [FAMILY ...].

Input: a folder to write to, and the Python of an environment with vLLM (tests/peers/vllm.txt).
Output: WORKDIR/vllm.jsonl, a row more for each family; exit code 1 if vLLM computes another reward, leaves a weight
of an export unread or a parameter of its model unset, does not use the score head, or refuses a family that it should
load (REFUSED has the others).
Example: {"compared": "falcon_h1: all 67 weights read, rewards", "largest_difference": 2.4e-07, ...}.

Every family is a tiny random model as in rmcore/bench/models.py, with heads of at least 32 numbers, which vLLM's CPU
kernels need. vllm_families_client.py loads all of them in one process of the environment. Of a family with towers the
text model alone is exported (export.towers=false).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers

from rmcore.bench import models
from rmcore.data.synthetic import byte_tokenizer
from rmcore.hf_export.parts import exported_parts
from rmcore.model.classifier import new_classifier, towers
from rmcore.model.meta_model import set_padding
from rmcore.model.outputs import Outputs
from rmcore.model.reward_model import PADDED
from rmcore.scoring.scorer import Scorer, Text
from tests.harness.exporting import engine, enlarged, export, run_config
from tests.harness.exporting import texts as probe_texts
from tests.peers.table import row, write_rows

CLOSE = 1e-5  # fp32, four layers, rewards of order 1
CLOSE_BF16 = 0.15  # of the range of the rewards: rounded products, and experts chosen by rounded scores
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "word_embed_proj_dim", "dim_model_base"), 64),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 1),
    **dict.fromkeys(("head_dim", "kv_channels", "global_head_dim", "query_pre_attn_scalar"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 128),
}
PLAIN = (
    "arcee",
    "cohere",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon_h1",
    "falcon_mamba",
    "gemma",
    "gemma2",
    "gemma3n_text",
    "gemma4_text",
    "glm4",
    "gpt2",
    "gpt_neox",
    "granitemoe",
    "granitemoeshared",
    "jamba",
    "mamba",
    "minicpm3",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo2",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
# What vLLM reads from config.json and transformers does not write by itself: the configs of real checkpoints have it.
LLAMA4 = {"moe_layers": [0, 1, 2, 3], "attention_chunk_size": 512, "num_experts_per_tok": 1}
# One head: vLLM 0.32's rotary op on CPUs rotates the queries of several heads wrongly when they come as [T, H, K].
ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"] * 2}
LFM2 = {"block_dim": 64, "conv_dim": 64, "block_auto_adjust_ff_dim": False, **ONE_HEAD}
CHANGES: dict[str, dict[str, Any]] = {
    **{family: {} for family in PLAIN},
    # vLLM's window of Cohere 2 holds one token more than transformers': compared on texts within it.
    "cohere2": {"sliding_window": 512},
    "deepseek_v2": {},
    "glm4_moe": {"head_dim": 32},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hunyuan_v1_dense": {"head_dim": 32},
    "lfm2": LFM2,
    "lfm2_moe": ONE_HEAD,
    "llama4_text": LLAMA4,
    "mamba2": {"num_heads": 8},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid", "use_routing_bias": True},
    "nemotron": {"head_dim": 32},
    "nemotron_h": {"layers_block_type": ["mamba", "mlp", "attention", "mlp"], "mamba_num_heads": 8},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen3_5_moe_text": {},
    "qwen3_5_text": {},
    "qwen3_next": {},
    # With towers, exported as their text models.
    "gemma3": {},
    "llama4": {"text_config": LLAMA4},
    "llava": {},
    "mistral3": {},
    "qwen3_5": {},
    # Refused.
    "gpt_oss": {},
    "kimi_linear": {},
    "minimax": {},
    "recurrent_gemma": {},
}
# Families that vLLM 0.32 does not load on CPUs, and a part of its message.
REFUSED = {
    "gpt_oss": "No Unquantized MoE backend supports the deployment configuration",
    "kimi_linear": "mamba-block-size can only be set with",
    "minimax": "does not dispatch through the Transformers attention interface",
    "recurrent_gemma": "are not supported for now",
}
BF16 = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5")  # "CPU GDN attention requires BF16."
TEXTS = ("A question? An answer.", "Another question, which is longer? Yes.", "x", "One more text of some length " * 4)


def main(workdir: str, peer: str, *families: str) -> int:
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [prepared(folder / family, family) for family in families or CHANGES]
    (folder / "families_tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    found = folder / "families_found.jsonl"
    found.unlink(missing_ok=True)
    client = Path(__file__).with_name("vllm_families_client.py")
    command = [peer, str(client.resolve()), "families_tasks.json", found.name]
    done = subprocess.run(command, cwd=folder, check=False)
    results = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()] if found.exists() else []
    wrong = done.returncode != 0 or len(results) != len(tasks)
    for task, result in zip(tasks, results, strict=False):
        what, difference, right = judged(task, result)
        line = row("vLLM", result["version"], f"{task['family']}: {what}", difference)
        write_rows(folder, "vllm", [line])
        print(json.dumps(line), flush=True)
        wrong |= not right
    return int(wrong)


def judged(task: dict[str, Any], result: dict[str, Any]) -> tuple[str, float | None, bool]:
    """What became of a family in words, the largest difference of its rewards, and whether all is as it should be."""
    error = result.get("error", "")
    if "weights" not in result:
        expected = REFUSED.get(task["family"])
        return f"refused: {error[:120]}", None, bool(expected and expected in error)
    faults = [f"{kind} {result[kind][:3]}" for kind in ("unread", "unset") if result[kind]]
    faults += [] if result["heads"] else ["the pooler does not use the score head"]
    if faults:
        return "; ".join(faults), None, False
    what = f"all {result['weights']} weights read"
    if error:
        return f"{what}; not run: {error[:120]}", None, True
    difference = float(np.abs(np.array(result["outputs"]) - np.array(task["outputs"])).max())
    if task["dtype"] == "float32":
        return f"{what}, rewards", difference, difference <= CLOSE
    share = difference / (max(task["outputs"]) - min(task["outputs"]))
    return f"{what}, rewards in bf16 to {share:.1%} of their range", None, share <= CLOSE_BF16


def prepared(directory: Path, family: str) -> dict[str, Any]:
    """Exports a model of the family; what the client is to compute, and rmcore's rewards."""
    tokenizer = byte_tokenizer()
    model = classifier(family, tokenizer.pad_token_id)
    config = run_config("export.towers=false")
    state, probe = engine(model, probe_texts(tokenizer), PADDED)
    parts = exported_parts(config, type(model), model.config, towers(model))
    export(directory, model=model, state=state, probe=probe, config_yaml=config.dump_yaml(), **parts._asdict())
    scorer = Scorer(str(directory), ["parallel.precision=fp32", "model.attention=padded"])
    token_ids = [tokenizer.encode(text + tokenizer.eos_token, add_special_tokens=False) for text in TEXTS]
    values = scorer.values([Text(np.array(ids, np.int32), f"text {n}") for n, ids in enumerate(token_ids)], np.inf)
    outputs = [value for one in values if one is not None for value in one.outputs]
    assert max(outputs) - min(outputs) > 1000 * CLOSE, "the reward of another text is noticed"
    return {
        "family": family,
        "directory": str(directory.resolve()),
        "dtype": "bfloat16" if family in BF16 else "float32",
        "token_ids": token_ids,
        "outputs": outputs,
    }


def classifier(family: str, pad_token_id: int) -> transformers.PreTrainedModel:
    """A tiny random model of the family."""
    with mock.patch.dict(models.SIZES, SIZES), mock.patch.dict(models.ODD):
        models.ODD[family] = models._merged(models.ODD.get(family, {}), CHANGES[family])
        config = models.tiny_config(family)
    Outputs().store(config)
    set_padding(config, pad_token_id)
    torch.manual_seed(1)
    return enlarged(new_classifier(config))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
