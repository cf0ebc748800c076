"""Lazy models: the rows that ranks read are those that one process loads whole, and so is what they export."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.data.synthetic import byte_tokenizer
from rmcore.model.backbone import load_model
from rmcore.model.lazy_model import LazyModel, NeedsWholeModel, open_lazy_model
from tests.harness.crash import run
from tests.harness.oracle import FAMILIES
from tests.harness.ranks import run_ranks, train_rank
from tests.harness.small_run import arguments

NAMES = ["gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gpt2", "bloom"]
ARGUMENTS: dict[str, Any] = {"seed": 7, "vocabulary": 70, "pad_token_id": 1}  # 61 rows grow to 72


def stored(family: str, directory: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False) -> Path:
    """A causal language model in several files, as base models are on the hub."""
    class_name, arguments = FAMILIES[family]
    torch.manual_seed(3)
    config = getattr(transformers, class_name)(**arguments, tie_word_embeddings=tied)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(directory, max_shard_size="20KB")
    return directory


def in_parts(parts: LazyModel, ranks: int) -> dict[str, torch.Tensor]:
    """Every weight, filled as `ranks` ranks would, each with a separate call."""
    shapes = {name: tuple(p.shape) for name, p in parts.build().named_parameters()}
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for rank in range(ranks):
        rows = {name: -(-shape[0] // ranks) for name, shape in shapes.items()}
        parts.fill({name: (n * rank, whole[name][n * rank : n * (rank + 1)]) for name, n in rows.items()})
    return whole


def assert_equal(parts: LazyModel, whole: PreTrainedModel, ranks: int) -> None:
    expected = dict(whole.named_parameters())
    found = in_parts(parts, ranks)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
    buffers, theirs = dict(parts.build().named_buffers()), dict(whole.named_buffers())
    assert buffers.keys() == theirs.keys()
    assert [name for name, buffer in buffers.items() if not torch.equal(buffer, theirs[name])] == []


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_read_from_files_are_those_of_the_whole_model(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Bit for bit: stored weights, the drawn head, the added rows of the embedding, rotary and mask buffers."""
    config = ModelConfig(name=str(stored(family, tmp_path / "base", dtype=dtype)))
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert_equal(open_lazy_model(config, **ARGUMENTS), load_model(config, **ARGUMENTS), ranks=3)


@pytest.mark.parametrize("family", NAMES)
def test_random_weights_do_not_depend_on_the_number_of_ranks(tmp_path: Path, family: str) -> None:
    config = ModelConfig(name=str(stored(family, tmp_path / "base")), init="random")
    whole = load_model(config, **ARGUMENTS)
    for ranks in (1, 4):
        assert_equal(open_lazy_model(config, **ARGUMENTS), whole, ranks)
    assert not any(parameter.isnan().any() for parameter in whole.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_random_weights_are_distributed_as_transformers_draws_them(tmp_path: Path, family: str) -> None:
    """The same constants, and the same spread within 5 standard errors of a normal's: 1 / sqrt(2 n), n >= 1000."""
    config = ModelConfig(name=str(stored(family, tmp_path / "base")), init="random")
    ours = load_model(config, seed=1, vocabulary=61, pad_token_id=1)
    torch.manual_seed(5)
    theirs = AutoModelForSequenceClassification.from_config(ours.config)
    for name, parameter in theirs.named_parameters():
        mine, spread = ours.get_parameter(name), float(parameter.detach().std()) if parameter.numel() > 1 else 0.0
        if spread == 0.0:
            assert torch.equal(mine, parameter), name
        elif parameter.numel() >= 1000:
            tolerance = 5 * 2**0.5 / (2 * parameter.numel()) ** 0.5
            assert float(mine.detach().std()) == pytest.approx(spread, rel=tolerance), name


def test_a_tied_checkpoint_may_hold_the_weight_under_the_heads_name_only(tmp_path: Path) -> None:
    base = stored("llama", tmp_path / "base", tied=True)
    files = sorted(base.glob("*.safetensors"))
    expected = load_model(ModelConfig(name=str(base)), **ARGUMENTS)
    tensors = {key: tensor for path in files for key, tensor in load_file(path).items()}
    for path in base.glob("model*"):
        path.unlink()
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    assert_equal(open_lazy_model(ModelConfig(name=str(base)), **ARGUMENTS), expected, ranks=2)


@pytest.mark.parametrize("loader", [open_lazy_model, load_model])
def test_missing_and_unexpected_weights_are_one_message(tmp_path: Path, loader: Any) -> None:
    base = stored("llama", tmp_path / "base")
    tensors = {key: tensor for path in base.glob("*.safetensors") for key, tensor in load_file(path).items()}
    for path in base.glob("model*"):
        path.unlink()
    tensors["model.layers.0.mlp.extra"] = torch.zeros(2)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights that Llama\w+ does not have: model.layers.0.mlp.extra; is it"):
        loader(ModelConfig(name=str(base)), **ARGUMENTS)
    del tensors["model.layers.0.mlp.extra"], tensors["model.norm.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    missing = r"weights of Llama\w+ are missing from the checkpoint: model.norm.weight"
    with pytest.raises(UserError, match=missing + "; is it the right checkpoint"):
        loader(ModelConfig(name=str(base)), **ARGUMENTS)
    with pytest.raises(UserError, match=missing + ".*score.weight"):
        loader(ModelConfig(name=str(base), head="stored"), **ARGUMENTS)


@pytest.mark.distributed
def test_nan_in_a_checkpoint_is_found_before_the_training(tmp_path: Path) -> None:
    """The last row only: under zero3 one rank reads it, and all ranks refuse."""
    base = stored("llama", tmp_path / "base")
    byte_tokenizer().save_pretrained(base)
    name = "model.layers.1.mlp.up_proj.weight"
    file = base / json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][-1, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    message = rf"model\.name {base}: NaN or Inf in {name}: the checkpoint is damaged"
    with pytest.raises(UserError, match=f"^{message}"):
        load_model(ModelConfig(name=str(base)), **ARGUMENTS)
    given = arguments(tmp_path, f"model.name={base}", "model.init=pretrained", "parallel.strategy=zero3")
    outcome = run(tmp_path / "run", [*given, "data.max_tokens=64"], 2)
    assert outcome.codes == [2, 2] and re.search(f"rank 1: {message}", outcome.text), outcome.text


def test_shapes_and_files_that_do_not_fit(tmp_path: Path) -> None:
    base = stored("llama", tmp_path / "base")
    wide = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**wide, "intermediate_size": 64}))
    with pytest.raises(UserError, match=r"weights of another shape or type: model.layers.0.mlp.\w+.weight \[32, 48\]"):
        open_lazy_model(ModelConfig(name=str(base)), **ARGUMENTS)
    (base / "config.json").write_text(json.dumps(wide))
    cut = sorted(base.glob("*.safetensors"))[0]
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        open_lazy_model(ModelConfig(name=str(base)), **ARGUMENTS)
    for path in base.glob("model*"):
        path.unlink()
    with pytest.raises(NeedsWholeModel, match="no safetensors"):
        open_lazy_model(ModelConfig(name=str(base)), **ARGUMENTS)


