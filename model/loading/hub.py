"""Folders and files by the ids of the Hugging Face hub, such as ``liuhaotian/llava-v1.5-7b@main``.

Cache, offline mode, tokens, mirrors and progress bars are huggingface_hub's own, with its environment variables
(``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``, ``HF_ENDPOINT``). No code of a repository is downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
ID = re.compile(rf"(?P<repo>{REPOSITORY.pattern})(@(?P<revision>[^:@\s]+))?(:(?P<file>[^:\s]+))?")
CACHED = re.compile(r".*/(?:models|datasets)--(.+?)--(.+?)/snapshots/([0-9a-f]{40})(?:/(.+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
EXPLICIT = "hub:"  # an id, even where a folder has its name
SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")  # settings, tokenizers, chat templates
SAFETENSORS = ("model*.safetensors", "adapter_model.safetensors", "trained_parts.safetensors")
SHARDS = ("pytorch_model*.bin",)
DATA = ("jsonl", "parquet", "jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")  # of data sets, in either case
SAM_REPOSITORY = "ybelkada/segment-anything"
SAM_FILES = {  # short name -> Meta's file in SAM_REPOSITORY, its SHA-256
    "sam_vit_b": (
        "checkpoints/sam_vit_b_01ec64.pth",
        "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    ),
    "sam_vit_l": (
        "checkpoints/sam_vit_l_0b3195.pth",
        "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    ),
    "sam_vit_h": (
        "checkpoints/sam_vit_h_4b8939.pth",
        "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
    ),
}


@dataclass(frozen=True)
class Resolved:
    """A file or folder on this machine, and its name for logs: ``org/name@<commit hash>[:file]``, or the path given."""

    path: Path
    name: str


@dataclass(frozen=True)
class _Parts:
    """Of an id: repository, branch, tag or commit, and file."""

    repo: str
    revision: str | None = None
    file: str = ""


class _DamagedError(Exception):
    """A file of the cache that is not the hub's."""


def name_of(path: str | Path) -> str:
    """The name of a path as ``Resolved`` has it: ``org/name@<commit hash>[:file]`` in the hub's cache."""
    match = CACHED.fullmatch(str(path))
    return f"{match[1]}/{match[2]}@{match[3]}" + (f":{match[4]}" if match[4] else "") if match else str(path)


def repository_of(name: str) -> str | None:
    """``org/name`` of a name with a commit hash; None for a path."""
    match = ID.fullmatch(name)
    return match["repo"] if match and COMMIT.fullmatch(match["revision"] or "") else None


def resolve_folder(text: str | Path, flag: str, download: bool = True) -> Resolved:
    """The folder of a model: a path, or a repository of the hub, which is downloaded unless the cache holds it.

    Args:
        text: a path, ``org/name`` or ``org/name@revision`` (a branch, tag or commit). A path that exists comes first;
            ``hub:org/name`` is never a path.
        flag: that gave the text, for messages.
        download: what the cache lacks; otherwise that is an error.

    Raises:
        ValueError: if there is neither such a folder nor such a repository, or the hub refuses, cannot be reached, or
            gives another file than it lists.
    """
    text = str(text)
    if (parts := _parse(text, flag, "folder")) is None:
        if not Path(text).is_dir():
            raise ValueError(f"{flag} {text}: is no folder")
        return Resolved(Path(text), text)
    if parts.file:
        raise ValueError(f"{flag} {text}: names a file; this takes a whole repository, such as {parts.repo}")
    return _folder(parts, f"{flag} {text}", download)


def resolve_file(text: str | Path, flag: str, download: bool = True) -> Resolved:
    """A SAM: a path, ``org/name:file``, ``org/name@revision:file``, or a short name of Meta's files (``SAM_FILES``).

    ``org/name`` without a file is a folder of transformers' ``SamModel``, as for ``resolve_folder``.

    Raises:
        ValueError: as ``resolve_folder``, and if the file is not the one that a short name stands for.
    """
    text = str(text)
    short, sha256 = SAM_FILES.get(text, ("", ""))
    address = f"{SAM_REPOSITORY}:{short}" if short and not Path(text).exists() else text
    if (parts := _parse(address, flag, "file", f", org/name:file, or {', '.join(SAM_FILES)}")) is None:
        return Resolved(Path(text), text)
    what = f"{flag} {address}"
    if not parts.file:
        return _folder(parts, what, download)
    folder = _snapshot(parts, "model", (parts.file,), what, download)
    path = folder / parts.file
    if not path.is_file():
        raise ValueError(
            f"{what}: the repository has no such file; {_page(parts.repo)}/tree/{folder.name} lists what it has"
        )
    if sha256 and (_blob_of(path).name if path.is_symlink() else _hash(path, sha256)) != sha256:
        raise ValueError(
            f"{what}: is not Meta's file, whose SHA-256 is {sha256}; download that from segment-anything's "
            "page and give its path"
        )
    return Resolved(path, name_of(path))


