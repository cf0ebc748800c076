"""Loads a Hugging Face decoder and prepares it to be trained as a reward model.

Input: the section `model` of the config, and the size and padding token of the tokenizer.
Output: the `*ForSequenceClassification` model as transformers builds it: fp32 weights, dropout off, a score head
without bias, of one output unless `model.outputs` lists several, a padding token that is not EOS. rmcore trains its
backbone and score head and exports its config.
Example: EleutherAI/pythia-14m -> GPTNeoXForSequenceClassification with `score.weight` [1, 128] drawn from
N(0, 1/sqrt(129)).
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rmcore.config import UserError
from rmcore.config.schema import ModelConfig
from rmcore.host.model_directory import check_model_directory, refuse_missing_directory
from rmcore.model.activation_offload import offload_inputs
from rmcore.model.adapter import StoredAdapter
from rmcore.model.classifier import brings_code, classifier_class, new_classifier, part_that_reads, text_model
from rmcore.model.found_weights import SCORE, check_found, listed
from rmcore.model.layout_context import recompute_contexts
from rmcore.model.meta_model import fresh_head, grow, model_on_meta, other_heads, set_padding
from rmcore.model.outputs import KEY, Outputs
from rmcore.model.random_weights import NoDrawingRule, RandomWeights
from rmcore.model.safetensors_weights import check_indices, head_files
from rmcore.model.synthetic_model import SYNTHETIC, synthetic_model_config

# Methods of quantised checkpoints whose layers transformers does not turn back into plain ones.
UNTRAINABLE = ("aqlm", "auto-round", "awq", "bitsandbytes", "gptq", "hqq", "quanto")

# Parts of text models that transformers freezes until it loads their weights: BLT's patcher, whose entropies decide
# where a patch ends. No gradient reaches it, and decay would change it.
UNTRAINED = {"patcher"}


def load_model(
    config: ModelConfig, *, seed: int, vocabulary: int, pad_token_id: int, say: Callable[[str], object] | None = None
) -> PreTrainedModel:
    """The classifier model on the CPU, in fp32.

    Args:
        seed: seed of the weights that the checkpoint does not hold: the score head, added embedding rows, and all
            weights under `init: random`. They are the same on every rank and at every world size.
        vocabulary: len(tokenizer). If the embedding has fewer rows, it grows to this size, rounded up to a multiple
            of 8.
        pad_token_id: written to the model's config; must differ from EOS.
        say: gets a line about a head in the checkpoint that is not used.
    Raises:
        UserError: files or weights are missing, a file is truncated, a weight contains NaN or Inf, or the architecture
            is another one.
    """
    if (adapter := StoredAdapter.of(config)) is not None:
        return _adapted(adapter, config, seed, vocabulary, pad_token_id)
    hf_config = reward_config(config, pad_token_id)
    random = config.init == "random"
    model, note = (_random(config, hf_config, seed), "") if random else _pretrained(config, hf_config)
    if note and say is not None:
        say(note)
    model = model.float()
    check_finite(config, model.named_parameters())
    score = check_score(config, model)
    torch.manual_seed(seed + 1)
    grow(model, vocabulary, pad_token_id)
    if config.head == "fresh":
        with torch.no_grad():
            score.weight.copy_(fresh_head(score.out_features, score.in_features, seed))
    turn_dropout_off(model)
    return train_text_only(model)


def _adapted(
    adapter: StoredAdapter, config: ModelConfig, seed: int, vocabulary: int, pad_token_id: int
) -> PreTrainedModel:
    """The model of an exported adapter: merged, or, if it is trained further, the base model with the stored head."""
    settled = Outputs.settled(config, load_model_config(config))
    try:
        base = adapter.base_config(settled)
        model = load_model(base, seed=seed, vocabulary=vocabulary, pad_token_id=pad_token_id)
    except UserError as error:
        if adapter.base in (reason := str(error)):
            raise UserError(f"the base model of the adapter {adapter.source}: {reason}") from None
        raise
    if config.lora.rank is None:
        adapter.merge_into(model)
    else:
        adapter.load_head(model)
    return train_text_only(model)


def train_text_only(model: PreTrainedModel) -> PreTrainedModel:
    """The model, of which the text model and the score head are trained, and no towers.

    It is in training mode, in which transformers recomputes activations.
    """
    model.eval().requires_grad_(False)
    for part in (text_model(model), cast(nn.Module, model.score)):
        part.train().requires_grad_(True)
    for name in UNTRAINED & dict(text_model(model).named_children()).keys():
        text_model(model).get_submodule(name).requires_grad_(False)
    return model


def reward_config(config: ModelConfig, pad_token_id: int) -> PretrainedConfig:
    """The model's own config, with a label for each output and a padding token.

    Raises UserError when the config cannot be loaded, or for outputs that are not those of a stored head.

    The padding token is None while the embedding has no row for it, because transformers could not build such an
    embedding; `grow` sets it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hf_config = load_model_config(config)
    refuse_quantised(config, hf_config)
    if not brings_code(hf_config, trust_remote_code=config.trust_remote_code):
        try:
            classifier_class(hf_config)
        except UserError as error:
            raise UserError(f"model.name {config.name}: {error}") from None
    outputs = Outputs.of(config, hf_config)
    hf_config.num_labels = len(outputs.names)
    if outputs != Outputs() or hasattr(hf_config, KEY):
        outputs.store(hf_config)
    set_padding(hf_config, pad_token_id if pad_token_id < hf_config.get_text_config().vocab_size else None)
    return hf_config


