"""Writes the model card of an exported reward model: README.md with the front matter that the hub reads.

Input: the resolved config, the report of the data, the metrics of the last evaluation. Output: Markdown.
Example: base model EleutherAI/pythia-1b-deduped, 43,835 of 44,849 rows kept, held-out accuracy 0.684 (0.672 to 0.696).
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from rmcore import __version__
from rmcore.config import Config
from rmcore.data.tokens.comparisons import TokenizedComparisons
from rmcore.evaluation.metrics import prefix, sentences, table
from rmcore.hf_export.adapter import AdapterParts
from rmcore.hf_export.parts import Parts
from rmcore.host.markdown import markdown_code, markdown_text
from rmcore.model.objectives import ONE
from rmcore.model.outputs import Outputs
from rmcore.scoring.normalisation import Normalisation

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

USE = """\
The reward of a text is the model's only logit, without sigmoid or softmax. Only differences between answers to the same
prompt have a meaning. {padding}

With transformers:

```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}")
{tokenize}
with torch.no_grad():
    reward = model(input_ids=ids).logits[0, 0].item()
```

"""

VLLM = """\
With vLLM:

```python
from vllm import LLM

llm = LLM(model="{name}", runner="pooling", dtype="{dtype}")
[output] = llm.encode([{{"prompt_token_ids": ids[0].tolist()}}], pooling_task="classify")
reward = output.outputs.data.item()
```

Without `dtype`, vLLM computes fp32 weights in half precision. {served}
"""

ADAPTER_USE = """\
This directory holds a LoRA adapter and the score head; peft loads them onto the base model {base}.
The reward of a text is the model's only logit, without sigmoid or softmax. Only differences between answers to the same
prompt have a meaning. Pad on the right or not at all.

```python
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoPeftModelForSequenceClassification.from_pretrained(
    "{name}", num_labels={labels}, pad_token_id=tokenizer.pad_token_id
).eval()
{tokenize}
with torch.no_grad():
    reward = model(input_ids=ids).logits[0, 0].item()
```

`rmcore score`, `evaluate` and `serve` take the directory as it is. `rmcore export {name} -o DIR` merges it into a plain
model for other programs.{stored}
"""

STORED = """

The adapter was trained on the base model's weights in {stored}, which rmcore makes again and merges. The code above
loads them in full precision, so its rewards differ a little."""

PADDED = """\
You may pad on the right or not at all: the model reads the reward at the last token before the padding."""

ALONE = """\
Never pad a text: padding changes the rewards of this model. Compute each text by itself."""

SERVED_TEXTS = """\
`vllm serve {name} --runner pooling --dtype {dtype}` returns the reward of a whole text from `/classify` (`input`), and
from `/score` that of a prompt and an answer, which it joins."""

SERVED_TURNS = """\
`vllm serve {name} --runner pooling --dtype {dtype}` returns the reward of a conversation (`messages`) or of a rendered
text (`input`) from `/classify`. Its `/score` joins two texts and does not use the chat template: give it the rendered
prompt, up to where the answer begins, and the answer with what the template writes behind it."""

# Of a model with towers, in place of VLLM: where the text model can be exported alone, and where it cannot.
TOWERS = """\
With vLLM: `rmcore export RUN -o DIR export.towers=false` writes the text model alone, which vLLM loads. This directory
also holds the towers for images or sound, which take no part in a reward.
"""

TOWERS_ONLY = """\
With vLLM: `LLM(model="{name}", runner="pooling", dtype="{dtype}", limit_mm_per_prompt={{"image": 0, "video": 0}})`
leaves out the towers for images, which take no part in a reward. vLLM 0.32 computes the rewards of Qwen 3 VL so. It
refuses families whose language model has a head of its own there, such as Qwen 2.5 VL.
"""

# Of a class that rmcore made: (what the text above has, what it has here).
MADE = (
    ("With transformers:", "Transformers has no class for this model with a linear score head. With rmcore:"),
    (
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n",
        "from transformers import AutoConfig, AutoTokenizer\n\nfrom rmcore.model.classifier import classifier_class\n",
    ),
    ("AutoModelForSequenceClassification", 'classifier_class(AutoConfig.from_pretrained("{name}"))'),
)

NORMALISED = """
`config.json` holds the mean and deviation of {what}: `"pooler_config": {stored}`. The weights
are not changed, so the code above gives raw rewards. `rmcore score --normalise` and `rmcore serve --normalise` return
(reward - {logit_mean:.6g}) / {logit_sigma:.6g}.
"""

NORMALISED_VLLM = """\
So does vLLM (0.20 or newer) with this option:

