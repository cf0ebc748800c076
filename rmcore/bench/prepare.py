"""Writes the rows and the models that the other benchmarks read.

Input: a tokenizer file, and files of preference rows (JSON lines, also .gz): prompt, chosen, rejected as texts, or
chosen and rejected only.
Output: OUT/data/NAME.jsonl, the first rows whose texts have fewer than 1,024 tokens, as whole texts; and
OUT/models/NAME, random weights under a fixed seed, with the tokenizer.
Example: --rows hh256=hh.jsonl.gz tldr256=tldr.jsonl.gz -> 256 pairs each, and four models.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3_5TextConfig,
)

from rmcore.bench.measure import parser

SEED = 20240611


def main(arguments: list[str]) -> int:
    p = parser("prepare", __doc__)
    p.add_argument("--tokenizer", required=True, help="tokenizer.json of Pythia (20B_tokenizer.json)")
    p.add_argument("--rows", nargs="+", default=[], metavar="NAME=FILE", help="preference rows, .jsonl or .jsonl.gz")
    p.add_argument("--count", type=int, default=256, help="pairs of each file")
    p.add_argument("--out", required=True, help="directory to write")
    options = p.parse_args(arguments)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=options.tokenizer,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        pad_token="<|padding|>",
        model_max_length=2048,
    )
    out = Path(options.out)
    (out / "data").mkdir(parents=True, exist_ok=True)
    for item in options.rows:
        name, _, source = item.partition("=")
        rows: list[dict[str, str]] = []
        with gzip.open(source, "rt") if source.endswith(".gz") else open(source, encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                texts = {side: row.get("prompt", "") + row[side] for side in ("chosen", "rejected")}
                if max(len(tokenizer(text).input_ids) for text in texts.values()) < 1024:
                    rows.append(texts)
                if len(rows) == options.count:
                    break
        with open(out / "data" / f"{name}.jsonl", "w", encoding="utf-8") as target:
            target.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_models(out / "models", tokenizer)
    print(f"written: {out}")
    return 0


def write_models(folder: Path, tokenizer: Any) -> None:
    """Two Pythia shapes, a small Llama and a small Qwen3.5, each in a directory with its tokenizer.

    Qwen3.5's widths are in the proportions of its 9B model: three layers of four are gated delta nets, whose keys have
    half and whose values have all of the width; an attention head has a quarter of it.
    """
    common: dict[str, Any] = {
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "num_labels": 1,
    }
    pythia: dict[str, Any] = {"num_hidden_layers": 6, "rotary_pct": 0.25, **common}
    shapes = {
        "pythia-14m": GPTNeoXConfig(hidden_size=128, num_attention_heads=4, intermediate_size=512, **pythia),
        "pythia-70m": GPTNeoXConfig(hidden_size=512, num_attention_heads=8, intermediate_size=2048, **pythia),
        "llama-small": LlamaConfig(
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=688,
            **common,
        ),
        "qwen3_5-small": Qwen3_5TextConfig(
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            intermediate_size=768,
            linear_num_key_heads=2,
            linear_key_head_dim=64,
            linear_num_value_heads=4,
            linear_value_head_dim=64,
            **common,
        ),
    }
    for name, config in shapes.items():
        torch.manual_seed(SEED)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
