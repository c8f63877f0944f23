"""Chat templates in pieces: the prefix that all conversations about an image share, and the turns after it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from model.processing.tokens import IM_END, IM_START, IMAGE


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
