"""Data structures that data sets, model and evaluation exchange."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from model.processing.tokens import SEG

if TYPE_CHECKING:
    import torch

    from model.config import GroundingConfig

IGNORE_PIXEL = 255
IGNORE_LABEL = -100
EPSILON = 1e-6  # keeps denominators and logarithms finite
MAX_NEW_TOKENS = 512  # of a generated answer, unless the caller says otherwise; as SESAME, READ and PixelLM
MAX_SEGS = 64  # of a generated answer: a model that repeats [SEG] without end must not fill the memory with masks


@dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
        answer: with ``[SEG]`` once per mask, ``[REJ]`` for an absent target. Empty = to be generated.
        thought: reasoning before the answer; only with an answer.
    """

    question: str
    answer: str = ""
    thought: str = ""


Conversation = tuple[Turn, ...]


@dataclass
class Sample:
    """One training image with its conversations.

    Attributes:
        source: data set and file (``"ReasonSeg|train/0001.jpg"``), for messages.
        image: [H, W, 3] uint8, RGB.
        conversations: each attends to the image and to itself, not to the others.
        masks: [N, H, W] uint8 with 0, 1 and 255 (ignored); one per ``[SEG]``, in the order of the answers.
        sample_id: index of the sample in the mixture; seeds the layer sampling.
    """

    source: str
    image: np.ndarray
    conversations: list[Conversation]
    masks: np.ndarray
    sample_id: int = 0

    def by_conversation(self) -> list[tuple[Conversation, np.ndarray]]:
        """Each conversation with its masks, [n, H, W] for the n ``[SEG]`` of its answers."""
        counts = [sum(turn.answer.count(SEG) for turn in turns) for turns in self.conversations]
        parts = np.split(self.masks, np.cumsum(counts)[:-1])
        return list(zip(self.conversations, parts, strict=True))


@dataclass
class EvalQuery:
    """One expression about an image, and its target.

    Attributes:
        query_id: unique within its benchmark.
        text: the expression or question as the dataset has it.
        masks: [N, H, W] uint8 with 0, 1 and 255; N = 0 if the target is absent (a false premise, no target).
        is_sentence: a whole question (ReasonSeg's long queries) rather than a phrase.
        meta: attributes that reports group by (``{"family": "relation"}``).
        reference: of an absent target, [H, W] uint8 with 0 and 1, what a model that hallucinates it would mark; None =
            nothing in particular.
        answer: the benchmark's own text, with a ``[SEG]`` per target in their order, which teacher forcing gives where
            the authors do (MMR); empty = that of the templates.
    """

    query_id: str
    text: str
    masks: np.ndarray
    is_sentence: bool = False
    meta: dict[str, Any] = field(default_factory=dict)
    reference: np.ndarray | None = None
    answer: str = ""

    @property
    def is_present(self) -> bool:
        """Whether the target has a pixel; ignored ones are none."""
        return bool((self.masks == 1).any())


@dataclass
class EvalSample:
    """One evaluation image, uint8 [H, W, 3] RGB, with all its expressions, so that it is encoded once."""

    source: str
    image_id: str
    image: np.ndarray
    queries: list[EvalQuery]


