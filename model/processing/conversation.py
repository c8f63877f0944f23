"""Questions and answers to token ids and labels. The answers' spans are recorded while the text is built.

The template is LLaVA-1.5's ("v1"):
``SYSTEM USER: <im_start><image><im_end>\\nQUESTION ASSISTANT: ANSWER</s>USER: ...``.
The part before the first question is the prefix that all conversations about an image share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.processing.tokens import IM_END, IM_START, IMAGE, SEG, SPECIAL_TOKENS
from model.structures import IGNORE_LABEL, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_PROMPT = (  # of LLaVA's conversations "vicuna_v1"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM_PROMPT = SYSTEM_PROMPT.replace("user", "human")  # of LLaVA's conversations "llava_v1"


@dataclass
class EncodedConversation:
    """A conversation's tokens after the prefix.

    Attributes:
        ids: token ids.
        labels: as many; the same ids in answers, ``IGNORE_LABEL`` elsewhere.
    """

    ids: list[int]
    labels: list[int]


def escape(text: str, tokens: Iterable[str] = SPECIAL_TOKENS) -> str:
    """Escapes special tokens that a user typed: ``[SEG]`` becomes ``[ SEG ]``, which is plain text."""
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:-1]} {token[-1]}")
    return text


class PromptBuilder:
    """Tokenises conversations about an image, and the prefix that they share.

    Args:
        tokenizer: a fast tokenizer (offsets are needed) that knows the special tokens.
        num_image_tokens: P, the number of image placeholders.
        system_prompt: text before the first ``USER:``; may be empty.
        codebook: the tokens of a target, which take the place of each ``[SEG]`` of an answer. They follow each other
            as ids: a tokenizer may see spaces between them, or need some.

    Attributes:
        prefix_ids: tokens of the prefix with P placeholders; image_start: index of the first one.

    Raises:
        ValueError: if the tokenizer is a slow one, or appends an end-of-sequence token to every text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int,
        system_prompt: str,
        codebook: Sequence[str] = (SEG,),
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer")
        self.tokenizer = tokenizer
        self.num_image_tokens = num_image_tokens
        self.seg_name, self.escaped = codebook[0], dict.fromkeys((*SPECIAL_TOKENS, *codebook))
        self.codebook = [tokenizer.get_vocab()[name] for name in codebook]
        self.system_prompt = system_prompt
        self.prefix_text = f"{system_prompt} " * bool(system_prompt) + f"USER: {IM_START}{IMAGE}{IM_END}\n"
        self._prefix_once = tokenizer(self.prefix_text)["input_ids"]
        if self._prefix_once[-1] == tokenizer.eos_token_id:
            raise ValueError("the tokenizer appends an end-of-sequence token to every text; set add_eos_token=False")
        image_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.image_start = self._prefix_once.index(image_id)
        before, after = self._prefix_once[: self.image_start], self._prefix_once[self.image_start + 1 :]
        self.prefix_ids = before + [image_id] * num_image_tokens + after

    def encode(self, turns: tuple[Turn, ...]) -> EncodedConversation:
        """Token ids and labels of one conversation. An empty answer in the last turn is left to generation.

        Raises:
            ValueError: if a question is empty or not UTF-8, or the tokenizer merges across the end of the prefix.
        """
        eos = self.tokenizer.eos_token
        text, spans = self.prefix_text, []
        for i, turn in enumerate(turns):
            if not turn.question.strip():
                raise ValueError("a question is empty: say what to look for, for example 'the red star'")
            if any("\ud800" <= character <= "\udfff" for character in turn.question):
                raise ValueError(f"a question contains bytes that are not UTF-8: {turn.question[:60]!a}")
            text += ("" if i == 0 else "USER: ") + f"{escape(turn.question.strip(), self.escaped)} ASSISTANT:"
            if turn.answer:
                start = len(text)
                text += f" {turn.answer.strip().replace(SEG, self.seg_name)}{eos}"
                spans.append((start, len(text)))
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        split = len(self._prefix_once)
        if ids[:split] != self._prefix_once:
            raise ValueError(f"the tokenizer merges the prompt's prefix with the question {turns[0].question!r}")
        labels = [
            token if any(start <= left and right <= end for start, end in spans) else IGNORE_LABEL
            for token, (left, right) in zip(ids[split:], offsets[split:])
        ]
        return self._with_codebook(EncodedConversation(ids[split:], labels))

    def _with_codebook(self, conversation: EncodedConversation) -> EncodedConversation:
        """The codebook's tokens in place of its first one, which stands for a target in the text."""
        if len(self.codebook) == 1:
            return conversation
        ids, labels = [], []
        for token, label in zip(conversation.ids, conversation.labels):
            is_target = token == self.codebook[0]
            ids += self.codebook if is_target else [token]
            labels += self.codebook if is_target else [label]
        return EncodedConversation(ids, labels)
