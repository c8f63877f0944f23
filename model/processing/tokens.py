"""The special tokens, looked up once and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEG, REJ, IMAGE, IM_START, IM_END = "[SEG]", "[REJ]", "<image>", "<im_start>", "<im_end>"
SPECIAL_TOKENS = (SEG, REJ, IM_START, IM_END, IMAGE)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens in one tokenizer; ``rej`` is None if the model was not trained to reject (LISA).

    With a codebook, ``seg`` is its last token, which completes a target.

    Attributes:
        image: of the placeholder, which needs no embedding; im_start, im_end: of LLaVA's tokens around it.
    """

    seg: int
    rej: int | None
    image: int
    im_start: int | None
    im_end: int | None
    eos: int
    pad: int

    @property
    def added(self) -> tuple[int, ...]:
        """Ids of the added tokens that the language model reads or writes."""
        return tuple(token for token in (self.seg, self.rej, self.im_start, self.im_end) if token is not None)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """A checkpoint's tokenizer.

    LLaVA-1.5 is published with SentencePiece's file alone. For its ``model_type``, AutoTokenizer picks a class that
    omits the space before the first word, so that prompts would begin with a token the model was not trained on.

    Raises:
        ValueError: if a file is damaged or not completely downloaded, or the tokenizer is code (``auto_map``).
    """
    # here: data sets need only the special tokens' names
    from transformers import AutoTokenizer, LlamaTokenizer

    from model.loading.files import blame, check_downloaded, read_json

    folder = Path(folder)
    present = [path for name in TOKENIZER_FILES if (path := folder / name).is_file()]
    if not present:
        raise ValueError(f"{folder} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES)})")
    for path in present:
        if path.suffix != ".json":
            check_downloaded(path)
        elif "auto_map" in read_json(path):
            raise ValueError(f"{path}: the tokenizer is code of its own (auto_map), which is not run")
    read = [*present, *folder.glob("config.json")]  # AutoTokenizer reads this one, too
    with blame(f"the tokenizer cannot be loaded from {', '.join(map(str, read))}"):
        if folder / "tokenizer.model" in present and folder / "tokenizer.json" not in present:
            return LlamaTokenizer.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.encode(SEG)  # fails, if at all, where the files are known
        return tokenizer


def codebook_names(size: int) -> tuple[str, ...]:
    """A target's [SEG] tokens: ``[SEG]`` alone, or PixelLM's ``[SEG0]`` to ``[SEG(size - 1)]``."""
    return (SEG,) if size == 1 else tuple(f"[SEG{number}]" for number in range(size))


def codebook_size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of the [SEG] tokens of a target that a published tokenizer knows."""
    vocabulary = tokenizer.get_vocab()
    return next(number for number in count() if f"[SEG{number}]" not in vocabulary) or 1


def add_special_tokens(
    tokenizer: PreTrainedTokenizerBase,
    codebook: int = 1,
    of_template: Sequence[str] | None = None,
    of_thoughts: Sequence[str] = (),
) -> list[str]:
    """Adds the special tokens that the tokenizer lacks, which are returned, and a padding token.

    Args:
        codebook: number of [SEG] tokens per target.
        of_template: what the chat template needs beside them (``ChatTemplate.added``); None = LLaVA's.
        of_thoughts: the marks of thoughts that are tokens.
    """
    others = SPECIAL_TOKENS if of_template is None else (REJ, *of_template)
    special = [*codebook_names(codebook), *(token for token in others if token != SEG), *of_thoughts]
    missing = [token for token in special if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return missing


def token_ids(
    tokenizer: PreTrainedTokenizerBase,
    where: str = "the tokenizer",
    codebook: int = 1,
    image: str = IMAGE,
    around_image: bool = True,
    end: str = "",
) -> TokenIds:
    """Ids of the special tokens, checked.

    Args:
        where: name of the tokenizer, for messages.
        codebook: number of [SEG] tokens per target; all are checked.
        image: the chat template's placeholder; around_image: whether LLaVA's tokens stand around it; end: the token
            that ends an answer, "" = the tokenizer's end-of-sequence token.

    Raises:
        ValueError: if one other than [REJ] is unknown, two share an id, one is not encoded as a single token, or there
            is no end-of-sequence token.
    """
    names = [*codebook_names(codebook), *[IM_START, IM_END] * around_image, image, *[end] * bool(end)]
    vocabulary = tokenizer.get_vocab()
    if REJ in vocabulary:
        names.append(REJ)
    if unknown := [token for token in names if token not in vocabulary]:
        raise ValueError(
            f"{where} does not know {', '.join(unknown)}; add them with model.processing.tokens.add_special_tokens"
        )
    ids = {token: vocabulary[token] for token in names}
    if len(set(ids.values())) != len(ids):
        raise ValueError(f"{where} gives one id to several special tokens: {ids}")
    for token in names:
        if tokenizer.encode(token, add_special_tokens=False) != [ids[token]]:
            raise ValueError(f"{where} splits {token} into {tokenizer.tokenize(token)}; it must be one special token")
    eos = ids.get(end, tokenizer.eos_token_id)
    if eos is None:
        raise ValueError(f"{where} has no end-of-sequence token (eos_token in tokenizer_config.json)")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    return TokenIds(
        seg=ids[codebook_names(codebook)[-1]],
        rej=ids.get(REJ),
        image=ids[image],
        im_start=ids.get(IM_START),
        im_end=ids.get(IM_END),
        eos=eos,
        pad=pad,
    )
