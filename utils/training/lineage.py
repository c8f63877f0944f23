"""What a model was trained from: the finished models, one from the other, that its weights passed through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.loading import hub
from model.loading.files import blame, read_json
from utils.config import Config, keep_trained


def adopt(config: Config) -> None:
    """Sets the settings that further training of a finished model must keep; base weights have none.

    Raises:
        ConfigError: if a file or a flag contradicts the model in ``--version``.
        ValueError: if the folder is no model.
    """
    from model.loading.pretrained import settings_of  # here and below: slow to import

    if trained := settings_of(hub.resolve_folder(config.model.version, "--version").path):
        keep_trained(config, trained, config.model.version)


def lineage_of(version: str | Path) -> list[dict[str, Any]]:
    """The finished models that a folder's weights passed through, the oldest first; [] for base weights.

    Returns:
        a dictionary each: ``name``, ``source`` (what it was trained from), and, where they are known, ``steps``,
        ``data`` (names of data sets) and ``commit``.

    Raises:
        ValueError: if the folder is no model, or its metadata cannot be read.
    """
    from model.loading.adapter import META
    from model.loading.files import read_config
    from model.loading.formats import release_of
    from model.loading.pretrained import kind_of

    folder, kind = Path(version), kind_of(version)
    if kind == "released" and (release := release_of(read_config(folder, "--version"))):
        return [{"name": _name(folder), "source": f"published, {release.name}"}]
    if kind not in ("merged", "adapter"):
        return []
    if not (folder / META).is_file():  # of save_pretrained
        return [{"name": _name(folder), "source": "unknown"}]
    with blame(f"--version: {folder / META}"):
        meta = read_json(folder / META)
        return [*meta.get("lineage", []), own_entry(meta)]


def _name(folder: Path) -> str:
    """``org/name@<commit hash>`` of a folder in the hub's cache, which is itself named by the hash; else its name."""
    name = hub.name_of(folder)
    return name if hub.repository_of(name) else folder.name


def own_entry(meta: dict[str, Any]) -> dict[str, Any]:
    """The entry of a run, from its metadata."""
    return {
        "name": meta["config"]["train"]["exp_name"],
        "source": (meta.get("resolved") or meta["config"]["model"])["version"],  # of the hub, the commit
        "steps": meta["step"],
        "data": [row["name"] for row in meta["data"]],
        "commit": meta["commit"],
    }
