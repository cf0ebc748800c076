"""Every decoder of transformers: the classes that rmcore makes, towers, fused experts, and the table of families."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModel, BertConfig, Gemma3nConfig, PI0Config, T5Config
from transformers.utils import is_timm_available

from rmcore.bench.models import exact, families, tiny_config, tried
from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.data.batches.batch import build_batch
from rmcore.data.synthetic import byte_tokenizer
from rmcore.hf_export.from_checkpoint import holds_others
from rmcore.model.backbone import decoder_layers, load_model, reward_config
from rmcore.model.classifier import (
    classifier_class,
    decoder_class,
    is_custom_code,
    is_made,
    new_classifier,
    text_model,
    text_prefix,
    towers,
)
from rmcore.model.lazy_model import NeedsWholeModel, open_lazy_model
from rmcore.model.meta_model import model_on_meta, set_padding
from rmcore.model.reward_model import PADDED, SHARED
from tests.harness.double import InDouble
from tests.harness.exporting import enlarged
from tests.harness.oracle import BOUND, PAD, assert_close, odd_items, padded, reward_model
from tests.harness.ranks import run_ranks, train_rank
from tests.harness.small_run import stored_weights
from tests.harness.walks import STEPS_OF_SEVEN, walk
from tests.harness.walks import assert_close as assert_metrics_close

needs_nemotron_omni = pytest.mark.skipif(
    "nemotron_h_omni" not in CONFIG_MAPPING, reason="this version of transformers does not have it"
)
ARGUMENTS = {"seed": 7, "vocabulary": 270, "pad_token_id": 0}  # 264 rows grow to 272
# One of each kind: a class of transformers and one made here, experts, towers, latent attention, recurrent layers.
DOZEN = {
    "llama": "shared",
    "granite": "shared",
    "olmoe": "shared",
    "qwen3_moe": "shared",
    "gemma3": "shared",
    "llama4": None,
    "deepseek_v3": None,
    "deepseek_v32": "shared",
    "gemma2": None,
    "bloom": None,
    "mamba2": None,
    "qwen3_5": None,
    "jamba": None,
}


def some(*names: str, fast: int = 1) -> list:
    """The families as parameters, of which all but the first ones are slow tests."""
    names = tuple(dict.fromkeys(names))
    return [*names[:fast], *(pytest.param(name, marks=pytest.mark.slow) for name in names[fast:])]


def stored(family: str, directory: Path) -> Path:
    """A checkpoint with its language-model head, in several files."""
    config = tiny_config(family)
    set_padding(config, 0)
    torch.manual_seed(3)
    decoder_class(type(config))._from_config(config).save_pretrained(directory, max_shard_size="50KB")
    return directory


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors in the files of a model."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("family", some("olmoe", *DOZEN))
def test_a_family_of_each_kind_trains_and_exports(family: str) -> None:
    result = tried(family)
    assert result.outcome == "exact", result
    assert DOZEN[family] in (None, result.path), result


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_no_family_crashes(family: str) -> None:
    result = tried(family)
    assert result.outcome in ("exact", "refused", "not tried"), result


def test_a_made_class_is_one_of_transformers_by_name_and_place() -> None:
    kind = classifier_class(tiny_config("olmoe"))
    assert kind.__name__ == "OlmoeForSequenceClassification" and is_made(kind) and not is_custom_code(kind)
    assert classifier_class(tiny_config("olmoe")) is kind
    assert not is_made(classifier_class(tiny_config("llama")))


@pytest.mark.parametrize("config", [BertConfig(), T5Config(), tiny_config("whisper")], ids=lambda c: c.model_type)
def test_what_is_not_a_decoder_is_refused_in_one_sentence(config) -> None:
    with pytest.raises(UserError, match=rf"{config.model_type}.*rmcore trains causal decoders") as error:
        classifier_class(config)
    assert "\n" not in str(error.value)


def test_a_tower_that_needs_a_package_is_one_sentence(tmp_path: Path) -> None:
    if is_timm_available():
        pytest.skip("timm is installed")
    Gemma3nConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"gemma3n needs a package: .*pip install timm"):
        open_lazy_model(ModelConfig(name=str(tmp_path)), **ARGUMENTS)


def test_a_robot_policy_is_refused_before_its_vocabulary_is_read(tmp_path: Path) -> None:
    PI0Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pi0 does not have one vocabulary.*rmcore trains causal decoders"):
        reward_config(ModelConfig(name=str(tmp_path)), 0)


@pytest.mark.parametrize("family", some("ctrl", "xlnet", "modernbert-decoder"))
def test_a_class_whose_head_is_not_a_linear_score_is_replaced(family: str) -> None:
    """XLNet reads a text in both directions, so that it shares nothing; it is exact all the same."""
    assert is_made(classifier_class(tiny_config(family)))
    result = tried(family)
    assert result.outcome == "exact" and result.export == "exported, loads in rmcore", result
    assert result.path == ("padded" if family == "xlnet" else "shared")


# Composite models of which transformers has no base model, or one that holds the text model in another way.
FROM_DECODERS = ("nemotron_h_omni", "pp_chart2table", "instructblip")


@needs_nemotron_omni
@pytest.mark.parametrize("family", some(*FROM_DECODERS))
def test_a_composite_without_a_base_model_is_made_of_the_decoders_class(family: str, tmp_path: Path) -> None:
    """Its head is gone, its towers stay; rewards and every gradient equal the padded oracle in fp64."""
    result = tried(family)
    assert (result.outcome, result.path) == ("exact", "shared"), result
    config = tiny_config(family)
    set_padding(config, PAD)
    config.num_labels = 1
    config.get_text_config()._experts_implementation = "eager"  # the one that computes in fp64, too
    torch.manual_seed(0)
    items = odd_items()
    with InDouble():
        model = enlarged(new_classifier(config, torch.float64))
        assert is_made(type(model)) and not any("lm_head" in name for name in model.state_dict())
        loss, rewards = padded(model, items)
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        assert {n for n, grad in expected.items() if grad is None} >= {n for n in towers(model) if n in expected}
        ours = reward_model(model, SHARED)
        for path in (SHARED, PADDED):
            ours.use(path)
            model.zero_grad(set_to_none=True)
            out = ours(build_batch(items, range(len(items)), share=path == SHARED))
            out.loss_sum.backward()
            assert_close(out.rewards_A, torch.cat(rewards), BOUND[torch.float64], "rewards")
            for name, parameter in model.named_parameters():
                if expected[name] is not None:
                    assert_close(parameter.grad, expected[name], BOUND[torch.float64], name)


@needs_nemotron_omni
@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_train_a_composite_without_a_base_model_as_one_does(tmp_path: Path) -> None:
    """They differ from one rank only by the order of fp32 sums (1e-5, see tests/training/test_world_sizes.py). The
    optimizer has no state of a tower, and the export holds the towers as they were.
    """
    base = stored("nemotron_h_omni", tmp_path / "base")
    byte_tokenizer().save_pretrained(base)
    given = [*STEPS_OF_SEVEN, "data.limit=18", f"model.name={base}", "model.init=pretrained"]
    [(path, expected)] = run_ranks(walk, 1, tmp_path / "one", [given])[0].value
    assert path == "attention shared"
    variants = [[*given, f"parallel.strategy={name}"] for name in ("ddp", "zero1", "zero2", "zero3")]
    for path, ours in run_ranks(walk, 2, tmp_path / "two", variants)[0].value:
        assert path == "attention shared"
        assert_metrics_close(ours, expected, 1e-5)
    stored_once = ["run.save_every=2", f"run.dir={tmp_path / 'zero3'}"]
    run_ranks(train_rank, 2, tmp_path / "run", [*given, "parallel.strategy=zero3", *stored_once])
    (checkpoint,) = (tmp_path / "zero3" / "checkpoints").iterdir()
    averaged = stored_weights(checkpoint, "exp_avg")
    assert averaged and all(name.startswith(("backbone.", "score.")) for name in averaged)
    before, after = weights_of(base), weights_of(tmp_path / "zero3" / "model")
    untrained = {name for name in before if not name.startswith("language_model.")}
    assert before.keys() - after.keys() == {"language_model.lm_head.weight"} and len(untrained) > 10
    assert all(torch.equal(before[name], after[name]) for name in untrained)
    trained = before.keys() & after.keys() - untrained
    assert not all(torch.equal(before[name], after[name]) for name in trained)


@pytest.mark.skipif("axk1" not in CONFIG_MAPPING, reason="this version of transformers does not have it")
def test_a_weight_that_transformers_makes_itself_needs_the_whole_model(tmp_path: Path) -> None:
    """A.X K1's routers have a bias that checkpoints need not hold."""
    base = stored("axk1", tmp_path)
    for path in base.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(path).items() if "e_score_correction_bias" not in name}
        save_file(kept, path, {"format": "pt"})
    config = ModelConfig(name=str(base))
    with pytest.raises(NeedsWholeModel, match=r"itself makes .*e_score_correction_bias"):
        open_lazy_model(config, **ARGUMENTS)
    biases = [x for name, x in load_model(config, **ARGUMENTS).named_buffers() if "e_score_correction_bias" in name]
    assert biases and all(torch.equal(bias, torch.zeros_like(bias)) for bias in biases)


