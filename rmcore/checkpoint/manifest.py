"""manifest.json: what a checkpoint is of, and the size and hash of each of its files; it carries its own hash.

Enters: the position, figures and settings of the run, the record of each file. Leaves: a JSON file, or a checked
`Manifest`. A checkpoint without a good manifest is none: it is written last. Example: {"xxh3_128": "9f...",
"manifest": {"format": 1, "step": 8, "episode": 512, "files": {"rank-00000-of-00002.safetensors": ...}}}
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from rmcore.checkpoint.shards import Damaged, FileRecord, hash_file
from rmcore.config import UserError
from rmcore.host.files import finite, write_text_atomically

FORMAT = 1
FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """`step`, `episode`, `epoch`: the position. `updates`: AdamW's count. `keys`: names of all tensors.

    `figures`: of the evaluation at this step, or None. `interval`: sums of the log interval that is half full.
    `data`: the fingerprint of the train data. `base`: with LoRA, that of the weights that are not trained, which the
    checkpoint leaves to the base model. `config`: the resolved configuration. `files`: name -> size and hash.
    """

    step: int
    episode: int
    epoch: float
    updates: int
    world_size: int
    strategy: str
    rmcore: str
    data: str
    config: dict[str, Any]
    interval: list[float]
    figures: dict[str, Any] | None
    keys: list[str] = field(default_factory=list)
    files: dict[str, FileRecord] = field(default_factory=dict)
    format: int = FORMAT
    base: str = ""

    @property
    def quality(self) -> tuple[float, float] | None:
        """Larger is better: accuracy, then the lower loss. None without an evaluation."""
        figures = self.figures or {}
        if figures.get("eval/rm/accuracy") is None or figures.get("eval/rm/loss") is None:
            return None
        return figures["eval/rm/accuracy"], -figures["eval/rm/loss"]


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write and sync manifest.json. Raises OSError."""
    body = finite(asdict(manifest))
    write_text_atomically(directory / FILE, json.dumps({"xxh3_128": _digest(body), "manifest": body}))


def read_manifest(directory: Path) -> Manifest:
    """Raises Damaged: missing, empty, altered, or of another step than the directory; UserError: another format."""
    try:
        content = json.loads((directory / FILE).read_bytes())
        body = content["manifest"]
        if content["xxh3_128"] != _digest(body):
            raise Damaged(f"{FILE} does not match its hash")
        if body["format"] != FORMAT:
            raise UserError(f"{directory / FILE} has format {body['format']}, not the {FORMAT} that is read here")
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        manifest = Manifest(**{**body, "files": files})
    except OSError as error:
        raise Damaged(f"{FILE}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{FILE} is no manifest ({type(error).__name__})") from error
    if any(Path(name).name != name or name in (".", "..") for name in files):
        raise Damaged(f"{FILE} names a file outside its directory")
    if directory.name != f"step-{manifest.step}":
        raise Damaged(f"{FILE} is of step {manifest.step}")
    return manifest


def check_file(directory: Path, name: str, record: FileRecord) -> str | None:
    """What is wrong with one file of a checkpoint, None when nothing is."""
    try:
        found = hash_file(directory / name)
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    if found.bytes != record.bytes:
        return f"{name} has {found.bytes} bytes, {record.bytes} were written"
    return None if found == record else f"{name} does not match its hash"


def _digest(body: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