def resolve_dataset(text: str, flag: str) -> Resolved:
    """A data set's folder or file: any path, as it is, or ``hub:org/name``, with ``@revision`` and ``:file``.

    JSONL and parquet files and images are downloaded, with their folders.

    Raises:
        ValueError: as ``resolve_folder``.
    """
    if not text.startswith(EXPLICIT):
        return Resolved(Path(text), text)
    parts = _parse(text, flag, "data set", f", {EXPLICIT}org/name:file")
    assert parts is not None, "an explicit id is no path"
    patterns = tuple(f"*.{suffix}" for name in DATA for suffix in (name, name.upper()))
    path = _snapshot(parts, "dataset", patterns, f"{flag} {text}") / parts.file
    if not path.exists():
        page = f"{_page(parts.repo, 'dataset')}/tree/{parts.revision or 'main'}"
        raise ValueError(f"{flag} {text}: the repository has no such file; {page} lists what it has")
    return Resolved(path, name_of(path))


def _parse(text: str, flag: str, kind: str, forms: str = "") -> _Parts | None:
    """The parts of an id; None for a path that exists.

    Args:
        kind: ``file`` or ``folder``, for messages; forms: that the flag takes beside ``org/name``, for messages.
    """
    explicit = text.startswith(EXPLICIT)
    if text and not explicit and Path(text).exists():
        return None
    match = ID.fullmatch(text.removeprefix(EXPLICIT))
    if match is None:
        raise ValueError(
            f"{flag} {text or '(empty)'}: no such {kind}; give a path, or a repository of the hub: org/name, "
            f"org/name@revision{forms}"
        )
    top = Path(text).parts[0]
    if not explicit and Path(top).exists() and not COMMIT.fullmatch(match["revision"] or ""):
        raise ValueError(
            f"{flag} {text}: no such {kind}, though {top} is there. Correct the path; if the hub's repository "
            f"{match['repo']} is meant, write {EXPLICIT}{text}"
        )
    return _Parts(match["repo"], match["revision"], match["file"] or "")


def _folder(parts: _Parts, what: str, download: bool) -> Resolved:
    folder = _snapshot(parts, "model", (*SMALL, *SAFETENSORS), what, download)
    if not _holds(folder, SAFETENSORS):
        folder = _snapshot(_Parts(parts.repo, folder.name), "model", SHARDS, what, download)
        if not _holds(folder, SHARDS):
            raise ValueError(
                f"{what}: the repository holds none of {', '.join((*SAFETENSORS, *SHARDS))}, or the hub was not asked "
                f"and the cache {folder} lacks them"
            )
    return Resolved(folder, name_of(folder))


