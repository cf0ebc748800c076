"""Writes and reads manifest.json: the run of a checkpoint, and the size and hash of each of its files.

Input: the position, metrics and settings of the run, and the record of each file.
Output: a JSON file that contains its own hash; or a verified `Manifest`.
Example: {"xxh3_128": "9f...", "manifest": {"format": 1, "step": 8, "episode": 512, "files":
{"rank-00000-of-00002.safetensors": ...}}}

The manifest is written last: a directory without a valid manifest is not a checkpoint.
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
    """The contents of manifest.json.

    Attributes:
        step, episode, epoch: the position of the run.
        updates: AdamW's own count of updates.
        data: the fingerprint of the train data.
        config: the resolved configuration, as plain values.
        interval: the sums of the log interval that is under way.
        figures: the metrics of the evaluation at this step, or None.
        keys: the names of all tensors.
        files: name -> size and hash.
        base: with LoRA, the fingerprint of the weights that are not trained. The checkpoint does not contain them.
        progress: with run.patience, the best evaluation and the number since (`rmcore.evaluation.criterion.Progress`).
            Without it the file does not have the key.
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
    progress: dict[str, Any] | None = None


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write and sync manifest.json. Raises OSError."""
    body = {key: value for key, value in finite(asdict(manifest)).items() if key != "progress" or value is not None}
    write_text_atomically(directory / FILE, json.dumps({"xxh3_128": _digest(body), "manifest": body}))


def read_manifest(directory: Path) -> Manifest:
    """Read and verify manifest.json.

    Raises Damaged if it is missing, altered, or of another step than its directory; UserError if its format is unknown.
    """
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
        raise Damaged(f"{FILE} is not a manifest ({type(error).__name__})") from error
    if any(Path(name).name != name or name in (".", "..") for name in files):
        raise Damaged(f"{FILE} lists a file outside its directory")
    if directory.name != f"step-{manifest.step}":
        raise Damaged(f"{FILE} is of step {manifest.step}")
    return manifest


def check_file(directory: Path, name: str, record: FileRecord) -> str | None:
    """The fault of one file of a checkpoint, or None if it is as it was written."""
    try:
        found = hash_file(directory / name)
    except OSError as error:
        return f"{name}: {error.strerror or error}"
    if found.bytes != record.bytes:
        return f"{name} has {found.bytes} bytes, {record.bytes} were written"
    return None if found == record else f"{name} does not match its hash"


def _digest(body: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
