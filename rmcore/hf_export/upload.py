"""Pushing an exported model to the Hugging Face hub.

In: a directory that `export_model` made and proved, a repository name. Out: the address of the commit, or a `PushError`
in one line: the model is on disk by then, and a hub that is down must not make a finished run look lost.
Example: push("runs/hh/model", HubConfig(push=True, repo="me/hh-rm")) ->
"https://huggingface.co/me/hh-rm/commit/1f2e...".

The token comes from the environment (HF_TOKEN) or from `hf auth login`; no key of the config holds one.
"""

from __future__ import annotations

from pathlib import Path

from rmcore.config.schema import HubConfig
from rmcore.host.command import ExplainedError, UserError


class PushError(ExplainedError):
    """The hub did not take the model; it is safe on disk."""


def push(directory: str | Path, hub: HubConfig) -> str:
    """Upload the directory as one commit, and return the commit's address.

    A repository or branch that is missing is made; `hub.private` holds for one that is made now.

    Raises:
        UserError: the directory holds no exported model.
        PushError: not logged in, no right to write, no such user, no connection.
    """
    from huggingface_hub import HfApi

    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"{directory} holds no exported model (no config.json); nothing was pushed")
    if hub.repo is None:
        raise PushError("hub.repo is not set; nothing was pushed")
    api, repo = HfApi(), hub.repo
    try:
        repository = api.create_repo(repo, private=hub.private, exist_ok=True).repo_id
        if hub.revision is not None:
            api.create_branch(repository, branch=hub.revision, exist_ok=True)
        commit = api.upload_folder(
            folder_path=directory, repo_id=repository, revision=hub.revision, commit_message="Upload a reward model"
        )
    except Exception as error:  # the hub's client raises many kinds, from its own to those of the HTTP library
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PushError(
            f"could not push to {repo}: {reason}. The model is saved in {directory}; check `hf auth login` or "
            f"HF_TOKEN, then push it with: rmcore push {directory} {repo}"
        ) from error
    return str(commit.commit_url)
