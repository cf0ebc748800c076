"""Each kind of attention that transformers' decoders have shares prompts: rewards and every gradient against the padded
oracle, and the way that the self-test chooses.
"""

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel

from rmcore.data.batches.batch import build_batch
from rmcore.model import attention, pruning
from rmcore.model.attention import Terms, chunked, composed_attention
from rmcore.model.backbone import decoder_layers, recompute_activations, turn_dropout_off
from rmcore.model.grid import Grid
from rmcore.model.layout_context import current_layout, packed_layout
from rmcore.model.own_attention import PACKED
from rmcore.model.pruning import ScoredRows
from rmcore.model.reward_model import PADDED, SHARED
from rmcore.model.selftest import choose_path
from rmcore.ops.ragged_attention import ragged_attention
from rmcore.ops.tiled_attention import tiled_attention
from tests.harness.oracle import (
    BOUND,
    GROUPED,
    MASKED,
    SMALL,
    Items,
    Scored,
    Wide,
    assert_close,
    item,
    odd_items,
    padded,
    reward_model,
)

CPU = torch.device("cpu")
GPT = {**SMALL, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "rotary_dim": 4, "n_inner": 48}
MLA = {
    **SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
EXPERTS = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAST, MASKS = False, True
# kind: the family's config, its arguments, and whether it shares by masks, through the model's own attention.
KINDS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "soft cap and windows": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
        FAST,
    ),
    "sinks and windows": (
        "GptOssConfig",
        {**GROUPED, **EXPERTS, "head_dim": 8, "sliding_window": 7, "layer_types": SLIDING, "rope_parameters": None},
        FAST,
    ),
    "smaller values and sinks": (
        "MiMoV2FlashConfig",
        {**GROUPED, **EXPERTS, "head_dim": 8, "v_head_dim": 12, "sliding_window": 7, "layer_types": SLIDING},
        FAST,
    ),
    "latent attention": ("DeepseekV3Config", {**MLA, **EXPERTS}, FAST),
    "latent attention without low-rank queries": ("DeepseekV2Config", {**MLA, **EXPERTS, "q_lora_rank": None}, FAST),
    "latent attention of MiniCPM": ("MiniCPM3Config", MLA, FAST),
    "chunks, and queries scaled by their position": (
        "Llama4TextConfig",
        {**GROUPED, **EXPERTS, "head_dim": 8, "intermediate_size_mlp": 48, "attention_chunk_size": 8}
        | {"layer_types": ["chunked_attention", "full_attention", "chunked_attention"]}
        | {"no_rope_layers": [1, 0, 1], "floor_scale": 16, "attn_scale": 0.5},
        FAST,
    ),
    "layers that drop keywords": ("StableLmConfig", GROUPED, FAST),
    "layers that drop keywords, squared ReLU": ("NemotronConfig", {**GROUPED, "head_dim": 8}, FAST),
    "differential attention": ("DiffLlamaConfig", GROUPED, FAST),
    "norms after attention": ("Olmo2Config", GROUPED, FAST),
    "attention next to the MLP": ("PhiConfig", GROUPED, FAST),
    "attention next to the MLP, rotated pairs": ("CohereConfig", GROUPED, FAST),
    "learned positions": (
        "OPTConfig",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
        FAST,
    ),
    "shared keys, and inputs of each layer": (
        "Gemma4TextConfig",
        {**GROUPED, "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 16, "sliding_window": 7}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 61, "num_kv_shared_layers": 2}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        FAST,
    ),
    "GPT-2": ("GPT2Config", GPT, FAST),
    "CTRL": ("CTRLConfig", {**GPT, "dff": 48}, FAST),
    "one key head": ("GPTBigCodeConfig", GPT, FAST),
    "gated attention": ("AfmoeConfig", {**GROUPED, **EXPERTS, "head_dim": 8, "sliding_window": 7}, FAST),
    "ALiBi": ("BloomConfig", {**SMALL, "n_layer": 3, "n_head": 4}, FAST),
    "ALiBi of Falcon": ("FalconConfig", {**SMALL, "alibi": True, "multi_query": False}, MASKS),
    "ALiBi of MPT": (*MASKED, MASKS),
    "rotation of Falcon": ("FalconConfig", {**SMALL, "alibi": False}, FAST),
    "rotation of Falcon, a key head for two query heads": (
        "FalconConfig",
        {**SMALL, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
        FAST,
    ),
    "rotation of Falcon, a key head for each query head": (
        "FalconConfig",
        {**SMALL, "alibi": False, "multi_query": False, "parallel_attn": False},
        FAST,
    ),
    "local layers of GPT-Neo": (
        "GPTNeoConfig",
        {**SMALL, "num_layers": 3, "num_heads": 4, "window_size": 7, "attention_types": [[["global", "local"], 1]]}
        | {"num_layers": 2, "num_hidden_layers": 2},
        FAST,
    ),
    "rotation of GPT-J": ("GPTJConfig", GPT, FAST),
    "rotation of CodeGen": ("CodeGenConfig", GPT, FAST),
    "sinusoids": (
        "XGLMConfig",
        {**SMALL, "d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
        MASKS,
    ),
    "windows in the mask only": (
        "PhimoeConfig",
        {**GROUPED, **EXPERTS, "sliding_window": 7},
        MASKS,
    ),
    "sparse attention": (
        "DeepseekV32Config",
        {**MLA, **EXPERTS, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64},
        MASKS,
    ),
    "masks that depend on values": ("DogeConfig", {**GROUPED, "keep_window_size": 64}, MASKS),
}
# Kinds whose last layer runs on all tokens. CTRL's attention gets them three times, MPT's one row at a time.
UNPRUNED = {"CTRL", "ALiBi of MPT"}


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> Scored:
    config, arguments, _ = KINDS[kind]
    torch.manual_seed(0)
    # The grouped product of experts is not defined in fp64.
    backbone = AutoModel.from_config(
        getattr(transformers, config)(**arguments), dtype=dtype, experts_implementation="eager"
    ).eval()
    turn_dropout_off(backbone)
    model = Scored(backbone)
    # Larger weights than a fresh model's, so that a wrong mask or position shows in the reward.
    for parameter in model.parameters():
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_test_shares(kind):
    model = reward_model(tiny(kind), PADDED)
    path, line = choose_path(model, odd_items(), [*range(8)], CPU, gradients=True)
    assert (path, model.masked, model.pruned) == (SHARED, KINDS[kind][2], kind not in UNPRUNED), line


@pytest.mark.parametrize(
    "dtype, pruned", [(torch.float64, True), (torch.float32, False)], ids=["fp64 pruned", "fp32 whole"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_rewards_and_gradients_equal_the_padded_oracle(kind, dtype, pruned):
    items = odd_items()
    model = tiny(kind, dtype)
    with Wide() if dtype == torch.float64 else torch.enable_grad():
        loss, rewards = padded(model, items)
        loss.backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)

        ours = reward_model(model, SHARED)
        ours.use(SHARED, pruned=pruned and kind not in UNPRUNED, masked=KINDS[kind][2])
        out = ours(build_batch(items, range(len(items))))
        out.loss_sum.backward()

    assert_close(out.rewards_A, torch.cat(rewards), BOUND[dtype], "rewards")
    assert expected.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_close(parameter.grad, expected[name], BOUND[dtype], name)


@pytest.mark.parametrize("kind", ["soft cap and windows", "sinks and windows", "smaller values and sinks", "ALiBi"])
def test_a_batch_for_cuda_takes_the_tiles(kind, monkeypatch):
    """In each layer, the pruned last one included: rewards and gradients are those of a batch for CPUs."""
    batch, results, calls = build_batch(odd_items(), range(8)), [], []
    for module in (attention, pruning):
        original = module.tiled_attention
        monkeypatch.setattr(module, "tiled_attention", lambda *given, f=original: calls.append(given[0]) or f(*given))
    for its_batch in (batch, batch.with_varlen()):
        model = reward_model(tiny(kind, torch.float64), SHARED)
        model.use(SHARED, pruned=True)
        assert not calls
        out = model(its_batch)
        out.loss_sum.backward()
        results.append([out.rewards_A, *(p.grad for p in model.parameters() if p.grad is not None)])
    layers = len(decoder_layers(model.backbone))
    assert [len(query) for query in calls] == [batch.computed_tokens] * (layers - 1) + [len(batch.last_rows_A)]
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, 1e-11, "tiles")


@pytest.mark.parametrize("kind", ["ALiBi", "rotation of Falcon", "local layers of GPT-Neo", "rotation of CodeGen"])
def test_no_mask_is_made_for_attention_that_reads_none(kind):
    """It would be as large as the square of the packed row."""
    model = reward_model(tiny(kind), SHARED)
    masks: list[torch.Tensor | None] = []
    for module in model.backbone.modules():
        if type(module) in PACKED.values():
            module.register_forward_pre_hook(
                lambda _, a, named: masks.append(named["attention_mask"]), with_kwargs=True
            )
    model(build_batch(odd_items(), range(8)))
    assert masks == [None] * len(decoder_layers(model.backbone))


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("kind", ["layers that drop keywords", "sinks and windows", "ALiBi", "ALiBi of MPT"])
def test_recompute_changes_no_gradient(kind, how):
    """The layers run again in the backward, outside the forward: they see its layout."""
    batch = build_batch(odd_items(), range(8))
    plain, recomputed = (reward_model(tiny(kind), SHARED) for _ in range(2))
    recompute_activations(recomputed.backbone, how)
    for model in (plain, recomputed):
        model.use(SHARED, pruned=kind not in UNPRUNED, masked=KINDS[kind][2])
        model.train()
        model(batch).loss_sum.backward()
    assert current_layout() is None
    for (name, ours), theirs in zip(recomputed.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad), name


def test_each_thread_has_its_own_layout():
    layouts = [build_batch(odd_items(), [number]).layout for number in range(2)]
    inside = threading.Barrier(2)
    seen = {}

    def forward(number):
        with packed_layout(layouts[number]):
            inside.wait()  # both threads are within their context
            seen[number] = current_layout()
            inside.wait()

    threads = [threading.Thread(target=forward, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[0] is layouts[0] and seen[1] is layouts[1] and current_layout() is None


def random_qkv(rows: int, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 4, 8), (rows, 2, 8), (rows, 2, 6))
    return tuple(torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


TERMS = {
    "plain": Terms(0.3),
    "window": Terms(0.3, window=5),
    "soft cap": Terms(0.3, softcap=1.5),
    "sinks": Terms(0.3, sinks_H=torch.linspace(-1, 1, 4)),
    "ALiBi": Terms(0.3, slopes_H=torch.linspace(0.1, 0.4, 4)),
    "all": Terms(0.3, 5, 1.5, torch.linspace(-1, 1, 4), torch.linspace(0.1, 0.4, 4)),
}


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_composition_scored_rows_and_op_agree(terms):
    """Implementations of one function, and their gradients: of PyTorch calls per segment, for few rows, and the ops of
    CPUs and of GPUs, these for all rows and for few."""
    batch = build_batch(odd_items(), range(8))
    layout = batch.with_varlen().layout
    segments, rows_A = batch.layout.segments_S4, batch.last_token_index_A
    q, k, v = leaves = random_qkv(int(segments[:, 1].max()))
    expected = ragged_attention(q, k, v, segments, *terms)
    ours = composed_attention(q, k, v, segments, *terms)
    few = ScoredRows(rows_A).attend(q, k, v, batch.layout, terms)
    tiled = tiled_attention(q, k, v, layout.tiles, *terms)
    few_tiled = ScoredRows(rows_A).attend(q, k, v, replace(layout, scored=None), terms)
    assert_close(ours, expected, 1e-12, "composition")
    assert_close(tiled, expected, 1e-12, "tiles")
    for out in (few, few_tiled):
        assert_close(out[rows_A], expected[rows_A], 1e-12, "scored rows")
    weight = torch.zeros_like(expected)
    weight[rows_A] = torch.randn(len(rows_A), *expected.shape[1:], dtype=torch.float64)
    theirs = torch.autograd.grad(expected, leaves, weight)
    for out in (ours, few, tiled, few_tiled):
        for mine, other in zip(torch.autograd.grad(out, leaves, weight), theirs, strict=True):
            assert_close(mine, other, 1e-12, "gradients")


@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_chunks_are_those_of_the_positions(size):
    """Each row sees the rows of its text that are in its own chunk of positions."""
    batch = build_batch(odd_items(), range(8))

    def seen(layout):
        visible = torch.zeros(batch.computed_tokens, batch.computed_tokens, dtype=torch.bool)
        for start, end, prefix_start, prefix_end in layout.segments_S4.tolist():
            for row in range(start, end):
                visible[row, prefix_start:prefix_end] = visible[row, start : row + 1] = True
        return visible

    chunk = batch.position_ids_T // size
    assert torch.equal(seen(chunked(batch.layout, size)), seen(batch.layout) & (chunk[:, None] == chunk))
    layout = chunked(batch.layout.for_varlen(), size)
    assert layout.gather is not None and int(layout.gather.cu_q[-1]) == batch.computed_tokens
    assert layout.tiles is not None and int(layout.tiles.query_blocks[-1, 1]) == batch.computed_tokens


def test_a_grid_has_at_most_twice_the_cells_of_its_tokens():
    """Short comparisons share a row, so that one long comparison does not make the rectangle large."""
    items = Items([item(90, 5, 5, seed=1), *(item(8, 2, 2, seed=seed) for seed in range(2, 22))])
    batch = build_batch(items, range(len(items)))
    grid = Grid.of(batch)
    assert grid.token_RL.shape == (4, 100) and grid.token_RL.numel() <= 2 * batch.computed_tokens + 100
    real = grid.token_RL >= 0
    assert torch.equal(grid.token_RL[real], torch.arange(batch.computed_tokens))
    assert torch.equal(grid.position_RL[real], batch.position_ids_T)

    model = reward_model(tiny("rotation of GPT-J"), SHARED)
    model.use(SHARED, pruned=True, masked=True)
    assert_close(model(batch).rewards_A, torch.cat(padded(tiny("rotation of GPT-J"), items)[1]), 5e-5, "rewards")
