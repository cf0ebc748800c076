"""Every speed option computes the same as the plain path: compiled layers, arguments of variable-length attention."""

import resource
import subprocess
import sys

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

import rmcore.model.attention as attention
import rmcore.model.varlen as varlen
from rmcore import ops
from rmcore.bench.gpu_checks import SAVED, whole_run
from rmcore.config import Config
from rmcore.data.batches.batch import build_batch
from rmcore.host.memory import keep_freed_memory
from rmcore.model.attention import composed_attention
from rmcore.model.compiled import compile_layers
from rmcore.model.reward_model import SHARED
from rmcore.ops.gather_prefix import gather_plan
from rmcore.parallel.ddp import saves_memory
from rmcore.parallel.world import running_world
from tests.harness.oracle import assert_close, odd_items, reward_model, tiny_model
from tests.harness.paths import ROOT
from tests.harness.varlen import kernel

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class CountProducts:
    """A backend of torch.compile that counts the matrix products that its graphs run. They compute as in eager mode."""

    def __init__(self):
        self.count = 0
        self.backend = aot_autograd(
            fw_compiler=self._compile, bw_compiler=self._compile, partition_fn=min_cut_rematerialization_partition
        )

    def _compile(self, graph, example):
        products = sum(node.target in PRODUCTS for node in graph.graph.nodes)

        def run(*arguments):
            self.count += products
            return graph(*arguments)

        return make_boxed_func(run)


@pytest.fixture
def own_layers(monkeypatch):
    """Eager layers compute as transformers wrote them, as compiled ones always do (rmcore.model.cpu_layers)."""
    monkeypatch.setattr(ops, "fused", lambda: False)


