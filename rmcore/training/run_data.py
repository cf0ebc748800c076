"""The tokenizer and the data of a run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from rmcore.config import Config
from rmcore.data.prepare import PreparedData


def prepared(config: Config) -> tuple[PreTrainedTokenizerFast, PreparedData]:
    """The tokenizer and the data of a config, with progress on stderr. Raises UserError."""
    from dataclasses import replace

    from rmcore.data.prepare import prepare_data
    from rmcore.data.tokens.tokenizer import load_tokenizer
    from rmcore.host.hub_access import offline_if_unreachable
    from rmcore.model.backbone import load_model_config
    from rmcore.tracking.data_progress import DataProgress

    notes: list[str] = []
    tokenizer = load_tokenizer(config, notes.append)
    local = config.model.name == "synthetic" or Path(config.model.name).expanduser().is_dir()
    with nullcontext() if local else offline_if_unreachable():
        positions = getattr(load_model_config(config.model), "max_position_embeddings", None)
    with DataProgress() as progress:
        data = prepare_data(config, tokenizer, positions, progress)
    return tokenizer, replace(data, notes=tuple(notes))
