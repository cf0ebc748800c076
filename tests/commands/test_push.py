"""`rmcore push`: the real client of huggingface_hub against a stand-in for the hub on this machine."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.exporting import export
from tests.harness.hub_standin import TOKEN, Hub
from tests.harness.paths import ROOT


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def push(address: str, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run the command in a new process, because huggingface_hub reads its endpoint when it is imported."""
    surroundings = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "rmcore.push", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, **surroundings, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "no_proxy": "*"},
    )


def test_every_byte_arrives_in_the_given_repository_and_branch(tmp_path: Path, hub: Hub) -> None:
    model = tmp_path / "model"
    export(model, max_shard_size="50KB")
    there = {path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert sum(name.endswith(".safetensors") for name in there) > 1, "sharded"
    done = push(hub.address, str(model), "me/hh-rm", "--revision", "v2")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/hh-rm"]
    assert repo["branches"]["v2"] == there and repo["branches"]["main"] == {}
    assert repo["private"] is True or repo["asked"].get("visibility") == "private"
    assert done.stdout.startswith(f"{hub.address}/me/hh-rm/commit/")
    again = push(hub.address, str(model), "me/hh-rm")  # the repository exists already
    assert again.returncode == 0 and repo["branches"]["main"] == there, again.stderr


def test_a_public_repository_with_the_option(tmp_path: Path, hub: Hub) -> None:
    export(tmp_path / "model")
    done = push(hub.address, str(tmp_path / "model"), "us/rm", "--public")
    assert done.returncode == 0, done.stderr
    asked = hub.repos["us/rm"]["asked"]
    assert asked.get("private") is False or asked.get("visibility") == "public"


def test_only_what_an_export_writes_is_uploaded(tmp_path: Path, hub: Hub) -> None:
    """Secrets, links and strangers in the directory stay here and are reported; a link in place of a file ends it."""
    model = tmp_path / "model"
    export(model, max_shard_size="50KB")
    written = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    others = [".env", ".ssh/id_rsa", "notes.txt", "optimizer.safetensors", "model.safetensors.bak", "sub/config.json"]
    others += ["deploy.py", ".git/config", "README.md~", "events.out.tfevents.1"]
    for name in others:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("secret")
    (model / "passwd").symlink_to("/etc/passwd")
    (model / "home").symlink_to(tmp_path, target_is_directory=True)
    done = push(hub.address, str(model), "me/rm")
    assert done.returncode == 0, done.stderr
    assert set(hub.repos["me/rm"]["branches"]["main"]) == written
    assert f"not uploaded: {len(others) + 2} files: .env, " in done.stderr
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "chat_template.jinja").symlink_to("/etc/passwd")
    refused = push(hub.address, str(model), "me/other")
    assert refused.returncode == 2 and "chat_template.jinja is a symbolic link" in refused.stderr
    assert "me/other" not in hub.repos


def test_a_refusal_of_the_hub_is_one_line(tmp_path: Path, hub: Hub) -> None:
    export(tmp_path / "model")
    hub.refuse = ("/api/repos/create",)
    for repo, token, reason in (("them/rm", TOKEN, "rights to create"), ("me/rm", "hf_wrong", "Invalid credentials")):
        refused = push(hub.address, str(tmp_path / "model"), repo, token=token)
        assert refused.returncode == 1 and reason in refused.stderr, refused.stderr
        assert f"saved in {tmp_path / 'model'}" in refused.stderr and refused.stderr.count("\n") == 1
        assert token not in refused.stderr
    assert not hub.repos


def test_an_unreachable_hub_and_a_directory_without_a_model(tmp_path: Path) -> None:
    export(tmp_path / "model")
    with Hub() as gone:
        address = gone.address
    down = push(address, str(tmp_path / "model"), "me/rm")
    assert down.returncode == 1 and "could not push to me/rm" in down.stderr and "Traceback" not in down.stderr
    none = push(address, str(tmp_path), "me/rm")
    assert none.returncode == 2 and "is not an exported model" in none.stderr