@dataclass
class Batch:
    """Packed rows: each row is one image, a shared prefix (system text, image) and its conversations.

    Shapes: B rows, T tokens, V image tokens, P cells of a map, M tokens of answers, R SAM's side, N_b
    masks of row b, N masks in all.
    Flat positions index the [B * T] tokens. The position before a token is the one that predicts it; the state of a
    ``[SEG]`` is the one there.

    Attributes:
        input_ids: [B, T] int64; image placeholders carry the image token's id.
        segment_ids: [B, T] int64; 0 = prefix, k >= 1 = conversation k of the row, -1 = padding.
        position_ids: [B, T] int64, or [B, T, 3] where positions have three axes; each conversation continues from the
            prefix.
        label_positions: [M] int64, flat position before each token of an answer; label_ids: [M] int64, that token.
        label_weights: [M] float32, the token's weight in the text loss; label_thoughts: [M] bool, those of thoughts.
        counts: [3] float32, the sum of label_weights, the number of masks that are not empty, and the number of tokens
            of thoughts: the denominators of the losses. Training replaces them by their mean over all micro steps and
            processes of an optimizer step.
        seg_positions: [N] int64, flat position before each ``[SEG]`` of the answers, in the order of the masks; of a
            codebook, before its last token.
        seg_rows: [N] int64, the row of each ``[SEG]``.
        pixel_values: the vision tower's input, as its ``ImageReader`` makes it (LLaVA: [B, 3, S, S]).
        sam_images: [B, 3, R, R]; without a SAM, R = 0.
        sizes: original (height, width) per row.
        masks: per row [N_b, H, W] uint8 with 0, 1, 255.
        sample_ids: sample index per row; seeds the layer sampling.
        questions: number of conversations per row.
        image_tokens: [B, V] int64, flat positions of the image's tokens; image_cells: [B, V] int64, the cell of the
            map's grid that each shows, row-major (h * w or more: none); image_shown: [B, V] bool, False for padding,
            which no token attends to; image_counts: how many of a row's are the image's; has_padding: whether any is
            padding.
        valid: [B, P] bool, cells of the map that show the image.
        grids: (h, w) of the map per row, in cells; h * w <= P.
        image_keys: per row, the image's key in the cache of SAM's features; empty without a cache.
    """

    input_ids: torch.Tensor
    segment_ids: torch.Tensor
    position_ids: torch.Tensor
    label_positions: torch.Tensor
    label_ids: torch.Tensor
    label_weights: torch.Tensor
    label_thoughts: torch.Tensor
    counts: torch.Tensor
    seg_positions: torch.Tensor
    seg_rows: torch.Tensor
    pixel_values: torch.Tensor
    sam_images: torch.Tensor
    sizes: list[tuple[int, int]]
    masks: list[torch.Tensor]
    sample_ids: list[int]
    questions: list[int]
    image_tokens: torch.Tensor
    image_cells: torch.Tensor
    image_shown: torch.Tensor
    image_counts: list[int]
    valid: torch.Tensor
    has_padding: bool
    grids: list[tuple[int, int]]
    image_keys: list[str] = field(default_factory=list)

    def after_prefix(self, length: int) -> Batch:
        """The conversations alone, for a model whose cache holds the prefix of ``length`` tokens.

        Returns:
            a batch with T - length tokens per row. ``image_tokens`` still index the rows with their prefix.
        """
        width = self.segment_ids.shape[1]

        def cut(positions: torch.Tensor) -> torch.Tensor:
            return positions - length * (positions // width + 1)

        return replace(
            self,
            input_ids=self.input_ids[:, length:],
            segment_ids=self.segment_ids[:, length:],
            position_ids=self.position_ids[:, length:],
            label_positions=cut(self.label_positions),
            seg_positions=cut(self.seg_positions),
        )

    def image_states(self, states: torch.Tensor) -> torch.Tensor:
        """States of the image's tokens: [B, T, D] -> [B, V, D]."""
        return states.flatten(0, 1).index_select(0, self.image_tokens.flatten()).unflatten(0, self.image_tokens.shape)

    def pin_memory(self) -> Batch:
        """A copy in pinned memory, from which ``to`` copies asynchronously; ``DataLoader`` calls this."""
        import torch

        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **pinned, masks=[mask.pin_memory() for mask in self.masks])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """A copy with tensors on ``device``, and images in ``dtype``."""
        import torch

        moved = dict(vars(self))
        for name, value in moved.items():
            if isinstance(value, torch.Tensor):
                image_dtype = dtype if name in ("pixel_values", "sam_images") else None
                moved[name] = value.to(device, image_dtype, non_blocking=True)
        moved["masks"] = [mask.to(device, non_blocking=True) for mask in self.masks]
        return Batch(**moved)


@dataclass
class GroupPrompts:
    """Questions of a batch, to be answered in groups of samples.

    Attributes:
        questions: [image][question] tokens after the prefix.
        targets: per question, [m, H, W] uint8 of its targets; m = 0 where they are absent.
        sample_ids: sample index per image.
    """

    questions: list[list[list[int]]]
    targets: list[torch.Tensor]
    sample_ids: list[int]