RUN = [
    "data.train.path=synthetic",
    "data.template=none",
    "data.max_tokens=256",
    "data.limit=24",
    "data.eval_fraction=0.25",
    "optim.lr=1e-3",
    "batch.pairs=6",
    "batch.tokens=400",
    "run.max_steps=3",
    "log.every=1",
    "log.samples=0",
    "log.tensorboard=false",
    "run.save_every=2",
]


def export_from_shards(rendezvous: str, arguments: list[str]) -> None:
    """A run whose export is written in small files and checked by all ranks together."""
    import rmcore.training.publish

    rmcore.training.publish.RELOAD_SHARE = 0.0
    rmcore.training.publish.Package = partial(rmcore.training.publish.Package, max_shard_size="200KB")  # type: ignore[misc, assignment]
    train_rank(rendezvous, arguments)


def trained(tmp_path: Path, size: int, function: Any, *overrides: str, hosts: int = 1) -> tuple[list[dict], Path]:
    directory = tmp_path / f"{size}-{hosts}-{len(list(tmp_path.iterdir()))}"
    run_ranks(
        function, size, tmp_path / f"ranks-{directory.name}", [*RUN, *overrides, f"run.dir={directory}"], hosts=hosts
    )
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()], directory


@pytest.mark.distributed
@pytest.mark.parametrize("strategy, hosts, precision", [("zero3", 1, "fp32"), ("hsdp", 2, "bf16")])
def test_the_export_from_shards_is_that_of_one_rank(tmp_path: Path, strategy: str, hosts: int, precision: str) -> None:
    """The ranks read, train and check their parts; ddp on one rank loads and reloads the whole model."""
    tokenizer = byte_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "hidden_size": 64}
    shape = {**FAMILIES["llama"][1], "vocab_size": len(tokenizer), "max_position_embeddings": 512, **ids}
    config = transformers.LlamaConfig(**shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "base")
    base = [f"model.name={tmp_path / 'base'}", f"parallel.precision={precision}"]
    ours, mine = trained(tmp_path, 4, export_from_shards, *base, f"parallel.strategy={strategy}", hosts=hosts)
    theirs, whole = trained(tmp_path, 1, train_rank, *base)
    # bf16: FSDP2 keeps the residual stream in bf16, autocast does not; see tests/training/test_oracle.py.
    loss = 1e-5 if precision == "fp32" else 5e-3
    for a, b in zip(ours, theirs, strict=True):
        for key in ("train/rm/loss", "eval/rm/loss"):
            assert a.get(key) == pytest.approx(b.get(key), abs=loss)
    assert (mine / "model" / "model.safetensors.index.json").exists() or precision == "bf16"
    a, b = (AutoModelForSequenceClassification.from_pretrained(d / "model").state_dict() for d in (mine, whole))
    # A step moves a weight by at most about lr; fp32 sums in another order by lr * 1e-7 / eps a step (see ROUNDING in
    # tests/harness/small_run.py), bf16 gradients by up to 3 steps of lr, and its weights by 2^-9 of their size.
    weight = 1e-4 if precision == "fp32" else 3e-3 + 2e-3
    assert a.keys() == b.keys()
    assert max(float((a[name].float() - b[name].float()).abs().max()) for name in a) < weight