def refuse_quantised(config: ModelConfig, hf_config: PretrainedConfig) -> None:
    """Raises UserError for weights in a format that cannot be trained, nor merged with what is trained."""
    found = getattr(hf_config, "quantization_config", None) or {}
    method = str((found if isinstance(found, dict) else found.to_dict()).get("quant_method", "")).rpartition(".")[2]
    if method.lower() in UNTRAINABLE:
        raise UserError(
            f"model.name {config.name}: its weights are quantised ({method.lower()}) and cannot be trained: give the "
            "checkpoint that they were made of; model.lora.base=nf4 stores it in 4 bits"
        )


def check_finite(config: ModelConfig, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Raises UserError if a weight contains NaN or Inf: no reward and no gradient of such a model is finite."""
    bounds = ((name, torch.stack(torch.aminmax(weight.detach()))) for name, weight in weights if weight.numel())
    bad = [name for name, least_and_most in bounds if not bool(torch.isfinite(least_and_most).all())]
    if bad:
        (what,) = listed("NaN or Inf in", bad)
        raise UserError(
            f"model.name {config.name}: {what}: the checkpoint is damaged, or its training diverged; choose another one"
        )


def check_score(config: ModelConfig, model: PreTrainedModel) -> nn.Linear:
    """The model's score head. Raises UserError unless it is linear without bias and has an output for each label."""
    score: nn.Module | None = getattr(model, "score", None)
    biased = getattr(score, "bias", None) is not None
    wanted = cast(int, model.config.num_labels)
    if not isinstance(score, nn.Linear) or biased or score.out_features != wanted:
        raise UserError(
            f"model.name {config.name}: {type(model).__name__} has no score head Linear(D, {wanted}) without bias"
        )
    return score


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own config. Raises UserError when it cannot be loaded."""
    if config.name == SYNTHETIC:
        return synthetic_model_config()
    refuse_missing_directory(config.name)
    check_model_directory(config.name)
    try:
        return part_that_reads(
            AutoConfig.from_pretrained(
                config.name, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(unreadable(config, error)) from None


def base_rows(config: ModelConfig) -> int:
    """Rows of the embedding in the files of the model, or of an adapter's base model; `grow` may add to them."""
    adapter = StoredAdapter.of(config)
    base = config if adapter is None else adapter.base_config(config)
    return int(load_model_config(base).get_text_config().vocab_size)


def position_limit(hf_config: PretrainedConfig) -> int | None:
    """Most tokens that the model has positions for, where its config states them."""
    limit = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def random_weights(config: ModelConfig, hf_config: PretrainedConfig, seed: int) -> RandomWeights:
    """A source of random weights for the model. Raises UserError if the config wants a stored head."""
    if config.head == "stored":
        raise UserError("model.head=stored needs model.init=pretrained: random weights have no stored head")
    return RandomWeights(lambda: model_on_meta(hf_config), decoder_layers, seed)


def _random(config: ModelConfig, hf_config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """The model with the weights that a lazy model draws, so that all strategies start equal.

    Where that is not possible, transformers draws them.
    """
    source = random_weights(config, hf_config, seed)
    try:
        if not brings_code(hf_config, trust_remote_code=config.trust_remote_code):
            model = model_on_meta(hf_config)
            blank = {name: torch.empty_like(p, device="cpu") for name, p in model.named_parameters()}
            model.load_state_dict(blank, strict=False, assign=True)
            source.fill({name: (0, weight) for name, weight in blank.items()})
            model.tie_weights()
            return model
    except NoDrawingRule:
        pass
    except ValueError as error:
        raise UserError(unreadable(config, error)) from None
    torch.manual_seed(seed)
    return new_classifier(hf_config, trust_remote_code=config.trust_remote_code)


def refuse_synthetic(config: ModelConfig) -> None:
    """Raises UserError for the synthetic model, which has no pretrained weights."""
    if config.name == SYNTHETIC:
        raise UserError("model.name=synthetic has no pretrained weights: set model.init=random")


def _pretrained(config: ModelConfig, hf_config: PretrainedConfig) -> tuple[PreTrainedModel, str]:
    """The model with the weights of its checkpoint, and a note on them."""
    refuse_synthetic(config)
    own_code = brings_code(hf_config, trust_remote_code=config.trust_remote_code)
    loader: Any = AutoModelForSequenceClassification if own_code else classifier_class(hf_config)
    try:
        check_indices(config.name, config.revision)
        model, report = loader.from_pretrained(
            config.name,
            revision=config.revision,
            config=hf_config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({"trust_remote_code": True} if own_code else {}),
        )
    except UserError as error:
        raise UserError(f"model.name {config.name}: {error}") from None
    except Exception as error:  # safetensors and transformers raise many kinds for files that are not a model
        raise UserError(unreadable(config, error)) from None
    replaced = {SCORE} if config.head == "fresh" else set()
    reshaped = {name: shapes for name, *shapes in report["mismatched_keys"]}
    mismatched = {name: shapes for name, shapes in reshaped.items() if name not in replaced}
    try:
        note = check_found(
            type(model).__name__,
            config.head,
            missing=set(report["missing_keys"]) - set(mismatched) - replaced,
            unexpected=set(report["unexpected_keys"]) - other_heads(model),
            wrong=[f"{name} {list(found)} (expected {list(wanted)})" for name, (found, wanted) in mismatched.items()],
            head_files=head_files(config.name, config.revision),
            holds_score=SCORE in reshaped or SCORE not in report["missing_keys"],
        )
    except UserError as error:
        raise UserError(f"model.name {config.name}: {error}") from None
    return model, note


def unreadable(config: ModelConfig, error: Exception) -> str:
    """The message for model files that cannot be loaded, in one sentence."""
    reason = " ".join(str(error).split())[:300]
    return f"model.name {config.name} cannot be loaded ({type(error).__name__}): {reason}"


# What the names of such probabilities contain, where modules keep them as numbers: residual_dropout, attn_pdrop,
# layerdrop, jitter_noise. Some families call functions with them in place of nn.Dropout.
NOISE = re.compile("drop|jitter|noise")


def turn_dropout_off(model: nn.Module) -> None:
    """Set every dropout probability, and the noise of routers, to 0, in training too.

    PhiMoE's routers draw experts at random in training mode, so they compute in evaluation mode; their jitter is also
    a threshold there, and stays. The self-test refuses models in which anything else is drawn. Source for dropout:
    Ziegler et al., arXiv 1909.08593, p. 3.
    """
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            module.register_forward_pre_hook(_evaluate)
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and NOISE.search(name):
                setattr(module, name, 0.0)


def _evaluate(module: nn.Module, _: object) -> None:
    module.training = False


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of the decoder in `model`, of several classes in a hybrid. FSDP shards them and recompute wraps them.

    They are the outermost list that is as long as the text model's config says, or else the longest list.
    Raises UserError if the model has no list.
    """
    whole = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    text = model if whole is None else text_model(whole)
    lists = [m for m in text.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of decoder layers")
    count = getattr(getattr(text, "config", None), "num_hidden_layers", None)
    return next((m for m in lists if len(m) == count), max(lists, key=len))


def recompute_activations(backbone: PreTrainedModel, how: str) -> None:
    """Activation checkpointing per layer: `full` keeps only the input of a layer, `selective` also matmul outputs.

    `offload` keeps the inputs in host memory (rmcore.model.activation_offload).

    The last layer keeps its activations: its backward comes first, so its activations would have to be in memory then
    in any case.
    """
    if how == "none":
        return
    selective = partial(create_selective_checkpoint_contexts, keep_products) if how == "selective" else None
    arguments = {"use_reentrant": False, "context_fn": partial(recompute_contexts, selective)}
    if hasattr(backbone, "activation_checkpointing_enable"):  # its name in newer transformers
        backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    setattr(decoder_layers(backbone)[-1], "gradient_checkpointing", False)  # noqa: B010 (a plain bool, not a module)
    if how == "offload":
        offload_inputs(backbone)


_MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def keep_products(context: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """The policy of selective recompute: keep the results of matrix products, compute everything else again."""
    return CheckpointPolicy.MUST_SAVE if op in _MATMULS else CheckpointPolicy.PREFER_RECOMPUTE
