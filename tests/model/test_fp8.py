"""FP8 linear layers: which layers are converted, and the error on a machine that cannot run them."""

import pytest
import torch

import rmcore.model.fp8 as fp8
from rmcore.config import UserError, load_config
from rmcore.data.batches.batch import build_batch
from rmcore.model.reward_model import SHARED
from tests.harness.oracle import odd_items, reward_model, tiny_model


def test_fp8_is_for_bf16_runs(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {name: m}\ndata: {train: {path: p}}\n")
    assert load_config(path, ["parallel.fp8=true"]).parallel.fp8
    with pytest.raises(UserError, match=r"parallel\.fp8.*parallel\.precision=bf16"):
        load_config(path, ["parallel.fp8=true", "parallel.precision=fp32"])
    with pytest.raises(UserError, match=r"parallel\.fp8.*model\.lora"):
        load_config(path, ["parallel.fp8=true", "model.lora.rank=8"])


@pytest.mark.parametrize(
    "package, device, capability, message",
    [
        (None, "cuda", (9, 0), "not installed"),
        ("found", "cpu", (9, 0), "on the CPU"),
        ("found", "cuda", (8, 0), r"8\.9 or more; card has 8\.0"),
        ("found", "cuda", (8, 9), None),
    ],
)
def test_the_error_on_a_wrong_machine_says_what_is_missing(monkeypatch, package, device, capability, message):
    monkeypatch.setattr(fp8, "find_spec", lambda name: package)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    if message is None:
        return fp8.check_fp8(torch.device(device))
    with pytest.raises(UserError, match=message):
        fp8.check_fp8(torch.device(device))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_all_layers_but_the_last_multiply_in_fp8(family):
    """Weights and names stay; gradients point in the direction of the unconverted model's; the last layer is pruned."""
    pytest.importorskip("torchao.float8")
    plain, ours = (reward_model(tiny_model(family), SHARED) for _ in range(2))
    names = list(ours.state_dict())
    layers = fp8.decoder_layers(ours.backbone)
    wanted = {module for layer in layers[:-1] for module in layer.modules() if fp8.fits(module, "")}
    kept = [type(module) for layer in layers[-1:] for module in layer.modules()]
    count = fp8.use_fp8(ours.backbone, emulate=True)
    assert count == len(wanted) > 0
    assert list(ours.state_dict()) == names and type(ours.score) is torch.nn.Linear
    assert [type(module) for layer in layers[-1:] for module in layer.modules()] == kept
    batch, gradients = build_batch(odd_items(), range(8)), []
    for model in (plain, ours):
        model.use(SHARED, pruned=True)
        assert model.pruned
        model(batch).loss_sum.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    exact, found = gradients
    # The factors of a product are off by at most 2^-4 (e4m3) or 2^-3 (e5m2 of gradients), up or down. Through a few
    # layers that stays well within half of the gradient's norm; a gradient in a random direction is off by 1.4 of it.
    assert 0 < (found - exact).norm() < 0.5 * exact.norm()