@dataclass(frozen=True)
class Prompts:
    """Prompts of SAM's decoder for a ``[SEG]``.

    Attributes:
        seg: whether phi([SEG]) is one; mask: whether the similarity map is one.
        points: number of points from the similarity map, by ``point_rule`` (``model.settings``); 0 = none.
    """

    seg: bool = True
    mask: bool = True
    points: int = 0
    point_rule: str = "extremes"

    @classmethod
    def of(cls, config: GroundingConfig) -> Prompts:
        """The prompts of training, by a ``GroundingConfig``."""
        return cls(config.seg_prompt, config.mask_prompt, config.point_prompts, config.point_rule)


@dataclass
class MaskUncertainty:
    """Mean and disagreement of the masks of T sampled layers, for one ``[SEG]`` (``mc:T``).

    Attributes:
        probability: [H, W] float32, the mean of the T probability maps.
        variance: [H, W] float32, their variance per pixel (at most 0.25).
        layers: [L] float32, the share of the T samples that each layer has.
        score: 1 - mean IoU of the T masks with the mean's mask: 0 = all masks are equal, 1 = they are disjoint from it.
    """

    probability: torch.Tensor
    variance: torch.Tensor
    layers: torch.Tensor
    score: float

    @property
    def deviation(self) -> torch.Tensor:
        """[H, W] float32, the standard deviation per pixel (at most 0.5)."""
        return self.variance.sqrt()


OF_SEGS = (  # attributes of a prediction that have an item per [SEG]
    "mask_logits",
    "maps",
    "layers",
    "policy",
    "layer_maps",
    "rejected",
    "predicted_iou",
    "ambiguity",
    "uncertainty",
)


@dataclass
class Prediction:
    """The model's answer to one question about one image.

    Attributes:
        text: the answer, special tokens such as ``[SEG]`` kept; thought: the reasoning before it, or empty.
        token_ids: tokens of the answer, generated or teacher-forced.
        mask_logits: [N, H, W] float32 at the image's original size, one per ``[SEG]``; a mask is ``logits > 0``.
        maps: [N, H, W] float32 in [0, 1], the similarity maps at the same size.
        layers: the chosen hidden state per ``[SEG]`` (0 = embeddings, L - 1 = last).
        policy: [N, L] float32, the policy's distribution over layers.
        layer_maps: [N, L, h, w] float32 in [0, 1], the maps of all layers on their grid (``model.geometry.maps_at``
            enlarges them).
        rejected: per ``[SEG]``, whether ``[REJ]`` was more likely at its position; always False in generated answers.
        predicted_iou: per ``[SEG]``, the IoU that SAM's own head predicts for its mask; with ``mc:T`` the mean.
            Empty if that head was never trained.
        ambiguity: per ``[SEG]``, how far its mask's probabilities are from 0 and 1 (``model.uncertainty.ambiguity``).
        uncertainty: per ``[SEG]`` with ``mc:T``; empty otherwise.
        cut: whether a generated answer reached the longest length, or ``MAX_SEGS``, before its end token.
    """

    text: str
    token_ids: list[int]
    mask_logits: torch.Tensor
    maps: torch.Tensor
    layers: list[int]
    policy: torch.Tensor
    layer_maps: torch.Tensor
    rejected: list[bool]
    predicted_iou: list[float] = field(default_factory=list)
    ambiguity: list[float] = field(default_factory=list)
    uncertainty: list[MaskUncertainty] = field(default_factory=list)
    cut: bool = False
    thought: str = ""

    @property
    def masks(self) -> torch.Tensor:
        """[N, H, W] bool, one per ``[SEG]``."""
        return self.mask_logits > 0

    def without_first(self, count: int) -> Prediction:
        """The prediction without the masks of its first ``count`` ``[SEG]``."""
        of_segs = {name: getattr(self, name)[count:] for name in OF_SEGS}
        return replace(self, **of_segs)