def _holds(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(path for pattern in patterns for path in folder.glob(pattern))


def _snapshot(parts: _Parts, kind: str, patterns: tuple[str, ...], what: str, download: bool = True) -> Path:
    """The folder of a commit in huggingface_hub's cache, with the files that match; its name is the commit hash.

    Args:
        kind: ``model`` or ``dataset``.
        what: the flag and its value, for messages.
    """
    try:
        return _download(parts.repo, parts.revision, kind, patterns, download)
    except MemoryError:
        raise
    except Exception as error:  # of any kind: its own, the operating system's, the transfer library's
        raise ValueError(f"{what}: {_reason(error, parts, kind)}") from error


@functools.cache  # a branch that moves meanwhile must not give two commits to one run
def _download(repo: str, revision: str | None, kind: str, patterns: tuple[str, ...], download: bool) -> Path:
    from huggingface_hub import snapshot_download, utils  # here: --help need not wait for it

    if os.environ.get("RANK", "0") != "0":
        utils.disable_progress_bars()  # one process shows them
    started = time.time() - 1  # a file's time is that of a coarser clock
    ignored = "*/*" if kind == "model" and not any("/" in pattern for pattern in patterns) else None
    folder = snapshot_download(
        repo,
        repo_type=kind,
        revision=revision,
        allow_patterns=list(patterns),
        ignore_patterns=ignored,
        local_files_only=not download,
    )
    _check_files(Path(folder), repo, kind, patterns, started)
    return Path(folder)


def _reason(error: Exception, parts: _Parts, kind: str) -> str:
    """Why a download failed, and what to do."""
    from huggingface_hub import constants, errors

    page, cause = _page(parts.repo, kind), error.__cause__ or error
    login = "log in with hf auth login, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"the repository is gated: accept its terms at {page}, then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"is no path here, and the hub has no repository {page} that you may read. If it is private, {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no branch, tag or commit {parts.revision or 'main'}; {page}/commits lists them"
    if isinstance(error, errors.LocalEntryNotFoundError):
        partly = "only a part of it" if isinstance(error, errors.IncompleteSnapshotError) else "nothing of it"
        state = f"is no path here, and the cache {constants.HF_HUB_CACHE} holds {partly}"
        if constants.is_offline_mode():
            return (
                f"{state}; HF_HUB_OFFLINE forbids to fetch it. Unset that, or run hf download {parts.repo} "
                f"--repo-type {kind} where there is a network, and copy the cache"
            )
        if isinstance(cause, errors.HfHubHTTPError):
            return f"{state}; the hub refused {page}: HTTP {cause.response.status_code}. Try later, or {login}"
        if isinstance(cause, errors.FileMetadataError):
            return f"{state}; {constants.ENDPOINT} does not answer as a hub does. Is HF_ENDPOINT or a proxy wrong?"
        if cause is error:
            return state
        return f"{state}; the hub {constants.ENDPOINT} cannot be reached ({type(cause).__name__}). Is there a network?"
    if isinstance(error, errors.HfHubHTTPError):
        status, said = error.response.status_code, error.server_message or "without a reason"
        return f"the hub refused {page}: HTTP {status}, {said}; {login}"
    if isinstance(error, _DamagedError):
        return str(error)
    if "Consistency check failed" in str(error):
        return "the transfer ended early, or gave another size than the hub lists; run again"
    text = " ".join(str(error).split())[:500] or type(error).__name__
    return f"{page} cannot be downloaded: {text}"


def _check_files(folder: Path, repo: str, kind: str, patterns: tuple[str, ...], started: float) -> None:
    """Checks cached files that match: their sizes against the hub's list, and new ones against their hashes.

    huggingface_hub compares the sizes of what it downloads. It takes what the cache holds as it is.

    Raises:
        _DamagedError: naming the file and what to delete. A new file of another hash is deleted.
    """
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        sizes = {file.path: file.size for file in get_cached_repo_tree(repo, repo_type=kind, revision=folder.name)}
    except errors.CachedRepoTreeNotFoundError:
        sizes = {}  # a cache of an older huggingface_hub
    for path in folder.rglob("*"):
        name, blob = path.relative_to(folder).as_posix(), _blob_of(path)
        if not any(fnmatch(name, pattern) for pattern in patterns) or path.is_dir():
            continue
        if not path.exists():
            raise _DamagedError(
                f"the cache is damaged: {path} leads to {blob}, which is gone. Connect to the hub, and run again"
            )
        status, expected = path.stat(), sizes.get(name)
        if expected not in (None, status.st_size):
            raise _DamagedError(
                f"the cache is damaged: {path} has {status.st_size} bytes, the hub's file {expected}. Delete "
                f"{blob}, and run again"
            )
        if status.st_mtime >= started and _hash(path, blob.name) != blob.name:
            path.unlink(missing_ok=True)  # another process may have seen it, too
            blob.unlink(missing_ok=True)
            raise _DamagedError(
                f"{path.name} arrived with other content than the hub lists (hash {blob.name}) and was "
                "deleted; run again. If it recurs, a proxy or mirror changes it"
            )


def _blob_of(path: Path) -> Path:
    """The file of the cache that a snapshot's link leads to, named by its hash; the path itself if it is no link."""
    return path.parent / path.readlink() if path.is_symlink() else path


def _hash(path: Path, name: str) -> str:
    """The hash of a file, of the kind that ``name`` is: SHA-256 (large files), git's SHA-1; ``name`` if it is none."""
    if re.fullmatch(r"[0-9a-f]{64}", name):
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if COMMIT.fullmatch(name):
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return name


def _page(repo: str, kind: str = "model") -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
