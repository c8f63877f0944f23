"""A conversation about an image: CLIP, the prefix and SAM's encoder run once; a follow-up costs only its own tokens.

The model sees the whole conversation as ``PromptBuilder`` encodes it in training; the cache only avoids computing the
same tokens twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from model.opened import with_text
from model.structures import MAX_NEW_TOKENS, Prediction, Turn

if TYPE_CHECKING:
    import torch

    from model.grounding import GroundingModel, LanguagePass
    from model.processing.processor import UGroundProcessor


class ImageSession:
    """One image and the conversation about it. Not thread-safe; any number of sessions share a model.

    Args:
        image: uint8 [H, W, 3] RGB.

    Attributes:
        history: the turns that the model sees with the next question. The oldest are dropped when
            ``processor.max_tokens`` leaves no room for them.
    """

    def __init__(self, model: GroundingModel, processor: UGroundProcessor, image: np.ndarray) -> None:
        from model.generation import ConversationCache

        self.model, self.processor = model, processor
        self.batch = replace(processor.prefix(image).to(model.device, model.dtype), questions=[1])
        self.cache = ConversationCache(model, self.batch)
        self.embeddings: torch.Tensor | None = None
        self.history: list[Turn] = []
        self.last: LanguagePass | None = None

    def ask(
        self,
        prompt: str,
        *,
        layer_policy: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        on_text: Callable[[str], None] | None = None,
        remember: bool = True,
        think: str = "auto",
    ) -> Prediction:
        """Answers a question of the conversation, with a mask per [SEG].

        Args:
            layer_policy, max_new_tokens, seed: see ``GroundingModel.predict``.
            on_text: receives the answer so far after each token. An exception that it raises cancels the question and
                leaves the session unchanged.
            remember: whether the question belongs to the conversation; if not, it neither sees the history nor is
                added to it.
            think: whether the answer begins with a thought (``model.opened.predict``).

        Raises:
            ValueError: if the question is empty or too long, or the layer policy is unknown.
        """
        from model.grounding import LanguagePass

        self.model.config.layer_rule(layer_policy)  # raises before the answer is generated
        opening = self.processor.opening(think)
        earlier = self.history if remember else []
        earlier, ids = self._fit(earlier, prompt, max_new_tokens)
        token_ids: list[int] = []

        def on_token(newest: list[int]) -> None:
            token_ids.extend(newest)
            if on_text is not None:
                on_text(self.processor.decode(token_ids))

        answers = self.cache.answer(ids, max_new_tokens, on_token, opening)
        embeddings = self._image_embeddings() if answers.seg_questions else None
        language_pass = LanguagePass(self.batch, answers, self.cache.hidden, embeddings)
        prediction = self._decode_masks(language_pass, layer_policy, seed)
        self.last = language_pass
        if remember and prediction.text:
            self.history = [*earlier, Turn(prompt, prediction.text, prediction.thought)]
        return prediction

    def decode_again(self, layer_policy: str | None = None, seed: int = 0) -> Prediction:
        """Decodes the last answer's masks with another layer rule, without running LLaVA.

        Raises:
            ValueError: if there is no answer yet, or the layer policy is unknown.
        """
        if self.last is None:
            raise ValueError("nothing was asked about this image yet, so there are no masks to decode again")
        return self._decode_masks(self.last, layer_policy, seed)

    def reset(self) -> None:
        """Forgets the conversation; the image stays encoded."""
        self.history, self.last = [], None

    def _fit(self, turns: list[Turn], prompt: str, max_new_tokens: int) -> tuple[list[Turn], list[int]]:
        """The latest turns that leave room for the answer, and the token ids of the conversation.

        A quarter of the room is enough: most answers are far shorter than the longest, and history is worth more.
        """
        room = self.processor.room
        reserved = min(max_new_tokens, room // 4)
        while True:
            ids = self.processor.builder.encode((*turns, Turn(prompt, ""))).ids
            if not turns or len(ids) + reserved <= room:
                break
            turns = turns[1:]
        if len(ids) > room:
            raise ValueError(f"the question has {len(ids)} tokens, {room} fit beside the image; ask for less at a time")
        return turns, ids

    def _image_embeddings(self) -> torch.Tensor:
        import torch

        if self.embeddings is None:
            with torch.inference_mode():
                self.embeddings = self.model.visual_model.embed_images(self.batch, self.cache.clip_states)
        return self.embeddings

    def _decode_masks(self, language_pass: LanguagePass, layer_policy: str | None, seed: int) -> Prediction:
        [[prediction]] = with_text(self.model.decode_masks(language_pass, layer_policy, seed), self.processor)
        return prediction
