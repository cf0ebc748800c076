"""Loads the tokenizer, gives it a padding token of its own, and identifies it by a hash.

Input: `config.model`.
Output: a fast tokenizer whose padding token differs from EOS.
Example: a Llama-2 directory, which has no padding token, gives its tokenizer with <unk> as the padding token and the
note "padding token <unk> (id 0): the unknown token, which no text becomes".
"""

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rmcore.config import Config, UserError
from rmcore.data.synthetic import byte_tokenizer
from rmcore.data.tokens.encoder import plain_backend_json
from rmcore.host.hub_access import offline_if_unreachable
from rmcore.host.model_directory import check_model_directory, refuse_missing_directory

# Tokens that vocabularies have for padding, in order of preference; then the names of tokens reserved for the user.
PADDING_NAMES = (
    "<|padding|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|finetune_right_pad_id|>",
    "<|PAD_TOKEN|>",
    "<|vision_pad|>",
)
RESERVED = re.compile(
    r"[<\[]\|?(reserved_special_token_|reserved_token_|reserved|unused|unused_token_|extra_|placeholder)_?\d+\|?[>\]]"
)


@dataclass(frozen=True)
class PaddingReport:
    """How the padding token was chosen.

    `action`: kept (it was right), reserved, unknown (the token for unknown text, in a vocabulary that has every byte)
    or added.
    """

    token: str
    token_id: int
    action: str

    def __str__(self) -> str:
        how = {
            "kept": "the tokenizer's own",
            "reserved": "an unused token of the vocabulary",
            "unknown": "the unknown token, which no text becomes",
            "added": "added to the vocabulary",
        }[self.action]
        return f"padding token {self.token} (id {self.token_id}): {how}"


def load_tokenizer(config: Config, say: Callable[[str], object] | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer of `config.model`, with the padding token of `fix_padding`; `say(line)` reports a changed one.

    `model.name: synthetic` is the embedded byte tokenizer. Raises UserError for missing or broken files, a tokenizer
    that is not fast, or one without an EOS token.
    """
    name = config.model.name
    tokenizer = byte_tokenizer() if name == "synthetic" else _from_files(config)
    if not tokenizer.is_fast:
        raise UserError(
            f"model.name={name}: rmcore needs a fast tokenizer (a tokenizer.json), not {type(tokenizer).__name__}"
        )
    if tokenizer.eos_token is None:
        raise UserError(
            f"model.name={name}: its tokenizer has no EOS token; set eos_token in its tokenizer_config.json"
        )
    report = fix_padding(tokenizer)
    if say is not None and report.action != "kept":
        say(str(report))
    return tokenizer


def _from_files(config: Config) -> PreTrainedTokenizerFast:
    name = config.model.name
    refuse_missing_directory(name)
    check_model_directory(name)
    local = os.path.isdir(name)
    try:
        with contextlib.nullcontext() if local else offline_if_unreachable() as unreachable:
            tokenizer: Any = AutoTokenizer.from_pretrained(
                name,
                revision=config.model.revision,
                trust_remote_code=config.model.trust_remote_code,
            )
    except Exception as error:  # broken files raise OSError, JSONDecodeError, or a bare Exception of tokenizers
        if not local and unreachable is not None:
            raise UserError(
                f"model.name={name}: not in the cache: its tokenizer ({unreachable}). Where there is a connection, "
                f"fetch it with `hf download {name}` and the same HF_HOME, or give a local directory"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"model.name={name}: cannot load its tokenizer ({type(error).__name__}: {reason}). "
            "Check that the directory holds tokenizer.json, or that the hub id is right and reachable or cached"
        ) from error
    return tokenizer


def fix_padding(tokenizer: PreTrainedTokenizerFast) -> PaddingReport:
    """Changes `tokenizer` so that its padding token differs from EOS. A second call changes nothing.

    The first that exists: the tokenizer's own padding token, a token with a name for padding, a reserved token, the
    unknown token if the vocabulary falls back to bytes (then no text becomes it). Otherwise `<pad>` is added, which
    needs an embedding row: rmcore.model.meta_model.grow adds it.
    """
    pad, eos = tokenizer.pad_token, tokenizer.eos_token
    if pad is not None and pad != eos and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return PaddingReport(pad, int(tokenizer.pad_token_id), "kept")
    token, action = _choose_padding(tokenizer)
    tokenizer.add_special_tokens({"pad_token": token})
    return PaddingReport(token, int(tokenizer.pad_token_id), action)


def _choose_padding(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str]:
    used = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    vocabulary = tokenizer.get_vocab()
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} - used
    for token in PADDING_NAMES:
        if token in special or (token in vocabulary and token not in used):
            return token, "reserved"
    # Markers of templates may be special too (<|user|>), so only the name decides what is reserved; lowest id first.
    reserved = [t for t in special if RESERVED.fullmatch(t) and t not in (tokenizer.chat_template or "")]
    if reserved:
        return min(reserved, key=vocabulary.__getitem__), "reserved"
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    unknown = tokenizer.unk_token
    if model.get("byte_fallback") and unknown not in (None, tokenizer.eos_token, tokenizer.bos_token):
        return unknown, "unknown"
    return "<pad>", "added"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash of everything that decides the ids of a text."""
    special = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return xxhash.xxh3_128_hexdigest((json.dumps(plain_backend_json(tokenizer)) + special).encode())
