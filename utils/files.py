"""Small files: replaced as a whole, so that readers, a kill and a full disk see the old content or the new; YAML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml


def write_atomically(path: Path, text: str) -> None:
    """Replaces a small file (UTF-8) atomically. A link stays one: its target is replaced."""
    path = path.resolve()
    if path.exists() and not path.is_file():  # a device or a pipe
        path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShallowAliases(yaml.composer.Composer):
    """Part of a YAML loader: an alias stands for a value, or a list or mapping of values.

    Ten lines of aliases of aliases expand to gigabytes.

    Raises:
        yaml.MarkedYAMLError: for an alias of nested values.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, node = self.peek_event(), super().compose_node(parent, index)  # type: ignore[attr-defined]
        if isinstance(event, yaml.AliasEvent) and isinstance(node, yaml.CollectionNode):
            parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            if not all(isinstance(part, yaml.ScalarNode) for part in parts):
                raise yaml.MarkedYAMLError(
                    problem=f"*{event.anchor} stands for nested values; write them out",
                    problem_mark=event.start_mark,  # type: ignore[arg-type]
                )
        return node
