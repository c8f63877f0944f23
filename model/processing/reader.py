"""How a backbone reads images: the tokens that an image becomes, its similarity maps' cells, and the pixels.

Legend: B images, V image tokens, P cells of a map's grid h x w, A axes of a position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from model.processing.template import ChatTemplate


@dataclass(frozen=True)
class ImagePlan:
    """How one image becomes tokens of the language model.

    Attributes:
        grid: (h, w) of its similarity map.
        cells: [V] int64, the cell that each token shows, row-major; one of h * w or more is outside of the map, as of a
            thumbnail's tokens.
        positions: [V, A] int64, each token's position after that of the text before it.
        length: positions that the image takes: text goes on at this one.
    """

    grid: tuple[int, int]
    cells: torch.Tensor
    positions: torch.Tensor
    length: int


@dataclass(frozen=True)
class ImageTokens:
    """The plans of a batch's images, whose rows all hold V image tokens.

    Attributes:
        cells: [B, V] int64 and positions: [B, V, A] int64, as in ``ImagePlan``.
        shown: [B, V] bool, False for padding.
        valid: [B, P] bool, cells of the map that show the image; h * w <= P.
        grids, lengths: of ``ImagePlan``.
    """

    cells: torch.Tensor
    positions: torch.Tensor
    shown: torch.Tensor
    valid: torch.Tensor
    grids: list[tuple[int, int]]
    lengths: list[int]

    @classmethod
    def of(cls, plans: Sequence[ImagePlan]) -> ImageTokens:
        """Of images with different numbers of tokens: a row with fewer is filled with padding, outside of its map."""
        counts = [len(plan.cells) for plan in plans]
        most = max(counts)
        # with a cell of its own for each padded token: states are scattered to cells
        cells = torch.stack([torch.cat([plan.cells, torch.arange(len(plan.cells), most)]) for plan in plans])
        positions = torch.stack([F.pad(p.positions, (0, 0, 0, most - len(p.positions))) for p in plans])
        places = torch.arange(most)
        areas = [plan.grid[0] * plan.grid[1] for plan in plans]
        return cls(
            cells=cells,
            positions=positions,
            shown=places < torch.tensor(counts)[:, None],
            valid=places < torch.tensor(areas)[:, None],
            grids=[plan.grid for plan in plans],
            lengths=[plan.length for plan in plans],
        )


class ImageReader(ABC):
    """The processor's part of a backbone.

    Attributes:
        backbone: its name in ``model.backbones.BACKBONES``.
        template: its chat template.
        most_tokens: the largest number of tokens of an image.
        file_settings: keys of ``settings`` with their types, those that a processor's file must have and the others.
    """

    backbone: str
    template: ChatTemplate
    most_tokens: int
    file_settings: tuple[dict[str, type], dict[str, type]]

    @abstractmethod
    def plan(self, sizes: Sequence[tuple[int, int]], keep_padding: bool = False) -> ImageTokens:
        """The tokens of images of these sizes (H, W).

        Args:
            keep_padding: whether padded patches get tokens, too, where a backbone pads images.

        Raises:
            ValueError: for an image that the backbone cannot read.
        """

    @abstractmethod
    def pixels(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """The vision tower's input of uint8 images [H, W, 3]: float32, in a shape of the backbone's own."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the processor's file holds of the reader; ``restored`` takes it."""

    @classmethod
    @abstractmethod
    def restored(cls, folder: Path, settings: dict[str, Any]) -> ImageReader:
        """The reader of a processor in ``folder``; it takes its own keys out of ``settings``."""

    def save_pretrained(self, folder: str | Path) -> None:  # noqa: B027  # most readers have no files
        """Writes files beside the processor's, if the reader has any."""
