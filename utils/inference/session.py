"""A conversation about an image: CLIP, the prefix and SAM's encoder run once, and a follow-up costs its own tokens.

What the model reads is what ``PromptBuilder`` makes of the whole conversation, as in training; the cache only spares it
from reading the same tokens twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from model.generation import ConversationCache
from model.processing.processor import UGroundProcessor
from model.structures import Prediction, Turn
from model.UGround import LanguagePass, UGroundForCausalLM


class ImageSession:
    """One image, and what was asked about it. For one thread at a time; any number of sessions share a model.

    Args:
        image: uint8 [H, W, 3] RGB.

    Attributes:
        history: the turns that the model sees with the next question. The oldest are forgotten when
            ``processor.max_tokens`` leaves no room for them.
    """

    def __init__(self, model: UGroundForCausalLM, processor: UGroundProcessor, image: np.ndarray) -> None:
        self.model, self.processor = model, processor
        self.batch = replace(processor.prefix(image).to(model.device, model.dtype), questions=[1])
        self.row = ConversationCache(model, self.batch)
        self.embeddings: torch.Tensor | None = None
        self.history: list[Turn] = []
        self.last: LanguagePass | None = None

    def ask(
        self,
        prompt: str,
        *,
        layer_policy: str | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
        remember: bool = True,
    ) -> Prediction:
        """Answers a question that follows on those before; a mask per [SEG].

        Args:
            layer_policy, max_new_tokens, seed: see ``UGroundForCausalLM.predict``.
            on_text: gets the answer so far after each token. What it raises ends the question, and the session is as
                before it.
            remember: False = the question stands by itself: the model does not see earlier ones, nor later this one.

        Raises:
            ValueError: if the question is empty or longer than the model reads, or the layer policy is unknown.
        """
        self.model.config.layer_rule(layer_policy)  # a mistake shows before the answer is written
        earlier = self.history if remember else []
        earlier, ids = self._fitting(earlier, prompt, max_new_tokens)
        said: list[int] = []

        def on_token(newest: list[int]) -> None:
            said.extend(newest)
            if on_text is not None:
                on_text(self.processor.decode(said))

        answers = self.row.answer(ids, max_new_tokens, on_token)
        embeddings = self._sam() if answers.seg_questions else None
        answered = LanguagePass(self.batch, answers, self.row.hidden, self.row.valid, embeddings)
        prediction = self._draw(answered, layer_policy, seed)
        self.last = answered
        if remember and prediction.text:
            self.history = [*earlier, Turn(prompt, prediction.text)]
        return prediction

    def redraw(self, layer_policy: str | None = None, seed: int = 0) -> Prediction:
        """The last answer's masks by other layers, without LLaVA.

        Raises:
            ValueError: if there is no answer yet, or the layer policy is unknown.
        """
        if self.last is None:
            raise ValueError("nothing was asked about this image yet, so there are no masks to draw again")
        return self._draw(self.last, layer_policy, seed)

    def reset(self) -> None:
        """Forgets the conversation; the image stays encoded."""
        self.history, self.last = [], None

    def _fitting(self, turns: list[Turn], prompt: str, max_new_tokens: int) -> tuple[list[Turn], list[int]]:
        """The newest turns that leave room for the answer, and the tokens of the conversation."""
        room = self.processor.max_tokens - len(self.processor.builder.prefix_ids)
        while True:
            ids = self.processor.builder.encode((*turns, Turn(prompt, ""))).ids
            if not turns or len(ids) + max_new_tokens <= room:
                break
            turns = turns[1:]
        if len(ids) > room:
            raise ValueError(f"the question has {len(ids)} tokens, {room} fit beside the image; ask for less at a time")
        return turns, ids

    @torch.inference_mode()
    def _sam(self) -> torch.Tensor:
        if self.embeddings is None:
            self.embeddings = self.model.visual_model.encode(self.batch.sam_images, self.batch.image_keys)
        return self.embeddings

    def _draw(self, answered: LanguagePass, layer_policy: str | None, seed: int) -> Prediction:
        [[prediction]] = self.model.decode_masks(answered, layer_policy, seed)
        prediction.text = self.processor.decode(prediction.token_ids)
        return prediction
