"""Questions and answers to token ids and labels. The answers' spans are recorded while the text is built."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from model.processing.template import VICUNA, ChatTemplate
from model.processing.thoughts import Marks
from model.processing.tokens import REJ, SEG, SPECIAL_TOKENS
from model.structures import IGNORE_LABEL, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class EncodedConversation:
    """A conversation's tokens after the prefix.

    Attributes:
        ids: token ids.
        labels: as many; the same ids in thoughts and answers, ``IGNORE_LABEL`` elsewhere.
        in_thought: as many; whether a token is of a thought, with its marks. Empty = none is.
    """

    ids: list[int]
    labels: list[int]
    in_thought: list[bool] = field(default_factory=list)


def escape(text: str, tokens: Iterable[str] = SPECIAL_TOKENS) -> str:
    """Escapes special tokens that a user typed: ``[SEG]`` becomes ``[ SEG ]``, which is plain text."""
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:-1]} {token[-1]}")
    return text


@dataclass(frozen=True)
class Prefix:
    """Token ids before and after the image, up to the first question, and the id of the image's placeholder."""

    before: list[int]
    image_id: int
    after: list[int]

    def __len__(self) -> int:
        """Number of tokens without the image's."""
        return len(self.before) + len(self.after)


class PromptBuilder:
    """Tokenises conversations about an image, and the prefix that they share.

    Args:
        tokenizer: a fast tokenizer (offsets are needed) that knows the special tokens.
        system_prompt: text of the template's system turn; may be empty.
        codebook: the tokens of a target, which take the place of each ``[SEG]`` of an answer. They follow each other
            as ids: a tokenizer may see spaces between them, or need some.
        template: of the backbone.
        marks: of thoughts; None = the model was not trained to write any.

    Attributes:
        prefix: tokens before the first question.

    Raises:
        ValueError: if the tokenizer is a slow one, or appends an end-of-sequence token to every text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str,
        codebook: Sequence[str] = (SEG,),
        template: ChatTemplate = VICUNA,
        marks: Marks | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} gives no character offsets; load the fast tokenizer")
        self.tokenizer, self.template, self.system_prompt, self.marks = tokenizer, template, system_prompt, marks
        known = (*SPECIAL_TOKENS, *codebook, *tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
        self.escaped = dict.fromkeys(token for token in known if len(token) > 2)
        self.escaped_in_answers = [token for token in self.escaped if token not in (SEG, REJ)]
        self.seg_name, self.end = codebook[0], template.end or tokenizer.eos_token
        self.codebook = [tokenizer.get_vocab()[name] for name in codebook]
        before, after = template.prefix(system_prompt)
        self.prefix_text = before + template.image[1] + after
        self._prefix_once = tokenizer(self.prefix_text)["input_ids"]
        if self._prefix_once[-1] == tokenizer.eos_token_id:
            raise ValueError("the tokenizer appends an end-of-sequence token to every text; set add_eos_token=False")
        image_id: int = tokenizer.get_vocab()[template.image[1]]
        start = self._prefix_once.index(image_id)
        self.prefix = Prefix(self._prefix_once[:start], image_id, self._prefix_once[start + 1 :])

    def encode(self, turns: tuple[Turn, ...]) -> EncodedConversation:
        """Token ids and labels of one conversation. An empty answer in the last turn is left to generation.

        Raises:
            ValueError: if a question is empty or not UTF-8, or the tokenizer merges across the end of the prefix.
        """
        for turn in turns:
            if not turn.question.strip():
                raise ValueError("a question is empty: say what to look for, for example 'the red star'")
            if any("\ud800" <= character <= "\udfff" for character in turn.question):
                raise ValueError(f"a question contains bytes that are not UTF-8: {turn.question[:60]!a}")
            if turn.thought and not self.marks:
                raise ValueError(f"{turn.question[:60]!r} has a thought, and thought_format is none")
        text, spans, thought_spans = self.prefix_text, [], []
        thoughts = iter([self.marked_thought(turn) for turn in turns if turn.answer])
        for piece, is_answer in self.template.pieces(map(self.escaped_turn, turns), self.end):
            if is_answer:
                if (thought := next(thoughts)) and self.marks and self.marks.special:
                    piece = piece.lstrip(" ")  # one token begins it, and no other answer begins so
                spans.append((len(text), len(text) + len(piece)))
                if thought:
                    thought_spans.append((len(text), len(text) + piece.index(thought) + len(thought)))
            text += piece
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        split = len(self._prefix_once)
        if ids[:split] != self._prefix_once:
            raise ValueError(f"the tokenizer merges the prompt's prefix with the question {turns[0].question!r}")
        labels = [
            token if is_inside else IGNORE_LABEL
            for token, is_inside in zip(ids[split:], _inside(offsets[split:], spans))
        ]
        return self._with_codebook(EncodedConversation(ids[split:], labels, _inside(offsets[split:], thought_spans)))

    @cached_property
    def opening(self) -> list[int]:
        """The tokens that begin an answer with a thought; none without ``marks``."""
        if self.marks is None:
            return []
        before = self.prefix_text + self.template.question.format("a")
        answer = self.template.answer.format(self.marks.marked("b"))
        answer = answer.lstrip(" ") if self.marks.special else answer
        end = len(before) + answer.index(self.marks.opening) + len(self.marks.opening)
        encoded = self.tokenizer(before + answer, return_offsets_mapping=True)
        inside = _inside(encoded["offset_mapping"], [(len(before), end)])
        return [token for token, of_opening in zip(encoded["input_ids"], inside) if of_opening]

    def last_of_question(self, question: str) -> int:
        """Index of the token with a question's last letter or digit, among those of ``encode((Turn(question),))``."""
        text = escape(question.strip(), self.escaped)
        letters = [match.end() for match in re.finditer(r"\w", text)]
        before, _, _ = self.template.question.partition("{}")
        end = len(self.prefix_text) + len(before) + (letters[-1] if letters else len(text))
        whole = self.prefix_text + self.template.question.format(text)
        offsets = self.tokenizer(whole, return_offsets_mapping=True)["offset_mapping"]
        return max(i for i, (left, right) in enumerate(offsets) if left < end and left < right) - len(self._prefix_once)

    def escaped_turn(self, turn: Turn) -> tuple[str, str | None]:
        """Question and answer without special tokens that a user typed; a target's first token for each ``[SEG]``.

        The answer is None where it is to be generated.
        """
        answer = escape(turn.answer.strip(), self.escaped_in_answers).replace(SEG, self.seg_name)
        if self.marks and answer.startswith(self.marks.opening):
            answer = self.marks.plain(answer)
        if thought := self.marked_thought(turn):
            answer = f"{thought} {answer}"
        return escape(turn.question.strip(), self.escaped), answer if turn.answer else None

    def marked_thought(self, turn: Turn) -> str:
        """The thought between its marks, without special tokens; empty if there is none."""
        return self.marks.marked(escape(turn.thought.strip(), self.escaped)) if self.marks and turn.thought else ""

    def _with_codebook(self, conversation: EncodedConversation) -> EncodedConversation:
        """The codebook's tokens in place of its first one, which stands for a target in the text."""
        if len(self.codebook) == 1:
            return conversation
        ids, labels, in_thought = [], [], []
        for token, label, of_thought in zip(conversation.ids, conversation.labels, conversation.in_thought):
            is_target = token == self.codebook[0]
            ids += self.codebook if is_target else [token]
            labels += self.codebook if is_target else [label]
            in_thought += [of_thought] * (len(self.codebook) if is_target else 1)
        return EncodedConversation(ids, labels, in_thought)


def _inside(offsets: Iterable[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token lies in one of the spans of characters."""
    return [any(start <= left and right <= end for start, end in spans) for left, right in offsets]
