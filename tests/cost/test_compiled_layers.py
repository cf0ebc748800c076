"""What compiled layers keep, compared with the tensors that autograd saves in a compiled model."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from rmcore.cost.dry_run import CAST, DryRun, TokenBytes
from rmcore.cost.memory import gpu_budget
from rmcore.data.batches.batch import build_batch
from rmcore.model.compiled import compile_layers
from rmcore.model.reward_model import SHARED, RewardModel
from tests.cost.test_memory import LLAMA, Rows, config_of


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def saved_bytes(recompute: str) -> int:
    """Bytes that autograd saves in a forward of real bf16 tensors, the weights left out."""
    hf_model = AutoModelForSequenceClassification.from_config(LLAMA, dtype=torch.bfloat16)
    model = RewardModel(hf_model.base_model, hf_model.score, pad_token_id=1)
    model.use(SHARED, pruned=True)
    # The compiler's own decompositions and cut, without the kernels.
    compile_layers(model.backbone, recompute, backend="aot_eager_decomp_partition", fullgraph=True)
    weights = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(build_batch(Rows(), range(2)))
    assert out.loss_sum.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("recompute", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_a_dry_run_counts_what_a_compiled_model_keeps(fresh_compiler: None, recompute: str) -> None:
    """Five layers, four of them compiled. Within 4 %, as for plain layers; the plain count is more than that off."""
    dry = DryRun(LLAMA)
    plain, compiled = (dry.token_bytes(CAST, recompute, cuda=False, compiled=way) for way in (False, True))
    kept = saved_bytes(recompute) / (2 * 800)
    assert compiled.kept == pytest.approx(kept, rel=0.04)
    assert plain.kept > 1.08 * kept
    assert compiled.counted and compiled.working >= 0


def test_layers_that_the_compiler_does_not_take_whole_count_as_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmcore.cost.compiled_layers.compiled_bytes", lambda *_: None)
    dry = DryRun(LLAMA)
    assert dry.token_bytes(CAST, "none", compiled=True) == dry.token_bytes(CAST, "none")


def test_a_layer_that_is_computed_again_needs_less_at_once_when_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 bytes less per layer without recompute, 30 with selective: its second computation needs 70 less."""
    less = {"none": 100.0, "selective": 30.0}
    dry = DryRun(LLAMA)

    def one_layer(self: DryRun, arithmetic: str, recompute: str, pruned: bool, cuda: bool, keys: float) -> float:
        return self._layers[arithmetic, recompute, cuda, 1, keys][1] - less[recompute]

    monkeypatch.setattr(DryRun, "_compiled_layer", one_layer)
    for recompute, kept, working in (("none", 400, 0), ("selective", 120, 70), ("full", 0, 100)):
        before, after = (dry.token_bytes(CAST, recompute, compiled=way) for way in (False, True))
        assert before.kept - after.kept == pytest.approx(kept)
        assert before.working - after.working == pytest.approx(working)


def test_offload_is_not_chosen_for_compiled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"none": 4e5, "selective": 3e5, "full": 2e5, "offload": 1e5}
    monkeypatch.setattr(DryRun, "token_bytes", lambda _, __, how, **___: TokenBytes(kept[how], 0.0, counted=True))
    dry, much = DryRun(LLAMA), 30_000
    assert gpu_budget(config_of(), dry, much, 0.2e9, 1).recompute == "offload"
    assert gpu_budget(config_of(compile=True), dry, much, 0.2e9, 1).recompute == "full"