```
vllm serve {name} --runner pooling --dtype {dtype} --pooler-config '{stored}'
```
"""

CALIBRATED = """
`config.json` holds the temperature {temperature:.6g}, fitted on held-out data. The probabilities of several answers to
a prompt are softmax(rewards / {temperature:.6g}). `rmcore score` and `rmcore serve` (/rewards) return them.
"""

LIMITS = """\
- The level of a reward has no meaning by itself: training fixes only differences between answers to the same prompt.
- The model was trained on texts of at most {tokens} tokens. Longer texts, other languages and other templates are
  untested.
- A reward model also learns the mistakes of its annotators and their preference for long answers. A policy that is
  optimised against it will find and use its errors."""

TRAINING = """\
`torchrun --nproc_per_node N -m rmcore.train rmcore_config.yaml`, with the file of this repository:

<details><summary>configuration</summary>

{yaml}

</details>"""

WITH_TEMPLATE = """\
turns = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]
ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=False)"""

WITHOUT_TEMPLATE = """\
text = "prompt and answer as in the data" + tokenizer.eos_token
ids = tokenizer(text, return_tensors="pt").input_ids"""


def model_card(
    config: Config,
    *,
    wants_text: bool,
    data: TokenizedComparisons | None = None,
    metrics: Mapping[str, Any] | None = None,
    normalisation: Normalisation | None = None,
    outputs: Outputs = ONE,
    temperature: float | None = None,
    made: bool = False,
    adapter: AdapterParts | None = None,
    alone: bool = False,
    parts: Parts | None = None,
) -> str:
    """README.md of the exported directory.

    Args:
        config: the resolved configuration of the run.
        wants_text: the template takes plain texts, not turns.
        data: the prepared training data; None if it is no longer available.
        metrics: of the last evaluation, as `Evaluations.metrics`; None or empty without evaluation.
        normalisation: the mean and deviation that config.json holds.
        outputs: of the score head.
        temperature: of the probabilities, as config.json holds it.
        made: transformers has no class for the model (rmcore.model.classifier.is_made).
        adapter: what an adapter states; None for a whole model.
        alone: padding changes the rewards (`ALONE` of rmcore.model.reward_model).
        parts: what of the model the directory holds.
    """
    base = adapter.base if adapter else config.model.name
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    front["tags"] = ["reward-model", "rmcore"]
    if adapter:
        front |= {"library_name": "peft", "tags": [*front["tags"], "lora"]}
    if HUB_ID.fullmatch(base) and not os.path.isdir(base):
        front["base_model"] = base
    name: Any = config.hub.repo if HUB_ID.fullmatch(config.hub.repo or "") else "path/to/this/directory"
    dtype = "bfloat16" if config.parallel.precision == "bf16" else "float32"
    use = _use(name, dtype, wants_text, normalisation, made, "the rewards of held-out answers", parts)
    if adapter:
        use = _adapter_use(name, adapter, len(outputs.names), wants_text)
    if alone:
        use = use.replace(PADDED, ALONE)
    if not outputs.single:
        use = _of_several(use, outputs)
    if temperature is not None:
        use += "\n" + CALIBRATED.format(temperature=temperature).rstrip()
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# A reward model on {markdown_text(base)}",
        f"Trained by rmcore {__version__} with the objective {', '.join(f'`{loss.name}`' for loss in config.losses)}.",
        "## Use\n\n" + use,
        "## Data\n\n" + _data(config, data),
        "## Metrics\n\n" + _metrics(metrics or {}),
        "## Limits\n\n" + LIMITS.format(tokens=config.data.max_tokens),
        "## Training\n\n" + TRAINING.format(yaml=markdown_code(config.dump_yaml().strip(), "yaml")),
    ]
    return "\n\n".join(sections) + "\n"


def converted_card(
    source: str, *, wants_text: bool, normalisation: Normalisation | None, made: bool, parts: Parts | None = None
) -> str:
    """README.md of a directory that was not trained here: how to use it, and where it comes from."""
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-classification"}
    front["tags"] = ["reward-model"]
    if HUB_ID.fullmatch(source) and not os.path.isdir(source):
        front["base_model"] = source
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        f"# {markdown_text(source)} as a plain reward model",
        f"Converted by rmcore {__version__}; the reward head is `score`.",
        "## Use\n\n"
        + _use("path/to/this/directory", "float32", wants_text, normalisation, made, "the original rewards", parts),
    ]
    return "\n\n".join(sections) + "\n"


def average_card(models: Sequence[str], *, made: bool) -> str:
    """README.md of the average of several models."""
    names = "\n".join(f"- {markdown_code(model)}" for model in models)
    front = {"library_name": "transformers", "pipeline_tag": "text-classification", "tags": ["reward-model", "rmcore"]}
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False).strip()}\n---",
        "# An average of reward models",
        f"Averaged by rmcore {__version__}: each weight is the mean of that weight in {len(models)} models (WARM, "
        f"arXiv 2401.12187).\n\n{names}",
        "## Use\n\n" + _use("path/to/this/directory", "float32", False, None, made, ""),
        "## Metrics\n\nThe average was not evaluated. `rmcore evaluate` measures it.",
    ]
    return "\n\n".join(sections) + "\n"


def _use(
    name: str,
    dtype: str,
    wants_text: bool,
    normalisation: Normalisation | None,
    made: bool,
    what: str,
    parts: Parts | None = None,
) -> str:
    """The code that loads the model and computes a reward in `dtype`; `what` the normalisation was measured on."""
    towers = bool(parts and parts.towers)
    use = USE + ((TOWERS if parts and parts.separable else TOWERS_ONLY) if towers else VLLM)
    for ours, theirs in MADE if made else ():
        use = use.replace(ours, theirs)
    served = (SERVED_TEXTS if wants_text else SERVED_TURNS).format(name=name, dtype=dtype)
    tokenize = WITHOUT_TEMPLATE if wants_text else WITH_TEMPLATE
    use = use.format(name=name, dtype=dtype, padding=PADDED, served=served, tokenize=tokenize)
    if normalisation is not None:
        stored = normalisation.stored()
        text = NORMALISED if towers else NORMALISED + NORMALISED_VLLM
        use += text.format(name=name, dtype=dtype, what=what, stored=json.dumps(stored), **stored)
    return use.rstrip()


def _adapter_use(name: str, adapter: AdapterParts, labels: int, wants_text: bool) -> str:
    """The code that loads an adapter and computes a reward."""
    stored = STORED.format(stored=adapter.lora.base) if adapter.lora.base != "fp32" else ""
    tokenize = WITHOUT_TEMPLATE if wants_text else WITH_TEMPLATE
    base = markdown_text(adapter.base)
    return ADAPTER_USE.format(name=name, base=base, labels=labels, tokenize=tokenize, stored=stored).rstrip()


def _of_several(use: str, outputs: Outputs) -> str:
    """The section on use for a model whose reward is made of several outputs."""
    terms = " + ".join(f"{w:g} x {name}" for name, w in zip(outputs.names, outputs.weights, strict=True) if w)
    named = f"The outputs of the model are {', '.join(outputs.names)}, in this order. The reward of a text is {terms}"
    weights = f"torch.tensor({list(outputs.weights)})"
    changes = (
        ("The reward of a text is the model's only logit", markdown_text(named)),
        ("model(input_ids=ids).logits[0, 0].item()", f"(model(input_ids=ids).logits[0] @ {weights}).item()"),
        ("output.outputs.data.item()", f"(output.outputs.data @ {weights}).item()"),
    )
    for one, several in changes:
        use = use.replace(one, several)
    return use


def _data(config: Config, data: TokenizedComparisons | None) -> str:
    sources = ", ".join(markdown_text(f"{source.path} ({source.split})") for source in config.data.train)
    lines = [f"{sources}; template {markdown_code(config.data.template)}, at most {config.data.max_tokens} tokens.", ""]
    if data is None:
        return "\n".join([*lines, "The counts were not available when this directory was written."])
    report = data.report
    lines.append(f"{report.get('kept', 0):,} of {report.get('rows', 0):,} rows were kept.")
    lines += [
        f"- dropped, {markdown_text(reason)}: {rows:,}" for reason, rows in dict(report.get("dropped", {})).items()
    ]
    if data.fingerprint:
        lines += ["", f"Fingerprint of the tokenised data: `{data.fingerprint}`."]
    return "\n".join(lines)


def _metrics(metrics: Mapping[str, Any]) -> str:
    """Table and sentences; of several evaluation sets one after the other, each under its name."""
    if "sets" in metrics:
        return "\n\n".join(f"### {prefix(name).rstrip('/')}\n\n{_metrics(m)}" for name, m in metrics["sets"].items())
    if "accuracy" not in metrics:
        return "The run had no evaluation."
    heads, rows = table(metrics, "card")
    head, *lines = [f"| {' | '.join(map(markdown_text, cells))} |" for cells in [["data", *heads[1:]], *rows]]
    return "\n".join([head, "|---" * len(heads) + "|", *lines, "", *sentences(metrics, card=True)])
