"""Upload of a finished model folder to the Hugging Face hub, in one commit."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from model.loading.hub import REPOSITORY

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*", "adapter_config.json")
LOG_IN = "log in with hf auth login, or set HF_TOKEN, with a token that may write"


def check_push(repository: str) -> None:
    """Checks, before hours or minutes of work, what needs no connection.

    Raises:
        ValueError: if the id is none, there is no token, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, get_token

    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"--push {repository}: is no repository of the hub, such as org/name")
    if constants.is_offline_mode():
        raise ValueError(f"--push {repository}: HF_HUB_OFFLINE forbids to upload; unset it")
    if not get_token():
        raise ValueError(f"--push {repository}: nobody is logged in; {LOG_IN}")


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Uploads a folder, which must be complete, and creates the repository if it does not exist.

    Weights of an earlier upload that the folder does not have are removed in the same commit: left beside the new ones
    they could be loaded. Other files of the repository stay, and all in its subfolders.

    Args:
        private: create it so.

    Returns:
        the address of the commit.

    Raises:
        ValueError: if the hub refuses or cannot be reached, or ``private`` is asked of a public repository.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        info = api.model_info(repository)
        if private and not info.private:
            raise ValueError(
                "the repository exists, and is public; make it private on its page, or leave out --private"
            )
        there = [file.rfilename for file in info.siblings or [] if file.rfilename not in files]
        old = [name for name in there if "/" not in name and any(fnmatch(name, pattern) for pattern in WEIGHTS)]
        operations = [CommitOperationAdd(name, path) for name, path in files.items()]
        deletions = [CommitOperationDelete(name, is_folder=False) for name in old]
        commit = api.create_commit(
            repository, [*operations, *deletions], commit_message=f"Upload {folder.name} with scripts/merge_lora.py"
        )
    except MemoryError:
        raise
    except Exception as error:  # of any kind: its own, the operating system's, the transfer library's
        again = f"{folder} is complete; hf upload {repository} {folder} . tries again"
        raise ValueError(f"--push {repository}: {_reason(error)}. {again}") from error
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    """Why an upload failed, and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403) or isinstance(error, errors.RepositoryNotFoundError):
            return (
                f"the hub does not let this token write there (HTTP {status}): is the organization right? Or {LOG_IN}"
            )
        return f"the hub refused (HTTP {status}): {error.server_message or 'without a reason'}"
    text = " ".join(str(error).split())[:500] or type(error).__name__
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ReadTimeout"):
        return f"the hub {constants.ENDPOINT} cannot be reached ({text})"
    return text
