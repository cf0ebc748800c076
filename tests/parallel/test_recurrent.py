"""A hybrid of attention and recurrent layers shares its prompts under every strategy, with recompute too."""

from pathlib import Path

import pytest
import transformers

from rmcore.data.synthetic import byte_tokenizer
from tests.harness.ranks import run_ranks
from tests.harness.recurrent_models import RECURRENT
from tests.harness.walks import STEPS_OF_SEVEN, assert_close, walk


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    """Two ranks differ from one only by the order of fp32 sums (1e-5, see tests/training/test_world_sizes.py)."""
    config_class, arguments = RECURRENT["qwen3_5"]
    tokenizer = byte_tokenizer()
    sizes = {**arguments, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    tokens = {"pad_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    getattr(transformers, config_class)(**sizes | tokens).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    base = [*STEPS_OF_SEVEN, f"model.name={tmp_path / 'model'}"]
    strategies = [["ddp"], ["zero2", "parallel.recompute=full"], ["zero3", "parallel.recompute=selective"]]
    variants = [[*base, f"parallel.strategy={name}", *more] for name, *more in strategies]
    (alone,) = run_ranks(walk, 1, tmp_path / "one", [base, [*base, "model.attention=padded"]])
    (path, expected), by_padding = alone.value
    assert path == "attention shared" and by_padding[0] == "attention padded"
    two = run_ranks(walk, 2, tmp_path / "two", variants)[0].value
    assert all(path == "attention shared" for path, _ in two)
    for _, ours in [by_padding, *two]:
        assert_close(ours, expected, 1e-5)
