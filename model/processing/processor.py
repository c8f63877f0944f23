"""The processor: tokenizer, both image transforms and prompt building, saved and loaded beside the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from model.processing.collate import PackedSequence, collate_rows, cut
from model.processing.conversation import SYSTEM_PROMPT, PromptBuilder
from model.processing.tokens import load_tokenizer, token_ids
from model.processing.transforms import CLIP_FITS
from model.sam_cache import image_key
from model.structures import Batch, Sample, Turn

FILE_NAME = "uground_processor.json"


class UGroundProcessor:
    """Turns samples and prompts into batches, and token ids back into text.

    Args:
        tokenizer: fast tokenizer that knows the special tokens (``model.processing.tokens.add_special_tokens``).
        clip_side: side of CLIP's padded square input in pixels; a multiple of ``clip_patch``.
        clip_patch: CLIP's patch side in pixels.
        sam_side: side of SAM's padded square input in pixels.
        system_prompt: text in front of every conversation.
        max_tokens: the longest row that one conversation with its prefix may make (``--model_max_length``).
        clip_fit: ``pad`` = CLIP sees the whole image, as the paper has it; ``crop`` = its middle, as CLIP's own
            processor cuts it out, for checkpoints that were trained so (LISA and its descendants).

    Attributes:
        hash_images: whether batches name their images, for a cache of SAM's features.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        clip_side: int,
        clip_patch: int,
        sam_side: int,
        system_prompt: str = SYSTEM_PROMPT,
        max_tokens: int = 2048,
        clip_fit: str = "pad",
    ) -> None:
        if clip_side % clip_patch:
            raise ValueError(f"CLIP's side {clip_side} is not a multiple of its patch {clip_patch}")
        if clip_fit not in CLIP_FITS:
            raise ValueError(f"clip_fit {clip_fit!r} is unknown; use {' or '.join(CLIP_FITS)}")
        self.tokenizer = tokenizer
        self.clip_side, self.clip_patch, self.sam_side = clip_side, clip_patch, sam_side
        self.tokens = token_ids(tokenizer)
        self.builder = PromptBuilder(tokenizer, (clip_side // clip_patch) ** 2, system_prompt)
        self.max_tokens, self.clip_fit = max_tokens, clip_fit
        self.hash_images = False

    @property
    def num_image_tokens(self) -> int:
        return self.builder.num_image_tokens

    @classmethod
    def from_pretrained(cls, folder: str | Path, **overrides) -> UGroundProcessor:
        """Loads what ``save_pretrained`` wrote.

        Raises:
            ValueError: if the folder holds no processor.
        """
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise ValueError(f"{folder} is no UGround folder: it has no {FILE_NAME} (scripts/merge_lora.py writes one)")
        settings = json.loads(path.read_text()) | overrides
        return cls(load_tokenizer(folder), **settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer's files and ``uground_processor.json``."""
        settings = {
            "clip_side": self.clip_side,
            "clip_patch": self.clip_patch,
            "sam_side": self.sam_side,
            "system_prompt": self.builder.system_prompt,
            "max_tokens": self.max_tokens,
            "clip_fit": self.clip_fit,
        }
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / FILE_NAME).write_text(json.dumps(settings, indent=2) + "\n")

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Training rows.

        Raises:
            ValueError: if a sample's ``[SEG]`` and masks do not match, or a question is empty.
        """
        rows = []
        for sample in samples:
            conversations = [self.builder.encode(turns) for turns in sample.conversations]
            row = PackedSequence(sample.image, conversations, sample.masks, sample.sample_id)
            segs = sum(c.labels.count(self.tokens.seg) for c in conversations)
            if segs != len(sample.masks):
                raise ValueError(f"{sample.source}: {segs} [SEG] in the answers but {len(sample.masks)} masks")
            rows.append(cut(row, self.max_tokens - len(self.builder.prefix_ids), self.tokens.seg))
        return self._collate(rows)

    def prompts(
        self,
        images: Sequence[np.ndarray],
        turns: Sequence[Sequence[Turn]],
        sample_ids: Sequence[int] | None = None,
    ) -> Batch:
        """Rows for ``UGroundForCausalLM.predict``: every image once, with all its questions.

        Args:
            images: uint8 [H, W, 3] each.
            turns: [image][question]. With their answers they are teacher forced, without they are to be generated.
                Special tokens typed in questions are defused.
            sample_ids: seeds for sampled layers, one per image (default 0, 1, ...).

        Raises:
            ValueError: if a question is empty, or longer (with its answer) than the model reads; if an image has none;
                if only some turns have answers.
        """
        if len({bool(turn.answer) for row in turns for turn in row}) > 1:
            raise ValueError(
                "some turns have an answer and some have none: give all answers (teacher forced), or leave all to the "
                "model"
            )
        rows, room = [], self.max_tokens - len(self.builder.prefix_ids)
        if room < 1:
            raise ValueError(
                f"the image and the beginning of the prompt take {len(self.builder.prefix_ids)} tokens, and rows have "
                f"at most {self.max_tokens}; raise --model_max_length (training) or max_tokens in {FILE_NAME}"
            )
        for i, (image, asked) in enumerate(zip(images, turns, strict=True)):
            if not asked:
                raise ValueError(f"image {i} has no question")
            conversations = [self.builder.encode((turn,)) for turn in asked]
            for turn, conversation in zip(asked, conversations):
                if len(conversation.ids) > room:
                    raise ValueError(
                        f"the question {turn.question[:60]!r} takes {len(conversation.ids)} tokens with its answer, "
                        f"{room} fit beside the image; ask for less at a time, or raise max_tokens in {FILE_NAME}"
                    )
            no_masks = np.zeros((0, *image.shape[:2]), dtype=np.uint8)
            number = sample_ids[i] if sample_ids is not None else i
            rows.append(PackedSequence(image, conversations, no_masks, number))
        return self._collate(rows)

    def prefix(self, image: np.ndarray) -> Batch:
        """The row of an image [H, W, 3] about which nothing was asked yet."""
        return self._collate([PackedSequence(image, [], np.zeros((0, *image.shape[:2]), dtype=np.uint8), 0)])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of answer tokens; ``[SEG]`` and ``[REJ]`` are kept, end and padding tokens are not."""
        hidden = {self.tokens.eos, self.tokens.pad}
        text = self.tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)
        return text.strip()  # type: ignore[union-attr]  # a list only for a batch of ids

    def _collate(self, rows: list[PackedSequence]) -> Batch:
        batch = collate_rows(
            rows,
            prefix_ids=self.builder.prefix_ids,
            image_start=self.builder.image_start,
            pad_id=self.tokens.pad,
            seg_id=self.tokens.seg,
            clip_side=self.clip_side,
            sam_side=self.sam_side,
            clip_fit=self.clip_fit,
        )
        if self.hash_images:
            batch.image_keys = [image_key(row.image) for row in rows]
        return batch