@pytest.mark.parametrize("family", ["shieldgemma2", "gemma4_unified_assistant"])
def test_what_reads_more_than_a_text_is_refused(family: str) -> None:
    with pytest.raises(UserError, match=f"no decoder for the model type {family}"):
        classifier_class(tiny_config(family))


@pytest.mark.parametrize("family", some("gemma4", "xlstm"))
def test_a_vocabulary_grows_where_the_rule_of_transformers_fails(family: str, tmp_path: Path) -> None:
    """Gemma 4 looks for the embedding of its layers, and xLSTM for its own, in the text model alone."""
    config = ModelConfig(name=str(stored(family, tmp_path)))
    model = load_model(config, **ARGUMENTS)
    assert len(model.get_input_embeddings().weight) == 272
    assert torch.isfinite(model(input_ids=torch.tensor([[5, 269, 3]])).logits).all()
    with pytest.raises(NeedsWholeModel, match=r"grows with the vocabulary|cannot be drawn alone"):
        open_lazy_model(config, **ARGUMENTS)


@pytest.mark.parametrize("family", some("zamba2", "diffusion_gemma"))
def test_shared_weights_need_the_whole_model(family: str, tmp_path: Path) -> None:
    with pytest.raises(NeedsWholeModel, match="weights are shared"):
        open_lazy_model(ModelConfig(name=str(stored(family, tmp_path))), **ARGUMENTS)


