"""Pushes an exported model to the Hugging Face hub.

Input: a directory that `export_model` wrote and checked, and the section `hub` of the config.
Output: the address of the commit, or a `PushError` of one line, which says that the model is safe on disk.
Example: push("runs/hh/model", HubConfig(push=True, repo="me/hh-rm")) ->
"https://huggingface.co/me/hh-rm/commit/1f2e...".

The token comes from the environment (HF_TOKEN) or from `hf auth login`. The config has no key for it.
"""

from pathlib import Path

import huggingface_hub

from rmcore.config.schema import HubConfig
from rmcore.host.command import ExplainedError, UserError


class PushError(ExplainedError):
    """The hub did not accept the model, which is safe on disk."""


def push(directory: str | Path, hub: HubConfig) -> str:
    """Upload the directory as one commit, and return the address of the commit.

    A missing repository or branch is created; `hub.private` applies only to a repository that is created now.

    Raises:
        UserError: the directory does not hold an exported model.
        PushError: not logged in, no right to write, unknown user or no connection.
    """
    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"{directory} is not an exported model (config.json is missing); nothing was pushed")
    if hub.repo is None:
        raise PushError("hub.repo is not set; nothing was pushed")
    api, repo = huggingface_hub.HfApi(), hub.repo
    try:
        repository = api.create_repo(repo, private=hub.private, exist_ok=True).repo_id
        if hub.revision is not None:
            api.create_branch(repository, branch=hub.revision, exist_ok=True)
        commit = api.upload_folder(
            folder_path=directory, repo_id=repository, revision=hub.revision, commit_message="Upload a reward model"
        )
    except Exception as error:  # the hub's client raises many kinds, some of its own, some of the HTTP library
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PushError(
            f"could not push to {repo}: {reason}. The model is saved in {directory}; check `hf auth login` or "
            f"HF_TOKEN, then push it with: rmcore push {directory} {repo}"
        ) from error
    return str(commit.commit_url)
