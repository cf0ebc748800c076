"""Loads the tokenizer and prepares the data of a run.

Input: a config.
Output: the tokenizer, and the tokenised train and eval data, read from the token cache if they are there.
Example: hh.yaml -> Pythia's tokenizer and 43,000 comparisons as arrays; the second time within seconds.
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rmcore.config import Config
from rmcore.data.prepare import PreparedData, prepare_data
from rmcore.data.tokens.tokenizer import load_tokenizer
from rmcore.host.hub_access import offline_if_unreachable
from rmcore.model.backbone import load_model_config, position_limit
from rmcore.tracking.data_progress import DataProgress


def prepared(config: Config) -> tuple[PreTrainedTokenizerFast, PreparedData]:
    """The tokenizer and the data of a config, with progress on stderr. Raises UserError."""
    notes: list[str] = []
    tokenizer = load_tokenizer(config, notes.append)
    local = config.model.name == "synthetic" or Path(config.model.name).is_dir()
    with nullcontext() if local else offline_if_unreachable():
        positions = position_limit(load_model_config(config.model))
    with DataProgress() as progress:
        data = prepare_data(config, tokenizer, positions, progress)
    return tokenizer, replace(data, notes=(*notes, *data.notes))
