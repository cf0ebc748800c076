"""Compares the rewards of vLLM with rmcore's: python -m tests.peers.vllm WORKDIR PEER_PYTHON [FAMILY ...].

Input: a folder to write to, and the Python of an environment with vLLM (tests/peers/vllm.txt).
Output: WORKDIR/vllm.jsonl, a row for each thing that was compared; exit code 1 if a reward differs by more than 1e-5.
Example: {"client": "vLLM", "version": "0.32.0", "compared": "llama, LLM.classify", "largest_difference": 4.8e-07}.

rmcore exports a tiny random model of each family and computes its rewards with `rmcore score`'s own code. Then
vllm_client.py loads the directories in its environment: LLM.encode, LLM.classify and LLM.score, the server's /classify
(texts and conversations) and /score, and the normalisation by the command line of the model card. All in fp32. Of a
model of several outputs all are compared, and no score, which vLLM computes of models with one output only. Without
FAMILY, vllm_families.py then loads exports of many families.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.templates import load_template
from rmcore.hf_export.card import model_card
from rmcore.model.classifier import is_made, new_classifier, towers
from rmcore.model.meta_model import set_padding
from rmcore.model.outputs import Outputs
from rmcore.scoring.normalisation import Normalisation
from rmcore.scoring.scorer import Scorer, Text
from tests.harness.exporting import enlarged, export, run_config
from tests.peers import vllm_families

CLOSE = 1e-5  # fp32, four layers, rewards of order 1
# vLLM's attention on CPUs has heads of at least 32 numbers.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_outputs": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma3_text": ("Gemma3TextConfig", {"query_pre_attn_scalar": 32, "sliding_window": 16}),
    # Transformers has no class for these; rmcore makes them.
    "granite": ("GraniteConfig", {}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
}
NORMALISED = ("llama", Normalisation(0.25, 1.5))
SEVERAL = ("llama_outputs", Outputs(("reward", "polite", "short"), (0.5, 0.0, 1.0)))
CONVERSATIONS = [
    [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "word " * (1 + n % 5) + str(n)}]
    for n in range(10)
]


def main(workdir: str, peer: str, *families: str) -> int:
    folder = Path(workdir)
    tasks = [prepared(folder / family, family) for family in families or FAMILIES]
    (folder / "vllm_tasks.json").write_text(json.dumps(tasks), encoding="utf-8")
    client = Path(__file__).with_name("vllm_client.py")
    (folder / "vllm_found.json").unlink(missing_ok=True)
    done = subprocess.run([peer, str(client), "vllm_tasks.json", "vllm_found.json"], cwd=folder, check=False)
    if not (folder / "vllm_found.json").exists():
        return 1
    found = json.loads((folder / "vllm_found.json").read_text(encoding="utf-8"))
    rows = []
    for task, results in zip(tasks, found["results"], strict=True):
        for what, rewards in results.items():
            expected = task["normalised"] if "--pooler-config" in what else task["outputs"]
            difference = max(abs(a - b) for a, b in zip(rewards, expected, strict=True))
            row = {"client": "vLLM", "version": found["version"], "compared": f"{task['family']}, {what}"}
            rows.append({**row, "largest_difference": difference})
    lines = [json.dumps(row) for row in rows]
    (folder / "vllm.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print("\n".join(lines))
    wrong = done.returncode != 0 or not all(row["largest_difference"] <= CLOSE for row in rows)
    return int(wrong or (not families and vllm_families.main(workdir, peer) != 0))


def prepared(directory: Path, family: str) -> dict[str, Any]:
    """Exports a model of the family; what the client is to compute, and rmcore's rewards."""
    tokenizer = byte_tokenizer()
    model = classifier(family, tokenizer)
    normalisation = NORMALISED[1] if family == NORMALISED[0] else None
    outputs = Outputs.stored(model.config)
    config = run_config("model.attention=auto")
    export(
        directory,
        model=model,
        towers=towers(model),
        tokenizer=tokenizer,
        config_yaml=config.dump_yaml(),
        card=model_card(
            config, wants_text=False, normalisation=normalisation, outputs=outputs, made=is_made(type(model))
        ),
        normalisation=normalisation,
    )
    scorer = Scorer(str(directory), ["parallel.precision=fp32"])
    chat = load_template("simple_chat", tokenizer).chat_template
    texts = [tokenizer.apply_chat_template(turns, chat_template=chat, tokenize=False) for turns in CONVERSATIONS]
    rows = [({"messages": conversation}, f"conversation {n}") for n, conversation in enumerate(CONVERSATIONS)]
    scorer.choose_path(rows)
    rewards = [scored.rewards[0] for scored in scorer.rewards(rows)]
    assert max(rewards) - min(rewards) > 1000 * CLOSE, "the reward of another text is noticed"
    token_ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    values = scorer.values([Text(np.array(ids, np.int32), f"text {n}") for n, ids in enumerate(token_ids)], math.inf)
    card = (directory / "README.md").read_text(encoding="utf-8")
    served = re.search(r"^vllm serve .*--pooler-config.*$", card, re.MULTILINE)
    return {
        "family": family,
        "directory": str(directory.resolve()),
        "conversations": CONVERSATIONS,
        "texts": texts,
        "token_ids": token_ids,
        "answers": [c[-1]["content"] + tokenizer.eos_token for c in CONVERSATIONS],
        "outputs": [value for one in values if one is not None for value in one.outputs],
        "single": outputs.single,
        "normalised": [NORMALISED[1].apply(reward) for reward in rewards],
        "card_command": served.group(0) if served else None,
    }


def classifier(family: str, tokenizer: Any) -> transformers.PreTrainedModel:
    """A small random model of the family over the tokenizer's vocabulary."""
    class_name, more = FAMILIES[family]
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = getattr(transformers, class_name)(**{**SIZES, **more, **tokens, "vocab_size": 264})
    (SEVERAL[1] if family == SEVERAL[0] else Outputs()).store(config)
    set_padding(config, tokenizer.pad_token_id)
    torch.manual_seed(1)
    return enlarged(new_classifier(config))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