@pytest.mark.parametrize("family", some("gemma3", "nemotron_h_omni", "llama4", "qwen3_5"))
def test_towers_are_neither_trained_nor_lost(family: str, tmp_path: Path) -> None:
    base = stored(family, tmp_path / "base")
    model = load_model(ModelConfig(name=str(base)), **{**ARGUMENTS, "vocabulary": 259})
    untrained = towers(model)
    assert text_model(model).training, "transformers recomputes activations in training mode only"
    assert untrained and len(decoder_layers(model)) == 4
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.startswith((text_prefix(model), "score."))}
    assert text_model(model).get_input_embeddings() is model.get_input_embeddings()

    exact(family, base, tmp_path / "model")
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (base, tmp_path / "model")
    )
    vision = [name for name in before if "vision" in name or "visual" in name]
    prefix = "" if vision[0] in after else "model."
    assert vision and all(torch.equal(before[name], after[prefix + name]) for name in vision)


@pytest.mark.parametrize(
    "family",
    some("qwen3_moe", "deepseek_v3", "deepseek_v4", "hrm_text", "qwen3_vl_moe", *families(), fast=4),
)
def test_rows_of_renamed_and_fused_weights_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    """Bit for bit, as three ranks read them; so are the stored buffers and the towers. What cannot be read by rows is
    loaded whole.
    """
    try:
        config = ModelConfig(name=str(stored(family, tmp_path)))
    except Exception as error:  # there are no tiny weights of this family
        pytest.skip(str(error)[:200])
    try:
        whole, lazy = load_model(config, **ARGUMENTS), open_lazy_model(config, **ARGUMENTS)
    except (NeedsWholeModel, UserError) as reason:
        assert family not in ("qwen3_moe", "deepseek_v3", "deepseek_v4", "hrm_text", "qwen3_vl_moe")
        pytest.skip(str(reason)[:200])
    skeleton = lazy.build()
    found = {name: torch.full(p.shape, torch.nan) for name, p in skeleton.named_parameters()}
    for rank in range(3):
        rows = {name: -(-weight.shape[0] // 3) for name, weight in found.items() if weight.ndim}
        lazy.fill({name: (n * rank, found[name][n * rank : n * (rank + 1)]) for name, n in rows.items()})
    lazy.fill({name: (0, weight) for name, weight in found.items() if not weight.ndim})
    expected = dict(whole.named_parameters())
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []
    buffers = dict(skeleton.named_buffers())
    assert [name for name, buffer in whole.named_buffers() if not torch.equal(buffer, buffers[name])] == []
    untrained, theirs = lazy.towers(), towers(whole)
    assert untrained.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n]) and t.dtype == theirs[n].dtype for n, t in untrained.items())


