"""The memory model compared with the bytes that torch allocates: activations, gradients, optimizer, whole steps."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BloomConfig,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OpenAIGPTConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from rmcore.config.lora import LoraConfig
from rmcore.config.schema import Config
from rmcore.cost.data_size import measured_size
from rmcore.cost.dry_run import AUTOCAST, CAST, FP32, DryRun, LiveBytes, TokenBytes
from rmcore.cost.estimate import Setting, estimate
from rmcore.cost.machines import gpu
from rmcore.cost.memory import (
    Budget,
    Memory,
    Rectangle,
    arithmetic_of,
    cpu_budget,
    gpu_budget,
    keys_per_token,
    memory_of_step,
)
from rmcore.data.batches.batch import RaggedBatch, build_batch
from rmcore.data.tokens.comparisons import EncodedRow, TokenizedComparison, TokenizedComparisons
from rmcore.model import varlen
from rmcore.model.backbone import recompute_activations, turn_dropout_off
from rmcore.model.classifier import new_classifier
from rmcore.model.lora import add_lora, store_base
from rmcore.model.objectives import Objective
from rmcore.model.reward_model import PADDED, SHARED, RewardModel
from rmcore.ops import layers
from rmcore.parallel.adamw import AdamW
from rmcore.training import assembly
from tests.harness.varlen import kernel_of_zeros

SHAPES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 192, "num_hidden_layers": 5, "num_attention_heads": 6}
NEOX = GPTNeoXConfig(**SHAPES, intermediate_size=768, num_labels=1, pad_token_id=1)
LLAMA = LlamaConfig(**SHAPES, num_key_value_heads=2, intermediate_size=512, num_labels=1, pad_token_id=1)


FALCON = FalconConfig(
    **SHAPES, new_decoder_architecture=True, num_kv_heads=2, attention_dropout=0, num_labels=1, pad_token_id=1
)
BLOOM = BloomConfig(vocab_size=512, hidden_size=64, n_layer=3, n_head=2, num_labels=1, pad_token_id=1)
GPT1 = OpenAIGPTConfig(vocab_size=512, n_positions=800, n_embd=64, n_layer=3, n_head=2, num_labels=1, pad_token_id=1)


class Rows:
    """Comparisons of a prompt of 480 tokens and answers of 200 and 120, or of other lengths."""

    def __init__(self, *tails: int) -> None:
        self.lengths = 480, *(tails or (200, 120))

    def comparison(self, number: int) -> TokenizedComparison:
        prefix, *tails = (torch.randint(2, 500, (n,)).numpy().astype("int32") for n in self.lengths)
        one = torch.ones(1).numpy()
        return TokenizedComparison(
            prefix=prefix,
            tails=tails,
            pairs=torch.tensor([[0, 1]]).numpy(),
            margin=0 * one,
            weight=one,
            ties=torch.zeros(0, 2).long().numpy(),
            tie_weight=one[:0],
            score=torch.zeros(len(tails)).numpy(),
        )


def live_bytes(config: PretrainedConfig, arithmetic: str, recompute: str, comparisons: int) -> tuple[int, int]:
    """(kept after the forward, peak) of a real forward and backward on the CPU."""
    dtype = torch.bfloat16 if arithmetic == CAST else torch.float32
    hf_model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
    recompute_activations(model.backbone, recompute)
    return live_bytes_of(model, comparisons, half=arithmetic == AUTOCAST)


def live_bytes_of(model: RewardModel, comparisons: int, *, half: bool, **way: Any) -> tuple[int, int]:
    """The same, of a model; `way`: arguments of `RewardModel.use`."""
    way = way or {"path": SHARED, "pruned": True}
    model.use(**way)
    return live_bytes_in(model, build_batch(Rows(), range(comparisons), share=way["path"] == SHARED), half=half)


def live_bytes_in(model: RewardModel, batch: RaggedBatch, *, half: bool) -> tuple[int, int]:
    """The same, of a batch."""
    with LiveBytes(model) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(batch).loss_sum
        kept = live.now
        loss.backward()
    return kept, live.peak


@pytest.mark.parametrize(
    ("config", "arithmetic", "recompute"),
    [
        (NEOX, FP32, "none"),
        (NEOX, AUTOCAST, "selective"),
        (NEOX, CAST, "full"),
        (LLAMA, CAST, "none"),
        (LLAMA, FP32, "selective"),
        (LLAMA, AUTOCAST, "full"),
        (FALCON, AUTOCAST, "selective"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_a_dry_run_counts_what_a_real_run_keeps(config: PretrainedConfig, arithmetic: str, recompute: str) -> None:
    """Five layers predicted from two and three; other lengths, another sharing ratio; real tensors, real kernels.

    Within 4 %: in the last layer A answers attend to T keys (A T H numbers, about 2 % at these widths), which the dry
    run's long comparisons do not show. Memory that a kernel allocates and frees internally is in neither count.
    """
    predicted = DryRun(config).token_bytes(arithmetic, recompute, cuda=False)
    assert predicted.counted
    short, long = (live_bytes(config, arithmetic, recompute, n) for n in (2, 4))
    tokens = 2 * 800
    kept, peak = ((b - a) / tokens for a, b in zip(short, long, strict=True))
    assert predicted.kept == pytest.approx(kept, rel=0.04)
    assert predicted.total == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("config", "arithmetic", "way", "lengths"),
    [
        (BLOOM, FP32, {"path": SHARED, "masked": True}, [800]),
        (BLOOM, AUTOCAST, {"path": PADDED}, [680, 600]),
        pytest.param(GPT1, FP32, {"path": PADDED}, [680, 600], marks=pytest.mark.slow),
    ],
    ids=["masked", "padded", "openai-gpt"],
)
def test_the_budget_counts_the_rectangle_of_a_path_that_does_not_pack(
    config: PretrainedConfig, arithmetic: str, way: dict[str, Any], lengths: list[int]
) -> None:
    """Scores and masks too, which grow with the square of a row's length: about half of the bytes of such rows."""
    rectangle = Rectangle.of(np.array(lengths))
    predicted = DryRun(config).cell_bytes(arithmetic, "none", rectangle.length)
    hf_model = new_classifier(config)
    turn_dropout_off(hf_model)
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
    short, long = (live_bytes_of(model, n, half=arithmetic == AUTOCAST, **way) for n in (2, 4))
    tokens = 2 * sum(lengths)
    kept, peak = ((b - a) / tokens for a, b in zip(short, long, strict=True))
    assert predicted.kept * rectangle.cells == pytest.approx(kept, rel=0.04)
    assert predicted.total * rectangle.cells == pytest.approx(peak, rel=0.1)
    quarter = DryRun(config).cell_bytes(arithmetic, "none", rectangle.length // 4)
    assert predicted.kept > 1.4 * quarter.kept
    if arithmetic == FP32:  # a micro batch of the chosen budget fits the device, and uses most of it
        settings = config_of(precision="fp32", recompute="none")
        chosen = gpu_budget(settings, DryRun(config), 800, 0.2e9, 1, rectangle=rectangle).tokens
        assert 0.6 * 0.2e9 < chosen * peak < 0.85 * 0.2e9


@pytest.mark.parametrize(
    ("config", "arithmetic", "recompute"),
    [(NEOX, CAST, "none"), (LLAMA, CAST, "selective"), (NEOX, FP32, "none")],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_keys_that_gpus_gather_for_each_answer_are_counted(
    monkeypatch: pytest.MonkeyPatch, config: PretrainedConfig, arithmetic: str, recompute: str
) -> None:
    """Six answers to a prompt of 480 tokens: real tensors on the path of CUDA, with stand-ins for its two kernels."""

    def efficient(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        return (kernel_of_zeros(query.squeeze(0), key.squeeze(0), value.squeeze(0)).unsqueeze(0),)

    gathered = 480 * 6 + 288
    predicted = DryRun(config).token_bytes(arithmetic, recompute, keys=gathered / 768)
    monkeypatch.setattr(varlen, "_kernel", lambda: (kernel_of_zeros, False))
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient)
    monkeypatch.setattr(layers, "takes", lambda *_: False)  # no ops for CPUs
    rows = Rows(16, 32, 32, 48, 64, 96)  # 768 tokens: the model fills up no row of a multiple of 64
    found = []
    for comparisons in (2, 4):
        dtype = torch.bfloat16 if arithmetic == CAST else torch.float32
        hf_model = AutoModelForSequenceClassification.from_config(config, dtype=dtype)
        model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
        recompute_activations(model.backbone, recompute)
        model.use(SHARED, pruned=True)
        batch = build_batch(rows, range(comparisons)).with_varlen()
        assert batch.layout.gather is not None and len(batch.layout.gather.key_index) == comparisons * gathered
        found.append(live_bytes_in(model, batch, half=False))
    kept, peak = ((b - a) / (2 * 768) for a, b in zip(*found, strict=True))
    assert predicted.counted
    assert predicted.kept == pytest.approx(kept, rel=0.02) and predicted.total == pytest.approx(peak, rel=0.02)


def encoded(answers: int, prompt: int, tail: int) -> EncodedRow:
    """A comparison of some answers to one prompt; their first tokens differ."""
    texts = [np.array([*[9] * prompt, *[number] * tail], dtype=np.int32) for number in range(answers)]
    return EncodedRow(texts[0][:prompt], texts, [(0, 1)], [0.0], [1.0])


def test_the_keys_are_those_of_the_micro_batch_with_most() -> None:
    """50 pairs of 400 tokens with 600 keys each, and among them one prompt of 2,400 tokens with 16 answers of 100."""
    pairs, many = [encoded(2, 200, 100)] * 25, encoded(16, 2400, 100)
    config = config_of()
    data = TokenizedComparisons.of([*pairs, many, *pairs])
    found = measured_size(data, [], share=True, config=config)
    # In 8,192 tokens: 40,000 keys of 4,000 tokens, and the pairs'.
    assert found.keys == pytest.approx((40_000 + 4_192 * 1.5) / 8_192)
    assert measured_size(data, [], share=False, config=config).keys == 1.0, "each text has its own prompt"
    assert measured_size(TokenizedComparisons.of(pairs), [], share=True, config=config).keys == 1.5
    tight = config.model_copy(update={"batch": config.batch.model_copy(update={"tokens": 4_000})})
    assert keys_per_token(tight, data.tokens_N, data.logical_tokens_N, 4_000) == 10.0, "alone in its micro batch"


def test_budget_recompute_and_plan_count_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token without recompute takes 100 kB, and 20 kB for each key beyond those of pairs: 60,000 against 30,000."""
    per_key = {"none": 20e3, "selective": 1e3, "full": 1e3, "offload": 1e3}

    def of(_: DryRun, arithmetic: str, recompute: str, *, keys: float = 1.5, **__: Any) -> TokenBytes:
        return TokenBytes(100e3 + per_key[recompute] * (keys - 1.5), 0.0, counted=True)

    monkeypatch.setattr(DryRun, "token_bytes", of)
    dry, config = DryRun(NEOX), config_of(recompute="none")
    room = memory_of_step(config, dry.sizes, TokenBytes(0.0, 0.0, counted=True), tokens=0, ranks=1, deferred=True).state
    memory = (room + 2e9) / 0.85  # 20,000 tokens of pairs
    few, many = (gpu_budget(config, dry, 512, memory, 1, keys=keys).tokens for keys in (1.5, 6.5))
    assert (few, many) == (pytest.approx(20_000, abs=2), pytest.approx(10_000, abs=2))
    chosen = [gpu_budget(config_of(), dry, 512, memory, 1, keys=keys).recompute for keys in (1.5, 16.5)]
    assert chosen == ["none", "selective"]
    # The plan of steps of one comparison: 12 answers, 800 tokens, 6,300 keys.
    data = measured_size(TokenizedComparisons.of([encoded(12, 500, 25)] * 50), [], share=True, config=config)
    config = config.model_copy(update={"batch": config.batch.model_copy(update={"pairs": 1})})
    planned = estimate(config, dry, data, Setting(gpu("h100"), 1, 1, 0.4), "ddp")
    assert planned.memory.activations == pytest.approx(800 * (100e3 + 20e3 * (6_300 / 800 - 1.5)))


def test_a_run_counts_the_keys_of_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    data, given = TokenizedComparisons.of([encoded(12, 500, 25)] * 3), []

    def choose(*arguments: Any) -> Budget:
        given.append(arguments[-1])
        return Budget(4096, "none")

    monkeypatch.setattr(assembly, "choose_budget", choose)
    prepared: Any = SimpleNamespace(train=data, evals={})
    model: Any = SimpleNamespace(path=SHARED, masked=False)
    world: Any = SimpleNamespace(size=1, local_size=1, device=torch.device("cpu"))
    assembly._own_budget(config_of(), NEOX, prepared, data.tokens_N, model, world)
    assert given == [6_300 / 800]


def test_repeated_key_heads_of_a_context_group_are_counted() -> None:
    """Two ranks divide 2 key heads; six ranks repeat them to 6: keys and values of 4 more heads in each layer."""
    dry = DryRun(LLAMA)
    two, six = (dry.token_bytes(FP32, "none", cuda=False, context=ranks) for ranks in (2, 6))
    assert six.kept - two.kept == pytest.approx(2 * 4 * 32 * 4.0 * 5, rel=0.1)


def test_a_model_that_fails_on_fake_tensors_gets_the_rule_of_thumb(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no fake kernel")

    monkeypatch.setattr(DryRun, "_live_bytes", broken)
    assert DryRun(NEOX).token_bytes(CAST, "none") == TokenBytes(30.0 * 192 * 5, 0.0, counted=False)
    assert DryRun(NEOX).token_bytes(FP32, "full") == TokenBytes(2 * 2.0 * 192 * 5, 2 * 30.0 * 192, counted=False)


def config_of(**parallel: str | int) -> Config:
    values = {"model": {"name": "m"}, "data": {"train": {"path": "p"}}, "parallel": {"precision": "bf16", **parallel}}
    return Config.model_validate(values)


def test_sizes_and_the_state_are_exact() -> None:
    """Weights, gradients and averages of a real AdamW, to the byte; every parameter is in a layer or in the root."""
    model = AutoModelForSequenceClassification.from_config(LLAMA, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    dry = DryRun(LLAMA)
    layers = model.base_model.layers
    assert dry.sizes.total == sum(p.numel() for p in model.parameters())
    assert dry.sizes.layer * 5 + dry.sizes.root == dry.sizes.total
    # in the last layer all tokens need keys and values only: 2 x 192 x 64
    assert (dry.sizes.last, dry.sizes.embedding) == (2 * 192 * 64, 512 * 192)
    assert dry.sizes.products == 4 * sum(p.numel() for p in layers[0].parameters() if p.ndim > 1)
    none = TokenBytes(0.0, 0.0, counted=True)
    found = memory_of_step(config_of(precision="fp32"), dry.sizes, none, tokens=0, ranks=4, deferred=False)
    averages = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert (found.gradients, found.optimizer) == (found.weights, averages)


MUCH = 10**6  # tokens whose activations outweigh everything else: the start of the backward decides


def test_strategies_shard_what_they_promise() -> None:
    """A large embedding, so that without tokens the end of the backward decides."""
    large = GPTNeoXConfig(**{**SHAPES, "vocab_size": 60_000}, intermediate_size=768, num_labels=1, pad_token_id=1)
    sizes, none = DryRun(large).sizes, TokenBytes(100.0, 20.0, counted=True)
    n = sizes.total
    names = ("ddp", "zero1", "zero2", "zero3", "hsdp")

    def of(name: str, *, tokens: int, deferred: bool = False) -> Memory:
        return memory_of_step(config_of(strategy=name), sizes, none, tokens=tokens, ranks=4, deferred=deferred)

    begin, end = ({name: of(name, tokens=tokens) for name in names} for tokens in (MUCH, 0))
    for found in (begin, end):
        assert [found[name].optimizer for name in names] == [8 * n, 8 * sizes.embedding, 2 * n, 2 * n, 2 * n]
        assert [found[name].weights / n for name in names] == [4, 4, 1, 1, 1]
    assert all(part.activations == 120 * MUCH for part in begin.values())
    assert begin["zero2"].copies == 2 * n > begin["zero3"].copies
    assert begin["zero2"].buffers == (2 + 4 + 4 + 2) * sizes.layer
    assert begin["zero3"].buffers == 2 * sizes.root > begin["zero2"].buffers, "the root is gathered again"
    # Gradients are made in the backward; its start finds those of earlier micro batches, which zero2 does not shard.
    assert [end[name].gradients / n for name in names] == [4, 4, 1, 1, 1]
    assert [begin[name].gradients / n for name in names] == [0, 0, 0, 0, 0]
    assert [of(name, tokens=MUCH, deferred=True).gradients / n for name in names] == [4, 4, 4, 1, 1]
    # At the end the gathered layers are freed. The root's bf16 gradient lies next to the fp32 buffer that is scattered.
    assert end["zero3"].copies == end["zero2"].copies == 0
    assert end["zero3"].buffers == (2 + 4) * sizes.root


def test_buckets_of_ddp_are_there_from_the_start() -> None:
    sizes, none, config = DryRun(NEOX).sizes, TokenBytes(100.0, 20.0, counted=True), config_of(precision="fp32")
    one, two = (
        memory_of_step(config, sizes, none, tokens=MUCH, ranks=ranks, deferred=False).gradients for ranks in (1, 2)
    )
    assert (one, two) == (0, 4 * sizes.total)


def test_ddp_computes_with_copies_of_all_weights_on_gpus_and_by_casts_on_cpus() -> None:
    """The casts are gone with the backward of their layers; the copies stay."""
    sizes, none, config = DryRun(NEOX).sizes, TokenBytes(100.0, 20.0, counted=True), config_of()
    (gpu, cpu), (gpu_end, cpu_end) = (
        [
            memory_of_step(config, sizes, none, tokens=tokens, ranks=1, deferred=False, gloo=gloo).copies
            for gloo in (False, True)
        ]
        for tokens in (MUCH, 0)
    )
    assert (gpu, cpu) == (2 * sizes.total, 2 * (sizes.total - sizes.embedding))
    assert (gpu_end, cpu_end) == (2 * sizes.total, 0)
    assert (arithmetic_of(config), arithmetic_of(config, cuda=False)) == (CAST, AUTOCAST)


def test_the_budget_grows_with_the_memory_and_recompute_is_used_when_needed() -> None:
    dry, device_memory = DryRun(NEOX), 0.6e9
    small, large = (gpu_budget(config_of(), dry, 512, size, 1) for size in (device_memory, 4 * device_memory))
    assert (small.recompute, large.recompute) != ("none", "selective")
    assert 512 <= small.tokens < large.tokens or small.recompute != large.recompute
    tight = gpu_budget(config_of(), dry, 30_000, 0.2e9, 1)
    assert tight.recompute == "offload"
    assert gpu_budget(config_of(recompute="full"), dry, 30_000, 0.2e9, 1).tokens == tight.tokens == 30_000
    # a step that is one micro batch needs no room for gradients that are accumulated unsharded
    one = gpu_budget(config_of(strategy="zero2", recompute="none"), dry, 512, 0.06e9, 8, step_tokens=600)
    many = gpu_budget(config_of(strategy="zero2", recompute="none"), dry, 512, 0.06e9, 8)
    assert one.tokens > many.tokens


def sections(weights: str = "fp32", states: str = "fp32", strategy: str = "ddp", **lora: Any) -> Config:
    values = {"model": {"name": "m", "weights": weights, "lora": lora}, "data": {"train": {"path": "p"}}}
    parallel = {"precision": "bf16", "strategy": strategy}
    return Config.model_validate({**values, "optim": {"states": states}, "parallel": parallel})


@pytest.mark.parametrize("weights, states", [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "int8")])
def test_formats_are_counted_as_adamw_stores_them(weights: str, states: str) -> None:
    """To the byte for weights and gradients; averages of small tensors are fp32, also under int8: within 2 %."""
    if states == "int8":
        pytest.importorskip("bitsandbytes")
    wide = LlamaConfig(**{**SHAPES, "hidden_size": 768}, intermediate_size=1024, num_labels=1, pad_token_id=1)
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    model = AutoModelForSequenceClassification.from_config(wide, dtype=dtype)
    parameters = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = AdamW(
        [{"params": list(parameters)}], names=parameters, states=states, seed=1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8
    )
    for parameter in parameters:
        optimizer.make_state(parameter)
    averages = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.ndim)
    dry, none = DryRun(wide), TokenBytes(0.0, 0.0, counted=True)
    found = memory_of_step(sections(weights, states), dry.sizes, none, tokens=0, ranks=1, deferred=False)
    assert found.weights == sum(p.nbytes for p in parameters)
    assert found.gradients == 4 * sum(p.numel() for p in parameters)
    assert found.optimizer == pytest.approx(averages, rel=0.02)
    assert (found.copies == 0.0) == (weights == "bf16"), "bf16 weights need no casts"


def test_the_gradient_of_an_embedding_is_counted_next_to_its_sum() -> None:
    """bf16 weights, second micro batch: its bf16 gradient, and the fp32 copy that is added to the sum."""
    shapes = {**SHAPES, "vocab_size": 30_000, "num_hidden_layers": 2}
    config = LlamaConfig(**shapes, intermediate_size=512, num_labels=1, pad_token_id=1)
    hf_model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    for parameter in hf_model.parameters():
        parameter.grad_dtype = torch.float32
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
    _, peak = (live_bytes_of(model, 1, half=False)[1] for _ in range(2))
    dry = DryRun(config)
    per_token = dry.token_bytes(CAST, "none", cuda=False)
    found = memory_of_step(sections("bf16"), dry.sizes, per_token, tokens=800, ranks=1, deferred=True)
    assert found.buffers > 0.0
    assert found.buffers + found.activations == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("base", ["fp32", "bf16", "nf4"])
def test_lora_is_counted_as_it_is_built(base: str) -> None:
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    config = sections(rank=8, base=base, dora=True)
    hf_model = AutoModelForSequenceClassification.from_config(LLAMA, dtype=torch.float32)
    add_lora(hf_model.base_model, config.model.lora, 0)
    store_base(hf_model.base_model, config.model.lora)
    dry, none = DryRun(LLAMA, lora=config.model.lora), TokenBytes(0.0, 0.0, counted=True)
    found = memory_of_step(config, dry.sizes, none, tokens=0, ranks=1, deferred=True)
    held = sum(p.nbytes for p in hf_model.parameters())
    held += sum(b.nbytes for name, b in hf_model.named_buffers() if name.endswith((".codes", ".scale")))
    assert found.weights == pytest.approx(held, rel=0.001)
    trained = sum(p.numel() for p in hf_model.parameters() if p.requires_grad)
    assert (dry.sizes.trained, found.gradients, found.optimizer) == (trained, 4 * trained, 8 * trained)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_stored_base_is_sharded_and_never_gathered_whole(strategy: str) -> None:
    """Of each adapted weight a rank holds its part of the codes, and in the forward one whole matrix at a time."""
    none = TokenBytes(0.0, 0.0, counted=True)
    found = {}
    for base in ("fp32", "nf4"):
        config = sections(strategy=strategy, rank=8, base=base)
        dry = DryRun(LLAMA, lora=config.model.lora).sizes
        found[base] = memory_of_step(config, dry, none, tokens=0, ranks=4, deferred=False)
    assert found["fp32"].weights - found["nf4"].weights == pytest.approx((4 - 0.5625) * dry.adapted / 4)
    if strategy == "zero2":  # bf16: everything is gathered
        saved = found["fp32"].copies - found["nf4"].copies
        codes = 0.5625 * dry.matrix  # of one weight, while they are gathered
        assert saved == pytest.approx(2.0 * (dry.adapted - dry.matrix) - codes)


def test_a_dry_run_counts_the_activations_of_lora() -> None:
    """Frozen layers keep no input for their own gradient, adapters keep theirs; a restored weight is dropped."""
    lora = LoraConfig(rank=8, base="bf16")
    predicted = DryRun(LLAMA, lora=lora).token_bytes(AUTOCAST, "none", cuda=False)
    found = []
    for comparisons in (2, 4):
        hf_model = AutoModelForSequenceClassification.from_config(LLAMA, dtype=torch.float32)
        add_lora(hf_model.base_model, lora, 0)
        store_base(hf_model.base_model, lora)
        model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
        found.append(live_bytes_of(model, comparisons, half=True))
    kept, peak = ((b - a) / 1600 for a, b in zip(*found, strict=True))
    assert predicted.counted
    assert predicted.kept == pytest.approx(kept, rel=0.04) and predicted.total == pytest.approx(peak, rel=0.1)


def test_offload_keeps_the_inputs_of_two_layers_on_the_device() -> None:
    """fp32, five layers: of the four inputs that `full` keeps, two remain. A CPU keeps all: they are in its memory."""
    dry = DryRun(NEOX)
    full, offload = (dry.token_bytes(FP32, how) for how in ("full", "offload"))
    assert full.kept - offload.kept == pytest.approx(2 * 192 * 4, rel=0.02)
    assert offload.working == full.working
    assert dry.token_bytes(FP32, "offload", cuda=False) == dry.token_bytes(FP32, "full", cuda=False)


def test_ranks_of_a_context_group_share_the_activations_of_a_row() -> None:
    sizes, none = DryRun(NEOX).sizes, TokenBytes(100.0, 20.0, counted=True)
    one, four = (
        memory_of_step(config_of(context=n), sizes, none, tokens=MUCH, ranks=4, deferred=False) for n in (1, 4)
    )
    assert (one.activations, four.activations) == (120 * MUCH, 30 * MUCH)
    assert (one.weights, one.gradients, one.optimizer) == (four.weights, four.gradients, four.optimizer)
    dry = DryRun(NEOX)
    alone, together = (gpu_budget(config_of(context=n, recompute="full"), dry, 512, 0.2e9, 4) for n in (1, 4))
    assert 3 * alone.tokens < together.tokens < 4 * alone.tokens, "the exchange of heads takes a part"
    assert cpu_budget(config_of(context=4), 512).tokens == 4 * cpu_budget(config_of(), 512).tokens


@pytest.mark.parametrize("router_aux", [False, True])
def test_a_dry_run_counts_experts_and_the_balance_of_their_routers(router_aux: bool) -> None:
    """In fp32, in which fake tensors do not know the product of grouped tokens. The balance keeps all scores."""
    config = Qwen3MoeConfig(
        **{**SHAPES, "num_hidden_layers": 3, "num_key_value_heads": 3},
        head_dim=32,
        moe_intermediate_size=64,
        num_experts=32,
        num_labels=1,
    )
    config.pad_token_id = 1
    predicted = DryRun(config, router_aux=router_aux).token_bytes(FP32, "none", cuda=False)
    found = []
    for comparisons in (2, 4):
        hf_model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        objective = Objective(router_aux=float(router_aux))
        model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1, objective=objective)
        found.append(live_bytes_of(model, comparisons, half=False))
    kept, peak = ((b - a) / 1600 for a, b in zip(*found, strict=True))
    assert predicted.counted
    assert predicted.kept == pytest.approx(kept, rel=0.02) and predicted.total == pytest.approx(peak, rel=0.1)