@pytest.mark.parametrize(
    "recompute, again",
    [
        pytest.param("none", 0, marks=pytest.mark.slow),
        ("selective", 0),
        pytest.param("full", 1, marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_compute_the_same_in_one_graph(recompute, again, own_layers):
    """The same bits, no graph break, one compilation for all lengths. Selective recompute keeps the products."""
    torch._dynamo.reset()
    counters.clear()
    plain, ours = (reward_model(tiny_model("llama"), SHARED) for _ in range(2))
    products = CountProducts()
    for model in (plain, ours):
        model.use(SHARED, pruned=True)
        model.train()
    compile_layers(ours.backbone, recompute, backend=products.backend, fullgraph=True)
    layers = len(ours.backbone.layers) - 1
    try:
        for numbers in (range(8), range(4), range(2, 7)):
            batch = build_batch(odd_items(), numbers)
            expected = plain(batch)
            expected.loss_sum.backward()
            products.count = 0
            out = ours(batch)
            forward = products.count
            out.loss_sum.backward()
            assert torch.equal(out.rewards_A, expected.rewards_A)
            for theirs, mine in zip(plain.parameters(), ours.parameters(), strict=True):
                assert torch.equal(mine.grad, theirs.grad)
            # Llama's layer has 7 products. Nothing in the backward reads the last one, the down projection.
            assert (forward, products.count - forward) == (7 * layers, (14 + again * 6) * layers)
        assert counters["stats"]["unique_graphs"] == 1
    finally:
        torch._dynamo.reset()


@pytest.mark.slow
def test_an_evaluation_between_the_steps_of_compiled_layers(own_layers):
    """Without gradients nothing is recomputed, and the layers still compute the same."""
    torch._dynamo.reset()
    plain, ours = (reward_model(tiny_model("gpt_neox"), SHARED) for _ in range(2))
    compile_layers(ours.backbone, "selective", backend=CountProducts().backend, fullgraph=True)
    batch = build_batch(odd_items(), range(8))
    try:
        for train in (True, False, True):
            for model in (plain, ours):
                model.train(train)
            with torch.set_grad_enabled(train):
                assert torch.equal(ours(batch).rewards_A, plain(batch).rewards_A)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("rows", ["all", "scored"])
@pytest.mark.parametrize("has_argument", [True, False], ids=["torch 2.12", "torch 2.11"])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("groups, size_v", [(1, 8), (2, 8), (2, 6), (1, 12)])
def test_variable_length_attention_gets_the_right_arguments(monkeypatch, groups, size_v, window, has_argument, rows):
    def called(*arguments, enable_gqa=False, **named):
        assert enable_gqa == (has_argument and groups > 1)
        return kernel(*arguments, **named)

    monkeypatch.setattr(varlen, "_kernel", lambda: (called, has_argument))
    batch = build_batch(odd_items(), range(8)).with_varlen()
    layout = batch.layout
    tokens = batch.computed_tokens
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(tokens, 4, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(tokens, 4 // groups, size, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in (8, size_v)
    )
    # Scored rows are the queries of the last layer. A row that ends two answers occurs twice, and counts twice.
    queries = torch.arange(tokens) if rows == "all" else batch.last_token_index_A
    plan = layout.gather if rows == "all" else layout.scored
    assert plan.cu_k.tolist() == sorted(plan.cu_k.tolist()) and len(plan.copy_offset) == tokens + 1
    upstream = torch.randn(len(queries), 4, size_v, generator=generator, dtype=torch.float64)
    results = []
    for out in (
        varlen.varlen_attention(query[queries], key, value, plan, attention.Terms(0.3, window)),
        composed_attention(query, key, value, layout.segments_S4, 0.3, window)[queries],
    ):
        results.append([out, *torch.autograd.grad((out * upstream).sum(), (query, key, value))])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-12, "varlen")


@pytest.mark.parametrize("groups, size_v", [(1, 8), (2, 8), (2, 12)])
def test_fp32_goes_through_the_memory_efficient_kernel(monkeypatch, groups, size_v):
    """One call for all segments, with grouped heads repeated and head sizes of their own; values and gradients."""

    def called(query, key, value, bias, cu_q, cu_k, max_q, max_k, dropout, mask, log_sum, *, scale):
        assert query.shape[2] == key.shape[2] == value.shape[2] and (bias, dropout, log_sum) == (None, 0.0, True)
        assert mask == 2  # torch/csrc: CustomMaskType.CausalFromBottomRight
        lengths = {"scale": scale, "window_size": (-1, 0)}
        padded = [torch.nn.functional.pad(x[0], (0, 12 - x.shape[-1])) for x in (query, key, value)]
        return kernel(*padded, cu_q, cu_k, max_q, max_k, **lengths)[None, ..., : value.shape[-1]], None

    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", called)
    batch = build_batch(odd_items(), range(8)).with_varlen()
    inputs = [
        torch.randn(batch.computed_tokens, 4 // g, k, requires_grad=True)
        for g, k in ((1, 8), (groups, 8), (groups, size_v))
    ]
    assert varlen.takes_varlen(inputs[1], inputs[2], attention.Terms(0.3))
    assert not varlen.takes_varlen(inputs[1], inputs[2], attention.Terms(0.3, window=5))
    with monkeypatch.context() as compiling:  # its backward cannot be traced
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not varlen.takes_varlen(inputs[1], inputs[2], attention.Terms(0.3))
        assert varlen.takes_varlen(inputs[1].bfloat16(), inputs[2].bfloat16(), attention.Terms(0.3))
    results = []
    for out in (
        varlen.varlen_attention(*inputs, batch.layout.gather, attention.Terms(0.3)),
        composed_attention(*inputs, batch.layout.segments_S4, 0.3, 0),
    ):
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-5, "memory-efficient")


def test_a_batch_for_cuda_brings_the_plan_of_the_gather():
    """The plan's tensors and a copy of the segments travel with the batch; the segments for the host stay."""
    batch = build_batch(odd_items(), range(8))
    segments = batch.layout.segments_S4
    there = batch.with_varlen().to(torch.device("meta"))
    plan = there.layout.gather
    for ours, expected in zip(plan, gather_plan(segments), strict=True):
        if isinstance(expected, torch.Tensor):
            assert ours.device.type == "meta" and (ours.dtype, ours.shape) == (expected.dtype, expected.shape)
        else:
            assert ours == expected
    assert there.layout.scored.key_index.device.type == "meta"
    assert len(there.layout.scored.cu_q) == len(batch.last_rows_A) + 1
    empty = build_batch(odd_items(), []).with_varlen().layout.scored  # a rank without work: row 0 is computed
    assert empty.key_index.tolist() == [0] and empty.cu_q.tolist() == [0, 1]
    assert there.layout.segments_on(torch.device("meta")).device.type == "meta" and there.layout.segments_S4 is segments
    here = batch.on(torch.device("cpu"))
    assert here.layout.gather is None and here.layout.segments_on(torch.device("cpu")) is segments
    with pytest.raises(ValueError, match=r"RaggedBatch\.on"):
        here.layout.segments_on(torch.device("cuda"))


def test_freed_memory_is_kept():
    """A large tensor that is made and freed repeatedly faults its pages in once, not every time."""
    if not keep_freed_memory():
        pytest.skip("not glibc")
    torch.ones(32 << 20, dtype=torch.uint8)  # the first use faults the pages in
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(32 << 20, dtype=torch.uint8)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert faults < 20 * (32 << 20) // 4096 // 4  # with a new mapping each time it would be all of them


# Prints the bytes of blocks of two sizes; what is left of them once the large ones are freed; and after the policy.
FREEING = """
import sys
import torch
from rmcore.host import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

assert getattr(memory, sys.argv[1])()
before = resident()
blocks = []
for n in range(64):  # small ones between large ones keep a heap from shrinking
    blocks += [torch.ones(4 << 20, dtype=torch.uint8), torch.ones(64 << 10, dtype=torch.uint8)]
full = resident()
del blocks[::2]
freed = resident()
memory.return_freed_memory()
print(full - before, freed - before, resident() - before)
"""


def freeing(policy: str) -> tuple[int, ...]:
    if not keep_freed_memory():
        pytest.skip("not glibc")
    command = [sys.executable, "-c", FREEING, policy]
    return tuple(map(int, subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()))


def test_freed_memory_is_given_back_where_memory_counts():
    """Large tensors with small ones between them leave nothing behind when they are freed."""
    full, freed, _ = freeing("return_freed_memory")
    assert full > 64 * (4 << 20) and freed < full // 10


def test_memory_that_was_freed_before_is_given_back_too():
    """What loading a model left between small blocks does not stay for the run."""
    _, freed, left = freeing("keep_freed_memory")
    assert freed > 64 * (4 << 20) and left < freed // 10


@pytest.mark.parametrize(
    "settings, saves",
    [({}, False), ({"model": {"lora": {"rank": 4}}}, True), ({"optim": {"states": "int8"}}, True)],
)
def test_runs_that_save_memory_return_what_is_freed(settings, saves):
    values = {"data": {"train": {"path": "p"}}, **settings, "model": {"name": "m", **settings.get("model", {})}}
    assert saves_memory(Config.model_validate(values)) == saves


@pytest.mark.gpu
def test_a_step_on_the_gpu_never_waits_for_it():
    """PyTorch raises for every call that would make the host wait; a wait in the step would occur in every step."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    with running_world(60.0, 0) as world:
        assert whole_run(world, "parallel.strategy=ddp")["resumed_at"] == SAVED
