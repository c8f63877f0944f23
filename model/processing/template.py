"""Chat templates in pieces: the prefix that all conversations about an image share, and the turns after it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.loading.files import blame
from model.processing.tokens import IM_END, IM_START, IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a conversation: prefix, question, answer, then what stands between, question, answer, ...

    Attributes:
        system: with ``{}`` for the system prompt; left out where that is empty.
        user: the beginning of the first user's turn, before the image.
        image: (before, placeholder, after): the placeholder is one token, which stands for each of the image's.
        question: with ``{}`` for the question, up to where the answer begins.
        answer: with ``{}`` for the answer.
        end: the token that ends an answer; "" = the tokenizer's end-of-sequence token.
        between: what stands between that token and the next question.
        system_prompt: the default one.
        start: before everything.
        added: tokens of the template that a tokenizer gets with those of UGround.
    """

    system: str
    user: str
    image: tuple[str, str, str]
    question: str
    answer: str
    end: str = ""
    between: str = ""
    system_prompt: str = ""
    start: str = ""
    added: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """The special tokens that its text names, such as ``<|im_start|>``."""
        text = "".join(
            (self.system, self.user, *self.image, self.question, self.answer, self.end, self.between, self.start)
        )
        return tuple(dict.fromkeys(re.findall(r"<[^<>\s]+>", text)))

    def prefix(self, system_prompt: str) -> tuple[str, str]:
        """The text before and after the image's placeholder, up to the first question."""
        system = self.system.format(system_prompt) if system_prompt else ""
        return self.start + system + self.user + self.image[0], self.image[2]

    def pieces(self, turns: Iterable[tuple[str, str | None]], end: str) -> Iterator[tuple[str, bool]]:
        """The text after the prefix: (piece, whether the model writes it).

        Args:
            turns: (question, answer); None = the model is to answer.
            end: the token that ends an answer.
        """
        for number, (question, answer) in enumerate(turns):
            yield self.between * bool(number) + self.question.format(question), False
            if answer is not None:
                yield self.answer.format(answer) + end, True


SYSTEM_PROMPT = (  # of LLaVA's conversations "vicuna_v1"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN_SYSTEM_PROMPT = SYSTEM_PROMPT.replace("user", "human")  # of LLaVA's conversations "llava_v1"
VICUNA = ChatTemplate(  # LLaVA-1.5's "v1", with the tokens around the image that LISA and its descendants add
    system="{} ",
    user="USER: ",
    image=(IM_START, IMAGE, f"{IM_END}\n"),
    question="{} ASSISTANT:",
    answer=" {}",
    between="USER: ",
    system_prompt=SYSTEM_PROMPT,
    added=(IM_START, IM_END, IMAGE),
)


def check_template(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Compares a backbone's template with the tokenizer's own ``chat_template``, where there is one.

    Args:
        source: the tokenizer's folder, for messages.

    Raises:
        ValueError: if they write another text, as those of variants that think before they answer.
    """
    if not tokenizer.chat_template:
        return
    questions = [[{"type": "image"}, {"type": "text", "text": "a"}], [{"type": "text", "text": "c"}]]
    answer = [{"type": "text", "text": "b"}]
    roles = zip(("user", "assistant", "user"), (questions[0], answer, questions[1]))
    messages: Any = [{"role": role, "content": content} for role, content in roles]
    with blame(f"{source}: its chat_template cannot be read"):
        theirs: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, image, after = template.image
    if before not in theirs:  # InternVL's processor writes the tokens around the image, not the template
        theirs = theirs.replace(image, before + image + after.rstrip())
    prefix = image.join(template.prefix(template.system_prompt))
    ours = prefix + "".join(piece for piece, _ in template.pieces([("a", "b"), ("c", None)], template.end))
    if theirs != ours:
        raise ValueError(
            f"{source}: its chat_template writes {theirs!r}, this backbone's prompts are {ours!r}; use the Instruct "
            "variant of the model, which answers at once"
        )
