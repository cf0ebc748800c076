"""Sharded strategies: recompute, offload, clipping, the precision of collectives, the layers of many architectures."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rmcore.bench.models import tiny_config
from rmcore.config import UserError, load_config
from rmcore.data.synthetic import byte_tokenizer
from rmcore.model.backbone import decoder_layers
from rmcore.model.classifier import decoder_class
from rmcore.model.meta_model import model_on_meta, set_padding
from tests.harness.oracle import FAMILIES, GROUPED, MASKED, SMALL
from tests.harness.ranks import run_ranks
from tests.harness.walks import STEPS_OF_SEVEN, assert_close, walk

BASE = [
    *STEPS_OF_SEVEN,
    "model.name=synthetic",
    "optim.max_grad_norm=0.05",  # below the norms of these steps: every one is clipped
]


@pytest.mark.distributed
def test_recompute_offload_and_clipping_on_two_by_two_ranks(tmp_path: Path) -> None:
    """Recompute and offload change where numbers are, not the numbers. 2 x 2 ranks differ from one only by the order of
    fp32 sums (1e-5, see tests/training/test_world_sizes.py)."""
    hsdp, zero3 = "parallel.strategy=hsdp", "parallel.strategy=zero3"
    variants = [[hsdp], [hsdp, "parallel.recompute=selective"], [zero3, "parallel.recompute=full"]]
    variants += [[hsdp, "parallel.offload=true"], ["parallel.strategy=zero2", "parallel.offload=true"]]
    results = run_ranks(walk, 4, tmp_path / "four", [[*BASE, *variant] for variant in variants], hosts=2)
    (alone,) = run_ranks(walk, 1, tmp_path / "one", [BASE, [*BASE, "optim.max_grad_norm=0"]])
    clipped, free = (metrics for _, metrics in alone.value)
    assert all(step["grad_norm"] > 0.1 for step in clipped if "grad_norm" in step), "every step is clipped"
    assert abs(clipped[-1]["eval/rm/loss"] - free[-1]["eval/rm/loss"]) > 1e-4, "clipping shows"
    found = [metrics for _, metrics in results[0].value]
    for variant, ours in zip(variants, found, strict=True):
        print(variant)
        assert_close(ours, clipped, 1e-5)
    assert_close(found[1], found[0], 1e-7)
    assert_close(found[3], found[0], 1e-7)


def sent_in_bf16(rendezvous: str, strategy: str) -> dict[str, list[str]]:
    """The dtypes in each collective of a training, for weights and gradients only."""
    import torch.distributed as dist

    sent: dict[str, list[str]] = {}

    def spied(name: str, kind: str) -> Any:
        former = getattr(dist, name)

        def call(*arguments: Any, **more: Any) -> Any:
            tensors = [*arguments, *more.values()]
            sizes = [t for t in tensors if isinstance(t, torch.Tensor) and t.numel() > 500 and t.is_floating_point()]
            if sizes:
                sent.setdefault(kind, []).append(str(sizes[-1].dtype).removeprefix("torch."))
            return former(*arguments, **more)

        return call

    # torch 2.13 calls the first two all_gather_single and reduce_scatter_single
    names = {
        "all_gather_into_tensor": "gather",
        "all_gather_single": "gather",
        "reduce_scatter_tensor": "scatter",
        "reduce_scatter_single": "scatter",
        "all_reduce": "reduce",
    }
    for name, kind in names.items():
        if hasattr(dist, name):
            setattr(dist, name, spied(name, kind))
    from rmcore.parallel.world import running_world
    from rmcore.tracking.tracker import Tracker
    from rmcore.train import train
    from rmcore.training.assembly import assemble

    with running_world(120.0, 1, init_method=rendezvous) as world:
        overrides = [f"parallel.strategy={strategy}", "parallel.precision=bf16", "data.eval_fraction=0", "run.evals=0"]
        overrides += ["batch.pairs=28", "batch.tokens=300"]  # one step
        run = assemble(load_config(None, [*BASE, *overrides]), world)
        sent.clear()  # the self-test gathers in fp32
        train(run, Tracker())
    parts = len(run.plan.step(0).ranks[world.rank])
    return {**sent, "micro batches": [str(parts)]}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["hsdp", "zero2"])
def test_gradients_are_reduced_in_fp32_and_weights_gathered_in_bf16(tmp_path: Path, strategy: str) -> None:
    """hsdp scatters within the host in each micro batch, and reduces over hosts once; zero2 scatters once. The
    model has two layers and the rest: three collectives for all weights."""
    (sent, *_) = (result.value for result in run_ranks(sent_in_bf16, 4, tmp_path, strategy, hosts=2))
    parts = int(sent.pop("micro batches")[0])
    assert parts > 1
    assert set(sent["gather"]) == {"bfloat16"}
    assert sent["scatter"] == ["float32"] * (3 * parts if strategy == "hsdp" else 3)
    assert sent.get("reduce", []) == (["float32"] * 3 if strategy == "hsdp" else [])


def gradients_of_bf16_weights(rendezvous: str, variants: list[list[str]]) -> list[dict[str, Any]]:
    """Of each variant this rank's gradients after a step of several micro batches, and whether hooks changed them."""
    from rmcore.data.batches.batch import build_batch
    from rmcore.parallel.strategy import local
    from rmcore.parallel.world import running_world
    from rmcore.training.assembly import assemble

    found = []
    with running_world(60.0, 1, init_method=rendezvous) as world:
        for overrides in variants:
            config = load_config(None, [*BASE, "model.weights=bf16", "parallel.precision=bf16", *overrides])
            run = assemble(config, world)
            micro_batches = run.plan.step(0).ranks[world.rank]
            assert len(micro_batches) > 1
            for number, micro_batch in enumerate(micro_batches, 1):
                with run.strategy.gradient_sync(number == len(micro_batches)), run.strategy.autocast():
                    run.strategy.model(build_batch(run.data.train, micro_batch)).loss_sum.backward()
            parameters = run.strategy.named_parameters().values()
            hooked = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
            grads = [local(p.grad) for p in parameters if p.grad is not None]
            kinds = {str(grad.dtype) for grad in grads}
            found.append(
                {"hooked": hooked, "kinds": sorted(kinds), "numbers": [grad.flatten().tolist() for grad in grads]}
            )
    return found