def rewritten(base: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a checkpoint, which become one file."""
    tensors = {key: tensor for path in base.glob("*.safetensors") for key, tensor in load_file(path).items()}
    for path in base.glob("model*"):
        path.unlink()
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


HEADS = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.zeros(1)}  # TRL's
PRM = {"score.0.weight": torch.ones(32, 32), "score.0.bias": torch.ones(32), "score.2.weight": torch.ones(2, 32)}
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
UNUSED = "warning: score.weight, a stored score head, is not used: model.head=fresh draws a new one; model.head=stored"
OF_ANOTHER = "; its head is v_head.summary.bias, v_head.summary.weight, of another trainer, which is not read"


@pytest.mark.parametrize(
    ("head", "change", "message"),
    [
        ("fresh", lambda found: None, ""),
        ("fresh", lambda found: found.update({"score.weight": torch.ones(1, 32)}), UNUSED),
        ("fresh", lambda found: found.update({"score.weight": torch.ones(3, 32)}), UNUSED),
        ("fresh", lambda found: found.update(HEADS), "warning: v_head.summary.bias, v_head.summary.weight, a head of"),
        ("fresh", lambda found: found.update(PRM), "warning: score.0.bias, score.0.weight, score.2.weight, a head of"),
        ("fresh", lambda found: found.update({EMBEDDING: found[EMBEDDING][:-8].clone()}), "vocab_size in its config"),
        ("fresh", lambda found: found.update({EMBEDDING: found[EMBEDDING].repeat(2, 1)}), "vocab_size in its config"),
        ("fresh", lambda found: found.update({NORM: torch.ones(31)}), r"norm.weight \[31\] (expected \[32\]); is it"),
        ("fresh", lambda found: found.update({f"{NORM}s": torch.ones(31)}), "does not have: model.norm.weights; is it"),
        ("fresh", lambda found: found.pop(NORM), "missing from the checkpoint: model.norm.weight; is it"),
        ("stored", lambda found: None, "missing from the checkpoint: score.weight; it is a model without a score head"),
        (
            "stored",
            lambda found: found.update({"score.weight": torch.ones(3, 32)}),
            r"score.weight \[3, 32\] (expected \[1, 32\]); the stored head has another number of outputs than model",
        ),
        ("stored", lambda found: found.update(HEADS), OF_ANOTHER),
        ("stored", lambda found: found.update({"score.weight": torch.ones(1, 32)}), ""),
        (
            "stored",
            lambda found: found.update({"score.weight": torch.ones(1, 32), "score.bias": torch.ones(1)}),
            "bias",
        ),
    ],
)
def test_every_way_of_loading_judges_a_checkpoint_alike(
    tmp_path: Path, head: Literal["fresh", "stored"], change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    base = stored("llama", tmp_path / "base")
    rewritten(base, change)
    config = ModelConfig(name=str(base), head=head)
    seen = []
    for loader in (load_model, open_lazy_model):
        said: list[str] = []
        try:
            loaded = loader(config, **ARGUMENTS, **({"say": said.append} if loader is load_model else {}))
            said += [loaded.note] if isinstance(loaded, LazyModel) and loaded.note else []
        except UserError as error:
            said.append(str(error))
        seen.append("".join(said))
    assert seen[0] == seen[1]
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), seen[0]) and bool(message) == bool(seen[0]), seen[
        0
    ]


def test_a_head_in_a_file_of_its_own_is_noticed(tmp_path: Path) -> None:
    base = stored("llama", tmp_path / "base")
    save_file(HEADS, base / "value_head.safetensors")  # as LLaMA-Factory writes it
    note = open_lazy_model(ModelConfig(name=str(base)), **ARGUMENTS).note
    assert note.startswith("warning: value_head.safetensors, a head of another trainer, is not used")
    with pytest.raises(UserError, match=r"its head is value_head\.safetensors, of another trainer"):
        load_model(ModelConfig(name=str(base), head="stored"), **ARGUMENTS)
