"""Pushes an exported model to the Hugging Face hub.

Input: a directory that `export_model` wrote and checked, and the section `hub` of the config.
Output: the address of the commit, or a `PushError` of one line, which says that the model is safe on disk.
Example: push("runs/hh/model", HubConfig(push=True, repo="me/hh-rm")) ->
"https://huggingface.co/me/hh-rm/commit/1f2e...".

The token comes from the environment (HF_TOKEN) or from `hf auth login`. The config has no key for it. Only the files
that an export writes are uploaded: an .env or a key that lies next to them stays here.
"""

import json
import re
from pathlib import Path

import huggingface_hub
from transformers.dynamic_module_utils import get_relative_import_files

from rmcore.config.schema import HubConfig
from rmcore.host.command import ExplainedError, UserError
from rmcore.host.terminal import one_line

# What `write_model` leaves in a directory: weights, configs, the files of tokenizers, templates, the card.
EXPORTED = re.compile(
    r"README\.md|rmcore_config\.yaml|config\.json|generation_config\.json"
    r"|adapter_config\.json|adapter_model\.safetensors"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|(vocab|merges)\.txt|[\w.-]+\.model"
    r"|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja"
)


class PushError(ExplainedError):
    """The hub did not accept the model, which is safe on disk."""


def push(directory: str | Path, hub: HubConfig) -> str:
    """Upload the exported files as one commit, and return the address of the commit.

    A missing repository or branch is created; `hub.private` applies only to a repository that is created now.

    Raises:
        UserError: the directory does not hold an exported model, or a file of it is a link.
        PushError: not logged in, no right to write, unknown user or no connection.
    """
    files, _ = exported_files(Path(directory))
    if hub.repo is None:
        raise PushError("hub.repo is not set; nothing was pushed")
    api, repo = huggingface_hub.HfApi(), hub.repo
    try:
        repository = api.create_repo(repo, private=hub.private, exist_ok=True).repo_id
        if hub.revision is not None:
            api.create_branch(repository, branch=hub.revision, exist_ok=True)
        commit = api.upload_folder(
            folder_path=directory,
            repo_id=repository,
            revision=hub.revision,
            commit_message="Upload a reward model",
            allow_patterns=files,
        )
    except Exception as error:  # the hub's client raises many kinds, some of its own, some of the HTTP library
        reason = one_line(error) or type(error).__name__
        raise PushError(
            f"could not push to {repo}: {reason}. The model is saved in {directory}; check `hf auth login` or "
            f"HF_TOKEN, then push it with: rmcore push {directory} {repo}"
        ) from error
    return str(commit.commit_url)


def exported_files(directory: Path) -> tuple[list[str], list[str]]:
    """-> (the files of an exported model, all other files and links), relative to its directory, sorted.

    Raises UserError if there is no exported model, or if one of its files is not a regular file: a link could send any
    file of this machine to the hub.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} is not an exported model (config.json is missing); nothing was pushed")
    found = {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_symlink() or path.is_file()
    }
    wanted = {name for name in found if EXPORTED.fullmatch(name)} | (_code_files(directory) & found)
    for name in sorted(wanted):
        if any(path.is_symlink() for path in (directory / name, *(directory / name).parents[: name.count("/")])):
            raise UserError(f"{directory / name} is a symbolic link; replace it by the file. Nothing was pushed")
    return sorted(wanted), sorted(found - wanted)


def _code_files(directory: Path) -> set[str]:
    """The modules to which `auto_map` refers (model.trust_remote_code), and what they import from this directory."""
    modules: set[str] = set()
    for name in ("config.json", "tokenizer_config.json"):
        try:
            auto_map = json.loads((directory / name).read_bytes()).get("auto_map") or {}
            classes = [one for value in auto_map.values() for one in (value if isinstance(value, list) else [value])]
            modules |= {str(one).rpartition(".")[0] for one in classes if one and "--" not in str(one)}
        except (OSError, ValueError, AttributeError):
            continue
    files = {directory / f"{module}.py" for module in modules if re.fullmatch(r"\w+", module)}
    files = {file for file in files if file.is_file() and not file.is_symlink()}
    imported = {Path(path) for file in files for path in get_relative_import_files(file)}
    root = directory.resolve()
    return {path.resolve().relative_to(root).as_posix() for path in files | imported if root in path.resolve().parents}
