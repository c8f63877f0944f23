"""A model and its processor, opened together: asking them, and what both must be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from model.loading.weights import Loaded, fingerprint, report
from model.processing.pixels import Picture, as_pixels
from model.processing.processor import UGroundProcessor
from model.sam_cache import FeatureCache
from model.structures import Prediction, Turn
from model.UGround import UGroundForCausalLM


@dataclass
class Opened:
    """A model ready to be asked, as ``model.load`` gives it.

    Attributes:
        device: where it computes; precision: in what, such as ``bf16`` or ``bf16, 4bit``.
        fingerprint: of its weights as they were loaded, before they were quantized.
        kind: of the folder: ``merged``, ``adapter``, ``released`` or ``base`` (see ``kind_of``).
        folder: that it was loaded from; sources: of each module, where its weights came from.
    """

    model: UGroundForCausalLM
    processor: UGroundProcessor
    device: str
    precision: str
    fingerprint: str
    kind: str
    folder: str
    sources: dict[str, str]

    def report(self) -> list[Loaded]:
        """The loading report: of each module its source, size, dtype and fingerprint."""
        return report(self.model, self.sources)

    @overload
    def ask(
        self, image: Picture, prompt: str, layer_policy: str | None = ..., max_new_tokens: int = ..., seed: int = ...
    ) -> Prediction: ...

    @overload
    def ask(
        self,
        image: Picture,
        prompt: list[str],
        layer_policy: str | None = ...,
        max_new_tokens: int = ...,
        seed: int = ...,
    ) -> list[Prediction]: ...

    def ask(
        self,
        image: Picture,
        prompt: str | list[str],
        layer_policy: str | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
    ) -> Prediction | list[Prediction]:
        """Answers one question about an image, or several, each by itself: text, and a mask per ``[SEG]`` in it.

        The image is encoded once for all of its questions. ``utils.inference.session.ImageSession`` holds a
        conversation instead, and writes token by token.

        Args:
            image: uint8 [H, W, 3] RGB, a PIL image, or the path of an image file. The latter two are turned upright as
                their EXIF data say.
            prompt: what to look for, or to ask: "Where is the red star?"
            layer_policy: layer whose hidden state (and similarity map) a ``[SEG]`` uses: ``argmax``,
                ``fixed:K``, ``mc:T``, ... (``python -m model.layer_rules`` prints all). None = the model's own.
            max_new_tokens: longest answer.
            seed: of sampled layers.

        Returns:
            A prediction per prompt, in their order: ``text``, ``masks`` (bool [N, H, W] at the image's size, N = 0 if
            nothing was found), their ``mask_logits``, and the ``layers`` that were chosen.

        Raises:
            ValueError: if the image cannot be read, a prompt is empty or longer than the model reads, or the layer
                policy is unknown.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        [predictions] = predict(
            self.model,
            self.processor,
            [as_pixels(image)],
            [[Turn(text) for text in prompts]],
            layer_policy=layer_policy,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        return predictions[0] if isinstance(prompt, str) else predictions


def cache_sam_features(model: UGroundForCausalLM, processor: UGroundProcessor, folder: str, gigabytes: float) -> None:
    """From now on SAM's image embeddings are kept in a folder (``--sam_feature_cache``).

    The model needs to be told, and so does the processor, whose batches then name their images.

    Raises:
        ValueError: if the folder cannot be made or written to, or may hold nothing.
    """
    encoder = model.visual_model.image_encoder
    model.visual_model.cache = FeatureCache(folder, gigabytes, fingerprint(encoder.state_dict().values()))
    processor.hash_images = True


def predict(
    model: UGroundForCausalLM,
    processor: UGroundProcessor,
    images: Sequence[np.ndarray],
    turns: Sequence[Sequence[Turn]],
    sample_ids: Sequence[int] | None = None,
    **options,
) -> list[list[Prediction]]:
    """Asks every question about every image: [image][question] predictions with their text.

    Args:
        images, turns, sample_ids: of ``UGroundProcessor.prompts``.
        options: of ``UGroundForCausalLM.predict`` (layer_policy, max_new_tokens, seed, on_token).
    """
    was_training = model.training
    model.eval()
    batch = processor.prompts(images, turns, sample_ids).to(model.device, model.dtype)
    predictions = with_text(model.predict(batch, **options), processor)
    model.train(was_training)
    return predictions


def with_text(predictions: list[list[Prediction]], processor: UGroundProcessor) -> list[list[Prediction]]:
    """Decodes what was said into each prediction's ``text``."""
    for row in predictions:
        for prediction in row:
            prediction.text = processor.decode(prediction.token_ids)
    return predictions