@pytest.mark.distributed
def test_offloaded_gradients_of_bf16_weights_become_fp32_after_the_backward(tmp_path: Path) -> None:
    """Not in a hook, which may run while a gradient is still being copied to the host. The sums are the same."""
    whole = ["parallel.strategy=zero3", "batch.pairs=28", "batch.tokens=300"]
    for result in run_ranks(gradients_of_bf16_weights, 2, tmp_path, [whole, [*whole, "parallel.offload=true"]]):
        kept, offloaded = result.value
        assert kept["hooked"] and not offloaded["hooked"]
        assert kept["kinds"] == offloaded["kinds"] == ["torch.float32"]
        assert kept["numbers"] == offloaded["numbers"]


def unequal_hosts(rendezvous: str) -> str:
    """Two ranks on one host, one on another."""
    import os

    from rmcore.parallel.world import device_mesh, running_world

    last = os.environ["RANK"] == "2"
    os.environ.update(LOCAL_WORLD_SIZE="1" if last else "2", LOCAL_RANK="0" if last else os.environ["RANK"])
    with running_world(60.0, init_method=rendezvous) as world:
        try:
            device_mesh(world, by_host=True)
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.distributed
def test_unequal_hosts_are_refused_on_every_rank(tmp_path: Path) -> None:
    for result in run_ranks(unequal_hosts, 3, tmp_path):
        assert "3 processes on hosts of 1 and 2" in result.value


def chosen_path(rendezvous: str, overrides: list[str]) -> list[str]:
    from rmcore.parallel.world import running_world
    from rmcore.training.assembly import assemble

    torch.set_num_threads(1)
    with running_world(60.0, 1, init_method=rendezvous) as world:
        run = assemble(load_config(None, [*BASE, *overrides]), world)
        return [run.strategy.model.path, *run.lines]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_self_test_leaves_the_fast_path_on_shards_too(tmp_path: Path) -> None:
    """The fast path raises in the middle of a sharded forward, so prompts are shared by masks."""
    class_name, arguments = MASKED
    tokenizer = byte_tokenizer()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    getattr(transformers, class_name)(**{**arguments, **ids}).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = [f"model.name={tmp_path / 'model'}", "parallel.strategy=zero3", "data.max_tokens=96"]
    for result in run_ranks(chosen_path, 2, tmp_path / "ranks", given):
        path, *lines = result.value
        assert path == "shared" and any("by masks" in line and "not shared" in line for line in lines), lines


@pytest.mark.distributed
def test_layers_that_share_weights_train_on_shards(tmp_path: Path) -> None:
    """Zamba 2's attention is one for several layers. Two ranks differ from one only by the order of fp32 sums."""
    tokenizer, config = byte_tokenizer(), tiny_config("zamba2")
    set_padding(config, tokenizer.pad_token_id)
    torch.manual_seed(0)
    decoder_class(type(config))._from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    given = [*BASE, f"model.name={tmp_path / 'model'}", "data.max_tokens=96"]
    variants = [[f"parallel.strategy={strategy}"] for strategy in ("zero2", "zero3")]
    variants += [["parallel.strategy=zero3", "parallel.recompute=full"]]
    results = run_ranks(walk, 2, tmp_path / "two", [[*given, *variant] for variant in variants])
    (alone,) = run_ranks(walk, 1, tmp_path / "one", [given])
    ((_, expected),) = alone.value
    for variant, (_, metrics) in zip(variants, results[0].value, strict=True):
        print(variant)
        assert_close(metrics, expected, 1e-5)  # see tests/training/test_world_sizes.py


MORE_FAMILIES = {
    **FAMILIES,
    "opt": ("OPTConfig", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gptj": ("GPTJConfig", {**SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}),
    "falcon": ("FalconConfig", SMALL),
    "phi": ("PhiConfig", SMALL),
    "phi3": ("Phi3Config", GROUPED),
    "starcoder2": ("Starcoder2Config", GROUPED),
    "gemma3_text": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 2}),
    "gpt_bigcode": ("GPTBigCodeConfig", {**SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4}),
}


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_every_decoder_layer_is_wrapped_by_itself(family: str) -> None:
    """As many as in the config, and everything except embeddings, norms and heads is inside them."""
    class_name, arguments = MORE_FAMILIES[family]
    model = model_on_meta(getattr(transformers, class_name)(**arguments))
    layers = decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers == 3
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    outside = [name for name, parameter in model.named_parameters() if parameter not in inside]
    assert all(
        any(word in name.split(".")[-2] for word in ("emb", "wte", "wpe", "norm", "ln_f", "score")) for name in outside
    )


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_offload_needs_a_sharded_strategy(strategy: str) -> None:
    with pytest.raises(
        UserError, match=f"parallel.offload needs parallel.strategy zero2, zero3 or hsdp, not {strategy}"
    ):
        load_config(None, [*BASE, f"parallel.strategy={strategy}", "parallel.offload=true"])
