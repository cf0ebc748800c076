"""One test for each security promise of rmcore. The laws on source code are in test_project.py."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import xxhash

from rmcore.checkpoint.manifest import read_manifest
from rmcore.checkpoint.shards import Damaged, hash_file
from rmcore.config.help import keys_of
from rmcore.config.schema import Config
from tests.harness.crash import Fault, run
from tests.harness.paths import ROOT
from tests.harness.small_run import arguments, reference, same

PLANTED = "hf_" + "PLANTEDsecretDoNotShow"  # in two parts, so that this file does not hold it


class Touch:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_place_of_a_shard_is_never_run(tmp_path: Path) -> None:
    """Even if the manifest has the right hash: the file is read as safetensors and rejected."""
    given = arguments(tmp_path)
    killed = run(tmp_path / "run", given, 1, [Fault("save.copy", "kill", 0, 3)])
    trap = tmp_path / "it-ran"
    for step in (2, 4):
        checkpoint = killed.directory / "checkpoints" / f"step-{step}"
        shard = checkpoint / "rank-00000-of-00001.safetensors"
        shard.write_bytes(pickle.dumps(Touch(trap)))
        record = hash_file(shard)
        forge(checkpoint, files={shard.name: {"bytes": record.bytes, "xxh3_128": record.xxh3_128}})
    refused = run(killed.directory, given, 1)
    assert refused.codes == [2] and "does not fit this model" in refused.text, refused.text
    assert "Traceback" not in refused.text and not trap.exists()


def forge(checkpoint: Path, **changes: object) -> None:
    """Rewrite a manifest with a matching hash, as an attacker would."""
    path = checkpoint / "manifest.json"
    body = {**json.loads(path.read_text(encoding="utf-8"))["manifest"], **changes}
    digest = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    path.write_text(json.dumps({"xxh3_128": digest, "manifest": body}), encoding="utf-8")


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/hostname", "..", "a/b", ".", "a\\..\\..\\b/../c"])
def test_a_manifest_cannot_list_files_outside_its_directory(tmp_path: Path, name: str) -> None:
    given = arguments(tmp_path)
    outcome = run(tmp_path / "run", given, 1)
    checkpoint = outcome.directory / "checkpoints" / "step-8"
    forge(checkpoint, files={name: {"bytes": 1, "xxh3_128": "0"}})
    with pytest.raises(Damaged, match="outside its directory"):
        read_manifest(checkpoint)


def test_a_link_out_of_the_checkpoint_is_not_deleted_through(tmp_path: Path) -> None:
    """Retention deletes links in the checkpoint directory, but not the targets of the links."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("here", encoding="utf-8")
    root = tmp_path / "run" / "checkpoints"
    root.mkdir(parents=True)
    (root / ".tmp-step-9").symlink_to(precious)
    (root / ".trash-step-1").symlink_to(precious)
    outcome = run(tmp_path / "run", arguments(tmp_path), 1)
    assert outcome.codes == [0], outcome.text
    assert (precious / "file").read_text(encoding="utf-8") == "here"


def test_remote_code_is_off_by_default_loud_when_on_and_pinnable(tmp_path: Path) -> None:
    fields = {key.name: key for key in keys_of(Config)}
    assert fields["model.trust_remote_code"].default == "false" and "model.revision" in fields
    quiet = reference(tmp_path, size=1)
    assert "trust_remote_code" not in quiet.text
    loud = run(tmp_path / "loud", arguments(tmp_path, "model.trust_remote_code=true"), 1)
    assert "warning: model.trust_remote_code is on" in loud.text and "NOT pinned" in loud.text, loud.text
    assert same(loud, quiet)


def test_the_code_of_a_model_does_not_run_by_default(tmp_path: Path) -> None:
    """A model directory whose config refers to its own Python file is refused, and the file is not imported."""
    model = tmp_path / "model"
    model.mkdir()
    trap = tmp_path / "it-ran"
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(trap)!r})\n", encoding="utf-8")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"}}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused = run(tmp_path / "run", arguments(tmp_path, f"model.name={model}"), 1)
    assert refused.codes == [2] and "Traceback" not in refused.text, refused.text
    assert not trap.exists()


def test_there_is_no_key_for_a_token() -> None:
    words = {word for key in keys_of(Config) for word in re.split(r"[._]", key.name)}
    assert not words & {"token", "key", "secret", "password", "auth", "credential", "login"}


def test_a_token_of_the_environment_is_written_nowhere(tmp_path: Path) -> None:
    """A whole run with export, card, TensorBoard and a failure: the planted token is in no file and in no output."""
    secret = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), PLANTED)
    given = arguments(tmp_path, "log.tensorboard=true")
    outcome = run(tmp_path / "run", given, 1, publish=True, environment=secret)
    assert outcome.codes == [0], outcome.text
    failed = run(tmp_path / "failed", given, 1, [Fault("compute", "raise", 0, 3)], environment=secret)
    assert failed.codes == [1]
    assert (tmp_path / "run" / "model" / "README.md").exists() and list((tmp_path / "run" / "tensorboard").iterdir())
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and PLANTED.encode() in path.read_bytes()]
    assert holders == [] and PLANTED not in outcome.text + failed.text
    searched = sum(path.is_file() for path in tmp_path.rglob("*"))
    assert searched > 20, "the search saw the run's files"


def test_templates_render_in_a_sandbox(tmp_path: Path) -> None:
    rows = tmp_path / "chat.jsonl"
    turn = {"role": "user", "content": "Hi"}
    chosen, rejected = ([turn, {"role": "assistant", "content": text}] for text in ("yes", "no"))
    rows.write_text((json.dumps({"chosen": chosen, "rejected": rejected}) + "\n") * 8, encoding="utf-8")
    trap = tmp_path / "it-ran"
    for number, attack in enumerate(
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ cycler.__init__.__globals__.os.mkdir('" + str(trap) + "') }}",
            "{{ messages.append(1) }}",
        )
    ):
        template = tmp_path / f"{number}.jinja"
        template.write_text(attack, encoding="utf-8")
        given = arguments(tmp_path, f"data.template={template}", f"data.train.path={rows}")
        refused = run(tmp_path / f"run-{number}", given, 1)
        assert refused.codes == [2] and "Traceback" not in refused.text, refused.text
    assert not trap.exists()


def test_every_tensorboard_command_binds_to_localhost() -> None:
    """In everything that rmcore prints, writes or documents."""
    command = re.compile(r"tensorboard\b[^`\n]*--logdir[^`\n]*")
    found = []
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "rmcore").rglob("*.md"),
        *(ROOT / "rmcore").rglob("*.py"),
        *(ROOT / "launch").iterdir(),
        *(path for path in (ROOT / "configs").rglob("*") if path.is_file()),
    ]:
        text = path.read_text(encoding="utf-8")
        found += [match.group() for match in command.finditer(text)]
        assert "--bind_all" not in text, path
    assert found and all("--host localhost" in line for line in found), found