def test_blt_trains_all_but_the_patcher(tmp_path: Path) -> None:
    """The part that cuts a text into patches is frozen, exported as it was, and the vocabulary of the encoder grows."""
    config = ModelConfig(name=str(stored("blt", tmp_path)))
    for model in (load_model(config, **ARGUMENTS), open_lazy_model(config, **ARGUMENTS).build()):
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, _ in model.named_parameters() if name.startswith("model.patcher.")}
    assert holds_others(reward_config(config, 0), config), "an export from a checkpoint reads the base model's files"
    model = load_model(config, **ARGUMENTS)
    assert model.config.encoder_config.vocab_size == len(model.get_input_embeddings().weight) == 272
    assert tried("blt").path == "padded"


@pytest.mark.parametrize("family", some("qwen2_5_omni", "qwen3_omni_moe", fast=0))
def test_a_checkpoint_that_also_speaks_trains_the_part_that_reads(family: str, tmp_path: Path) -> None:
    result = tried(family)
    assert (result.outcome, result.path) == ("exact", "shared"), result
    config = ModelConfig(name=str(stored(family, tmp_path)))
    model, lazy = load_model(config, **ARGUMENTS), open_lazy_model(config, **ARGUMENTS).build()
    assert type(model).__name__.endswith("ThinkerForSequenceClassification")
    assert model.state_dict().keys() == lazy.state_dict().keys()
    assert towers(model) and not any("talker" in name for name in model.state_dict())


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    base = stored("qwen3_moe", tmp_path)
    path = next(p for p in base.glob("*.safetensors") if any(".experts.2." in name for name in load_file(p)))
    tensors = {name: tensor for name, tensor in load_file(path).items() if ".experts.2." not in name}
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"experts of model\.layers\.\d+\.mlp\.experts"):
        open_lazy_model(ModelConfig(name=str(base)), **ARGUMENTS)


def test_a_weight_that_is_made_of_several_others_needs_the_whole_model(tmp_path: Path) -> None:
    with pytest.raises(NeedsWholeModel, match=r"makes model\.layers\.0\.self_attn\.conv1d\.weight of several weights"):
        open_lazy_model(ModelConfig(name=str(stored("kimi_linear", tmp_path))), **ARGUMENTS)


def test_layers_of_several_classes_are_one_list() -> None:
    config = tiny_config("jamba")
    config.num_labels = 1
    layers = decoder_layers(model_on_meta(config))
    assert len(layers) == 4 and len({type(layer) for layer in layers}) > 1


@pytest.mark.parametrize("family", some("starcoder2", "phimoe", "dbrx", "seed_oss", "gpt_bigcode", fast=2))
def test_nothing_is_drawn_at_random_in_training(family: str, tmp_path: Path) -> None:
    """PhiMoE samples its experts, DBRX multiplies their inputs by noise, and Starcoder 2 calls functions for dropout,
    where a module is in training mode. What transformers computes outside training stays.
    """
    config = tiny_config(family)
    for name in ("residual_dropout", "embedding_dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.5)
    if family == "dbrx":
        config.ffn_config.moe_jitter_eps = 0.5
    set_padding(config, 0)
    decoder_class(type(config))._from_config(config).save_pretrained(tmp_path)
    model = load_model(ModelConfig(name=str(tmp_path)), **ARGUMENTS)
    assert text_model(model).training, "transformers recomputes activations in training mode only"
    ids = torch.arange(3, 203).view(2, 100)
    first, second = (model(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, model.eval()(input_ids=ids).logits)
    plain = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(text_model(model)(input_ids=ids)[0], plain(input_ids=ids)[0])
