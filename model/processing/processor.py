"""The processor: tokenizer, image transforms and prompts; it is saved beside the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from model.backbones import BACKBONES
from model.loading.files import blame, read_json
from model.processing.collate import PackedSequence, collate_rows, truncate
from model.processing.conversation import EncodedConversation, PromptBuilder
from model.processing.reader import ImageReader
from model.processing.thoughts import MARKS, NO_THOUGHTS, THINK, THOUGHT_FORMATS, Opening
from model.processing.tokens import IM_START, REJ, SEG, codebook_names, load_tokenizer, token_ids
from model.processing.transforms import SAM_INPUTS
from model.sam_cache import image_key
from model.structures import IGNORE_LABEL, Batch, GroupPrompts, Sample, Turn

PROCESSOR_FILE = "uground_processor.json"
REQUIRED: dict[str, type] = {"sam_side": int}  # in the file, with their types, beside those of the reader
OPTIONAL: dict[str, type] = {
    "backbone": str,
    "system_prompt": str,
    "max_tokens": int,
    "codebook": int,
    "sam_input": str,
    "thought_format": str,
}


class UGroundProcessor:
    """Builds batches from samples and prompts, and decodes token ids to text.

    Args:
        tokenizer: fast tokenizer that knows the special tokens (``model.processing.tokens.add_special_tokens``).
        reader: how the backbone reads images; its chat template is that of the prompts.
        sam_side: side of SAM's square input in pixels; 0 = the mask decoder reads CLIP's states, not an image.
        system_prompt: text in front of every conversation; None = the template's.
        max_tokens: longest conversation with its prefix, in tokens, of the largest image (``--model_max_length``).
        codebook: number of [SEG] tokens per target. In the texts of samples and predictions they are one ``[SEG]``.
        sam_input: how an image becomes the mask decoder's input, of ``SAM_INPUTS``.
        thought_format: how thoughts stand before answers, of ``THOUGHT_FORMATS``.

    Attributes:
        keep_padding: whether padded patches get tokens, too, as ``map_normalization: all`` needs (``model.load`` and
            training set it by the model).
        thought_weight: of a thought's tokens in the text loss (training sets it).
        hash_images: whether batches have ``image_keys``, for the cache of SAM's features.
        codebook: ids of a target's [SEG] tokens; the last is ``tokens.seg``.

    Raises:
        ValueError: if the tokenizer does not fit (``token_ids``, ``PromptBuilder``), or ``max_tokens`` leaves no room
            beside the prefix.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        reader: ImageReader,
        sam_side: int,
        system_prompt: str | None = None,
        max_tokens: int = 2048,
        codebook: int = 1,
        sam_input: str = "pad",
        thought_format: str = NO_THOUGHTS,
    ) -> None:
        if sam_input not in SAM_INPUTS:
            raise ValueError(f"sam_input {sam_input!r} is unknown; use {', '.join(SAM_INPUTS)}")
        if thought_format not in THOUGHT_FORMATS:
            raise ValueError(f"thought_format {thought_format!r} is unknown; use {', '.join(THOUGHT_FORMATS)}")
        self.tokenizer, self.reader, self.sam_side, self.sam_input = tokenizer, reader, sam_side, sam_input
        folder, template, names = tokenizer.name_or_path, reader.template, codebook_names(codebook)
        where = f"the tokenizer of {folder}" if folder else "the tokenizer"
        self.tokens = token_ids(tokenizer, where, codebook, template.image[1], IM_START in template.added, template.end)
        prompt = template.system_prompt if system_prompt is None else system_prompt
        self.thought_format, marks = thought_format, MARKS.get(thought_format)
        if marks and (unknown := [token for token in marks.tokens if token not in tokenizer.get_vocab()]):
            raise ValueError(
                f"{where} does not know {', '.join(unknown)}, the marks of thought_format {thought_format}"
            )
        self.builder = PromptBuilder(tokenizer, prompt, names, template, marks)
        self.codebook = self.builder.codebook
        self.max_tokens = max_tokens
        self.keep_padding = self.hash_images = False
        self.thought_weight = 1.0
        if self.room < 1:
            raise ValueError(
                f"the image and the beginning of the prompt take up to {max_tokens - self.room} tokens, and rows have "
                f"at most {max_tokens}; raise --model_max_length (training) or max_tokens in {PROCESSOR_FILE}"
            )

    @property
    def room(self) -> int:
        """Longest conversation beside the prefix, in tokens."""
        return self.max_tokens - len(self.builder.prefix) - self.reader.most_tokens

    @property
    def added_tokens(self) -> tuple[int, ...]:
        """Ids of the added tokens that the language model reads or writes."""
        marks = MARKS[self.thought_format].tokens if self.thought_format in MARKS else ()
        vocabulary = self.tokenizer.get_vocab()
        return tuple(dict.fromkeys((*self.codebook, *self.tokens.added, *(vocabulary[mark] for mark in marks))))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> UGroundProcessor:
        """The processor that ``save_pretrained`` wrote to a folder.

        Raises:
            ValueError: if the folder has no ``uground_processor.json``, or a file is damaged.
        """
        path = Path(folder) / PROCESSOR_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} is no UGround folder: it has no {PROCESSOR_FILE} (scripts/merge_lora.py writes one)"
            )
        tokenizer, settings = load_tokenizer(folder), _read_settings(path)
        reader = BACKBONES[settings.pop("backbone", "llava")].reader
        with blame(f"{path} and the files beside it do not fit"):
            return cls(tokenizer, reader.restored(Path(folder), settings), **settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the tokenizer's files and ``uground_processor.json``."""
        settings = {
            **self.reader.settings(),
            "sam_side": self.sam_side,
            "system_prompt": self.builder.system_prompt,
            "max_tokens": self.max_tokens,
        }
        if self.reader.backbone != "llava":  # older code knows no such key, nor the next one
            settings["backbone"] = self.reader.backbone
        if len(self.codebook) > 1:
            settings["codebook"] = len(self.codebook)
        if self.sam_input != "pad":
            settings["sam_input"] = self.sam_input
        if self.thought_format != NO_THOUGHTS:
            settings["thought_format"] = self.thought_format
        self.tokenizer.save_pretrained(folder)
        self.reader.save_pretrained(folder)
        (Path(folder) / PROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    def collate(
        self, samples: Sequence[Sample], on_truncated: Callable[[Sample, int, int], None] | None = None
    ) -> Batch:
        """A batch for training. Conversations longer than ``max_tokens`` are truncated, with their masks.

        Args:
            on_truncated: called with a sample, the number of its truncated conversations, and the tokens that fit.

        Raises:
            ValueError: if the numbers of ``[SEG]`` and of masks differ in a sample, or a question is empty.
        """
        rows = []
        for sample in samples:
            conversations = [self.builder.encode(turns) for turns in sample.conversations]
            row = PackedSequence(sample.image, conversations, sample.masks, sample.sample_id)
            segs = sum(c.labels.count(self.tokens.seg) for c in conversations)
            if segs != len(sample.masks):
                raise ValueError(f"{sample.source}: {segs} [SEG] in the answers but {len(sample.masks)} masks")
            too_long = sum(len(conversation.ids) > self.room for conversation in conversations)
            if too_long and on_truncated:
                on_truncated(sample, too_long, self.room)
            rows.append(truncate(row, self.room, self.tokens.seg))
        return self._collate(rows)

    def group_prompts(
        self, samples: Sequence[Sample], tokens: int, on_left_out: Callable[[Sample, int, int], None] | None = None
    ) -> GroupPrompts:
        """The questions of samples whose answers a reward can judge: those about targets that are there or absent.

        The last answer of a conversation is left out, earlier ones stay. Text alone has no reward, nor has an answer
        that marks some targets and rejects others; these are no questions here.

        Args:
            tokens: longest answer; on_left_out: called with a sample, the number of its questions that leave no room
                for such an answer, and the tokens that fit.
        """
        prompts = GroupPrompts([], [], [sample.sample_id for sample in samples])
        for sample in samples:
            row, too_long = [], 0
            for turns, masks in sample.by_conversation():
                *before, last = turns
                targets = last.answer.count(SEG)
                if (targets > 0) == (REJ in last.answer):
                    continue
                encoded = self.builder.encode((*before, Turn(last.question)))
                if len(encoded.ids) + tokens > self.room:
                    too_long += 1
                    continue
                row.append(encoded.ids)
                prompts.targets.append(torch.from_numpy(masks[len(masks) - targets :]))
            if too_long and on_left_out:
                on_left_out(sample, too_long, self.room)
            prompts.questions.append(row)
        return prompts

    def continued(self, conversations: Sequence[Sequence[tuple[list[int], list[int]]]], seen: Batch) -> Batch:
        """A batch of conversations about the images of an earlier one, in tokens, with an empty mask per [SEG].

        Args:
            conversations: [image][conversation] tokens of the prompt, and of the answer, which are the labels.
            seen: the earlier batch, which lends its pixels.
        """
        rows = []
        for size, sample_id, pairs in zip(seen.sizes, seen.sample_ids, conversations, strict=True):
            encoded = [
                EncodedConversation(asked + answer, [IGNORE_LABEL] * len(asked) + answer) for asked, answer in pairs
            ]
            segs = sum(answer.count(self.tokens.seg) for _, answer in pairs)
            image = np.broadcast_to(np.uint8(0), (*size, 3))  # its size alone is read
            rows.append(PackedSequence(image, encoded, np.zeros((segs, 0, 0), np.uint8), sample_id))
        return self._collate(rows, seen)

    def check_image(self, source: str, image: np.ndarray) -> None:
        """Raises a ValueError that names the source of an image [H, W, 3] which the backbone cannot read."""
        with blame(source):
            self.reader.plan([image.shape[:2]])

    def prompts(
        self,
        images: Sequence[np.ndarray],
        turns: Sequence[Sequence[Turn]],
        sample_ids: Sequence[int] | None = None,
        seen: Batch | None = None,
    ) -> Batch:
        """A batch for ``GroundingModel.predict``: each image once, with all its questions.

        Args:
            images: uint8 [H, W, 3] each.
            turns: [image][question]. Given answers are teacher-forced, empty ones are to be generated. Special tokens
                in questions are escaped.
            sample_ids: sample index per image, which seeds sampled layers (default 0, 1, ...).
            seen: an earlier batch of these images, which lends its pixels.

        Raises:
            ValueError: if a question is empty, or too long (with its answer) for ``max_tokens``; if an image has no
                question; if only some turns have answers.
        """
        if len({bool(turn.answer) for row in turns for turn in row}) > 1:
            raise ValueError(
                "some turns have an answer and some have none: give all answers (teacher forced), or leave all to the "
                "model"
            )
        rows = []
        for i, (image, image_turns) in enumerate(zip(images, turns, strict=True)):
            if not image_turns:
                raise ValueError(f"image {i} has no question")
            conversations = [self.builder.encode((turn,)) for turn in image_turns]
            for turn, conversation in zip(image_turns, conversations):
                if len(conversation.ids) > self.room:
                    raise ValueError(
                        f"the question {turn.question[:60]!r} takes {len(conversation.ids)} tokens with its answer, "
                        f"{self.room} fit beside the image; ask for less at a time, or raise max_tokens in "
                        f"{PROCESSOR_FILE}"
                    )
            no_masks = np.zeros((0, *image.shape[:2]), dtype=np.uint8)
            sample_id = sample_ids[i] if sample_ids is not None else i
            rows.append(PackedSequence(image, conversations, no_masks, sample_id))
        return self._collate(rows, seen)

    def prefix(self, image: np.ndarray) -> Batch:
        """A batch of one image [H, W, 3] with the prefix alone, for ``ConversationCache``."""
        return self._collate([PackedSequence(image, [], np.zeros((0, *image.shape[:2]), dtype=np.uint8), 0)])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of answer tokens, with ``[SEG]`` and ``[REJ]``, without end and padding tokens."""
        skipped = {self.tokens.eos, self.tokens.pad, *self.codebook[:-1]}
        text = self.tokenizer.decode([i for i in ids if i not in skipped], skip_special_tokens=False)
        assert isinstance(text, str)  # a list only for a batch of ids
        return text.replace(codebook_names(len(self.codebook))[-1], SEG).strip()

    def split_thought(self, text: str, complete: bool = False) -> tuple[str, str]:
        """Thought and answer of a decoded text; complete: whether it ends where the model ended it."""
        return self.builder.marks.split(text, complete) if self.builder.marks else ("", text)

    def in_answer(self, ids: Sequence[int], token: int | None) -> list[bool]:
        """Of each such token, whether it is in the answer, not in the thought; spelled letters are no such token."""
        ends = [i + 1 for i, each in enumerate(ids) if each == token]
        return [bool(self.split_thought(self.decode(ids[:end]))[1]) for end in ends]

    def opening(self, think: str) -> Opening:
        """How generated answers begin, by a value of ``THINK``.

        Raises:
            ValueError: for another value, or ``on`` if the model was not trained to write thoughts.
        """
        if think not in THINK:
            raise ValueError(f"think is {think!r}; use {', '.join(THINK)}")
        tokens, marks = self.builder.opening, self.builder.marks
        if think == "on":
            if not tokens:
                raise ValueError("think on: this model was trained without thoughts (thought_format none)")
            return Opening(forced=tokens)
        if think == "auto" or not marks:
            return Opening()
        vocabulary = self.tokenizer.get_vocab()
        if marks.special:
            return Opening(banned=[vocabulary[mark] for mark in marks.tokens])
        return Opening(banned=tokens[:1], steps=1)  # a word that may occur later

    def _collate(self, rows: list[PackedSequence], seen: Batch | None = None) -> Batch:
        prefix, reader, pad_id, seg_id = self.builder.prefix, self.reader, self.tokens.pad, self.tokens.seg
        settings = self.keep_padding, self.sam_input, self.thought_weight
        batch = collate_rows(rows, prefix, reader, self.sam_side, pad_id, seg_id, *settings, seen)
        if seen is not None:
            batch.image_keys = seen.image_keys
        elif self.hash_images:
            batch.image_keys = [image_key(row.image) for row in rows]
        return batch


def _read_settings(path: Path) -> dict[str, Any]:
    """``uground_processor.json``, whose keys and types are checked."""
    settings = read_json(path)
    if (name := settings.get("backbone", "llava")) not in BACKBONES:
        raise ValueError(f"{path}: backbone {name!r} is unknown; known: {', '.join(BACKBONES)}")
    required, optional = BACKBONES[name].reader.file_settings
    required, kinds = required | REQUIRED, required | optional | REQUIRED | OPTIONAL
    problems = [f"{key} is missing" for key in required if key not in settings]
    for key, value in settings.items():
        if key not in kinds:
            problems.append(f"{key} is unknown (known: {', '.join(kinds)})")
        elif type(value) is not kinds[key] or (isinstance(value, int) and value < (key != "sam_side")):
            problems.append(f"{key} is {value!r}, not a {'text' if kinds[key] is str else 'positive whole number'}")
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return settings
