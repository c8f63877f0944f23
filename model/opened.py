"""A loaded model with its processor: ``ask`` and ``predict``, and the cache of SAM's features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from model.processing.pixels import Picture, as_pixels
from model.structures import MAX_NEW_TOKENS, Batch, Prediction, Turn

if TYPE_CHECKING:
    from model.grounding import GroundingModel
    from model.loading.weights import Loaded
    from model.processing.processor import UGroundProcessor


@dataclass
class Opened:
    """A loaded model with its processor, as ``model.load`` returns it.

    Attributes:
        device: such as ``cuda``; precision: such as ``bf16`` or ``bf16, 4bit``.
        fingerprint: of the weights as loaded, before quantization.
        folder: the folder that was loaded.
        sources: module -> source of its weights.
    """

    model: GroundingModel
    processor: UGroundProcessor
    device: str
    precision: str
    fingerprint: str
    folder: str
    sources: dict[str, str]

    def report(self) -> list[Loaded]:
        """The loading report: source, size, dtype and fingerprint of each module."""
        from model.loading.weights import report

        return report(self.model, self.sources)

    @overload
    def ask(
        self,
        image: Picture,
        prompt: str,
        layer_policy: str | None = ...,
        max_new_tokens: int = ...,
        seed: int = ...,
        think: str = ...,
    ) -> Prediction: ...

    @overload
    def ask(
        self,
        image: Picture,
        prompt: list[str],
        layer_policy: str | None = ...,
        max_new_tokens: int = ...,
        seed: int = ...,
        think: str = ...,
    ) -> list[Prediction]: ...

    def ask(
        self,
        image: Picture,
        prompt: str | list[str],
        layer_policy: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        seed: int = 0,
        think: str = "auto",
    ) -> Prediction | list[Prediction]:
        """Answers one or several independent questions about an image: text, and a mask per ``[SEG]`` in it.

        The image is encoded once for all questions. For a conversation, or for text while it is generated, see
        ``utils.inference.session.ImageSession``.

        Args:
            image: an array (``as_pixels``), a PIL image, or the path of an image file. The latter two are rotated by
                their EXIF orientation.
            prompt: a question ("Where is the red star?"), or a list of them.
            layer_policy: rule for the layer whose hidden state and similarity map a ``[SEG]`` uses: ``argmax``,
                ``fixed:K``, ``mc:T``, ... (``python -m model.layer_rules`` prints all). None = the model's own.
            max_new_tokens: longest answer.
            seed: of sampled layers.
            think: whether the answer begins with a thought (``predict``).

        Returns:
            The prediction, or one per prompt in a list: ``text`` and ``thought``, ``masks`` (bool [N, H, W] at the
            image's size; N = 0 if the answer has no ``[SEG]``), their ``mask_logits``, and the chosen ``layers``.

        Raises:
            ValueError: if the image cannot be read, a prompt is empty or longer than the model's limit, or the layer
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
            think=think,
        )
        return predictions[0] if isinstance(prompt, str) else predictions


def cache_sam_features(model: GroundingModel, processor: UGroundProcessor, folder: str, gigabytes: float) -> None:
    """Enables the cache of SAM's image embeddings in a folder (``--sam_feature_cache``).

    It takes both parts: the model looks embeddings up, and the processor hashes the images of its batches.

    Raises:
        ValueError: if the model has no SAM, the folder cannot be created or written to, or ``gigabytes`` is not
            positive.
    """
    from model.loading.weights import fingerprint
    from model.sam_cache import FeatureCache

    if not model.visual_model.image_side:
        raise ValueError(f"--sam_feature_cache {folder}: the model's mask decoder has no image encoder; leave it out")
    decoder: Any = model.visual_model
    encoder = fingerprint(decoder.encoder_weights()) + decoder.encoder_settings()
    decoder.cache = FeatureCache(folder, gigabytes, encoder)
    processor.hash_images = True


def predict(
    model: GroundingModel,
    processor: UGroundProcessor,
    images: Sequence[np.ndarray],
    turns: Sequence[Sequence[Turn]],
    sample_ids: Sequence[int] | None = None,
    think: str = "auto",
    **options,
) -> list[list[Prediction]]:
    """Answers every question about every image: [image][question] predictions with their text.

    Args:
        images, turns, sample_ids: of ``UGroundProcessor.prompts``.
        think: whether generated answers begin with a thought: ``auto`` (as the model likes), ``on`` or ``off``.
        options: of ``GroundingModel.predict`` (layer_policy, max_new_tokens, seed, on_token).

    Raises:
        ValueError: as ``UGroundProcessor.prompts`` and ``GroundingModel.predict``.
    """
    batch = processor.prompts(images, turns, sample_ids).to(model.device, model.dtype)
    options |= {} if think == "auto" else {"opening": processor.opening(think)}
    with _evaluating(model):
        return with_text(model.predict(batch, **options), processor)


def predict_rounds(
    model: GroundingModel,
    processor: UGroundProcessor,
    images: Sequence[np.ndarray],
    rounds: Sequence[Sequence[Sequence[Turn]]],
    sample_ids: Sequence[int] | None = None,
    answered: int = 0,
    think: str = "auto",
    **options,
) -> Iterator[list[list[Prediction]]]:
    """``predict`` for several rounds of questions about the same images, which are encoded once.

    Args:
        rounds: [round][image][question].
        think: of ``predict``; answered, options: of ``GroundingModel.predict_rounds``.

    Yields:
        the [image][question] predictions of each round after the first ``answered`` ones, as soon as it is answered.

    Raises:
        ValueError: as ``predict``.
    """
    batches: list[Batch] = []
    for turns in rounds:
        seen = batches[0] if batches else None
        batches.append(processor.prompts(images, turns, sample_ids, seen).to(model.device, model.dtype))
    options |= {} if think == "auto" else {"opening": processor.opening(think)}
    with _evaluating(model):
        for predictions in model.predict_rounds(batches, answered, **options):
            yield with_text(predictions, processor)


@contextmanager
def _evaluating(model: GroundingModel) -> Iterator[None]:
    """The model in evaluation mode."""
    was_training = model.training
    model.eval()  # also where the model is: modules that peft adds to it begin in training mode
    try:
        yield
    finally:
        if was_training:
            model.train()


def with_text(predictions: list[list[Prediction]], processor: UGroundProcessor) -> list[list[Prediction]]:
    """The predictions with ``text`` and ``thought``, decoded from their ``token_ids``.

    A ``[SEG]`` in a thought is no part of the answer: its mask is dropped.
    """
    return [[_with_text(prediction, processor) for prediction in row] for row in predictions]


def _with_text(prediction: Prediction, processor: UGroundProcessor) -> Prediction:
    text = processor.decode(prediction.token_ids)
    thought, text = processor.split_thought(text, complete=not prediction.cut)
    if thought and (dropped := processor.in_answer(prediction.token_ids, processor.tokens.seg).count(False)):
        prediction = prediction.without_first(dropped)
    prediction.thought, prediction.text = thought, text
    return prediction
