"""User data: all valid forms of the JSONL, and all errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.datasets import DataError, DataOptions, get_eval_dataset, get_train_dataset
from utils.datasets.masks import encode_mask
from utils.datasets.mixture import Mixture
from utils.datasets.templates import ANSWERS

H, W = 40, 60
SQUARE = [[5, 5], [15, 5], [15, 15], [5, 15]]
FAR = [[30, 20], [50, 20], [50, 30]]


def picture(path: Path, height: int = H, width: int = W, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (30, 60, 90)).save(path, **options)
    return path


def write(path: Path, *lines: dict | str, end: str = "\n", encoding: str = "utf-8") -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_bytes("".join(text + end for text in texts).encode(encoding))
    return path


def truth(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    mask = np.zeros((H, W), np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, two mask images, and ``own.jsonl`` with a training and a validation split."""
    for name in ("a.jpg", "b.png"):
        picture(tmp_path / "pictures" / name)
    Image.fromarray(truth(5, 5, 15, 15) * 255).save(tmp_path / "mask.png")
    turns = [
        ("human", "<image>\nWhere are they?"),
        ("gpt", "The cup is [SEG], the dish [SEG]."),
        ("human", "And the cat?"),
    ]
    turns += [("gpt", "No, it is not here: [REJ].")]
    write(
        tmp_path / "own.jsonl",
        {"image": "pictures/a.jpg", "query": "the cup", "masks": [SQUARE]},
        "",
        {"image": "pictures/b.png", "query": "Who is it?", "masks": [], "split": "val"},
        {"image": "pictures/a.jpg", "query": "the cups", "masks": [SQUARE, [FAR, [1, 1, 3, 1, 3, 3]]], "size": [H, W]},
        {
            "image": "./pictures/a.jpg",
            "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
            "masks": ["mask.png", encode_mask(truth(20, 20, 30, 30))],
        },
        {"image": "pictures/a.jpg", "query": "the dog", "masks": [], "split": "train"},
        {"image": "pictures/b.png", "query": "the café", "masks": ["mask.png"], "split": "val", "meta": {"family": 1}},
        {"image": "pictures/b.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
         "split": "val"},
    )  # fmt: skip
    return tmp_path


def one(folder: Path, line: dict | str, **options) -> Path:
    return write(folder / "one.jsonl", line, **options)


GOOD = {"image": "pictures/a.jpg", "query": "the cup", "masks": [SQUARE]}

# -- what is read ------------------------------------------------------------------------------------------------------


def test_training_packs_the_lines_of_an_image(folder):
    dataset = get_train_dataset("custom|own.jsonl", folder, DataOptions(questions_per_image=9))
    assert dataset.describe() == {"images": 1, "expressions": 5, "absent": 1, "multi": 1}
    sample = dataset.sample(0, np.random.default_rng(3))
    answers = {turns[0].question: [turn.answer for turn in turns] for turns in sample.conversations}
    assert len(answers) == 4
    chosen = {kind: next(a for q, [a, *_] in answers.items() if word in q.lower()) for kind, word in
            (("target", "the cup "), ("merged", "the cups"), ("absent", "the dog"))}  # fmt: skip
    assert all(answer in ANSWERS[kind] for kind, answer in chosen.items())
    assert answers["Where are they?"] == ["The cup is [SEG], the dish [SEG].", "No, it is not here: [REJ]."]
    areas = iter(sample.masks.sum(axis=(1, 2)).tolist())
    decoded = {
        question: [next(areas) for _ in range(" ".join(texts).count("[SEG]"))] for question, texts in answers.items()
    }
    assert decoded["Where are they?"] == [100, 100]
    merged = next(areas for question, areas in decoded.items() if "the cups" in question)
    assert 100 + 90 < merged[0] < 100 + 120
    again = dataset.sample(0, np.random.default_rng(3))
    assert again.conversations == sample.conversations
    assert np.array_equal(again.masks, sample.masks)


def test_questions_per_image_is_the_limit(folder):
    dataset = get_train_dataset("custom|own.jsonl", folder, DataOptions(questions_per_image=2))
    assert {len(dataset.sample(0, np.random.default_rng(i)).conversations) for i in range(5)} == {2}


def test_evaluation_scores_queries_and_names_conversations(folder):
    dataset = get_eval_dataset("custom|own.jsonl|val", folder)
    assert (len(dataset), dataset.num_queries, dataset.spec.name) == (1, 2, "custom")
    sample = dataset[0]
    assert [(q.query_id, q.text, q.is_sentence, q.masks.shape[0]) for q in sample.queries] == [
        ("3", "Who is it?", True, 0),
        ("7", "the café", False, 1),
    ]
    assert sample.queries[1].meta == {"length": "short", "targets": 1, "family": 1}
    assert np.array_equal(sample.queries[1].masks[0], truth(5, 5, 15, 15))
    assert dataset.skipped == [f"{folder / 'own.jsonl'}, line 8: a conversation is not scored"]
    merged = get_eval_dataset("custom|own.jsonl|train", folder)[0].queries[1]
    assert merged.masks.shape == (1, H, W)
    assert merged.meta["targets"] == 2


@pytest.mark.parametrize(
    "mask",
    [
        SQUARE,
        [5, 5, 15, 5, 15, 15, 5, 15],
        [SQUARE],
        [[5, 5, 10, 5, 10, 15, 5, 15], [10, 5, 15, 5, 15, 15, 10, 15]],
        encode_mask(truth(5, 5, 15, 15)),
        {"size": [H, W], "counts": [5 * H + 5, *[10, 30] * 9, 10, 25 + (W - 15) * H]},
        "mask.png",
    ],
)
def test_forms_of_a_mask_agree(folder, mask):
    one(folder, {**GOOD, "masks": [mask]})
    [decoded] = get_train_dataset("custom|one.jsonl", folder).sample(0, np.random.default_rng(0)).masks
    assert np.array_equal(decoded, truth(5, 5, 15, 15))


def test_ignored_regions_count_neither_way(folder):
    """255 where no target covers them, in training and evaluation; an absent target has no mask to carry them."""
    region = [[5, 5], [25, 5], [25, 15], [5, 15]]
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "[SEG] and [SEG]."}]
    lines = [{"query": "the cup", "masks": [SQUARE, FAR]}, {"query": "the dog", "masks": []}]
    lines += [{"conversations": turns, "masks": [SQUARE, FAR]}]
    path = write(folder / "ignore.jsonl", *({"image": "pictures/a.jpg", "ignore": [region], **line} for line in lines))
    expected = np.where(truth(5, 5, 25, 15) > 0, 255, 0).astype(np.uint8)
    expected[5:15, 5:15] = 1
    cup, dog = get_eval_dataset(f"custom|{path}", folder)[0].queries
    assert np.array_equal(cup.masks[0][:, :26], expected[:, :26])
    assert len(dog.masks) == 0
    sample = get_train_dataset(f"custom|{path}", folder).sample(0, np.random.default_rng(0))
    order = sorted(sample.masks, key=lambda mask: int((mask == 1).sum()))
    assert [int((mask == 255).sum()) for mask in order] in ([100, 200, 100], [200, 100, 100])
    assert any(np.array_equal(mask, expected) for mask in order)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16"])
def test_mask_pictures_of_any_mode(folder, mode):
    mask = truth(5, 5, 15, 15)
    if mode in ("L", "P"):
        image = Image.fromarray(mask)
        if mode == "P":
            image = Image.fromarray(mask, "P")
            image.putpalette([255, 255, 255, 9, 0, 0])  # what counts is the index, not its color
    elif mode == "I;16":
        image = Image.fromarray(mask.astype(np.uint16))
    elif mode in ("LA", "RGBA"):
        image = Image.new(mode, (W, H), "white")  # white everywhere, opaque on the target alone
        image.putalpha(Image.fromarray(mask * 255))
    else:
        image = Image.fromarray(mask * 255).convert(mode)
    image.save(folder / "mode.png")
    with Image.open(folder / "mode.png") as saved:
        assert saved.mode == mode
    one(folder, {**GOOD, "masks": ["mode.png"]})
    [decoded] = get_train_dataset("custom|one.jsonl", folder).sample(0, np.random.default_rng(0)).masks
    assert np.array_equal(decoded, mask)


@pytest.mark.parametrize("size", [1, 2])  # transparent: index 1 of 2, 2 of 3
def test_transparent_colors_of_a_palette_are_no_target(folder, size):
    mask = truth(5, 5, 15, 15)
    image = Image.fromarray(np.where(mask, size - 1, size).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 255, 255, 255])
    image.save(folder / "mode.png", transparency=size)
    path = one(folder, {**GOOD, "masks": ["mode.png"]})
    if size == 1:  # the target is black
        with pytest.raises(DataError, match="another color than black"):
            get_eval_dataset("custom|one.jsonl", folder)[0]
    else:
        assert np.array_equal(get_eval_dataset(f"custom|{path}", folder)[0].queries[0].masks[0], mask)


def test_a_palette_in_which_black_may_be_the_target_is_an_error(folder):
    image = Image.fromarray(truth(5, 5, 15, 15), "P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    image.save(folder / "mode.png")
    one(folder, {**GOOD, "masks": ["mode.png"]})
    with pytest.raises(DataError, match="its palette has black at index 1"):
        get_eval_dataset("custom|one.jsonl", folder)[0]


def test_photographs_are_turned_upright(folder):
    """Annotation tools display rotated images; polygons refer to the displayed pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(folder / "turned.jpg", 30, 50, exif=exif)
    one(folder, {**GOOD, "image": "turned.jpg", "size": [50, 30]})
    sample = get_train_dataset("custom|one.jsonl", folder).sample(0, np.random.default_rng(0))
    assert sample.image.shape == (50, 30, 3)
    assert sample.masks.shape == (1, 50, 30)


@pytest.mark.parametrize(("end", "encoding"), [("\r\n", "utf-8"), ("\n", "utf-8-sig"), ("\n\n", "utf-8")])
def test_windows_files_are_read(folder, end, encoding):
    path = folder / "windows.jsonl"
    lines = [{**GOOD, "query": text} for text in ("the café", "the inn")]
    write(path, *lines, end=end, encoding=encoding)
    queries = get_eval_dataset(f"custom|{path}|train", folder)[0].queries
    assert [query.text for query in queries] == ["the café", "the inn"]


def test_files_are_found_from_here_and_from_the_data(folder, monkeypatch):
    write(folder / "data.jsonl", {**GOOD, "image": str(folder / "pictures/a.jpg")})
    monkeypatch.chdir(folder / "pictures")
    assert len(get_train_dataset("custom|../own.jsonl", folder / "pictures")) == 1
    assert len(get_train_dataset("custom|data.jsonl", folder)) == 1
    with pytest.raises(DataError, match=r"no file \(looked in none\.jsonl, .*pictures/none\.jsonl"):
        get_train_dataset("custom|none.jsonl", folder / "pictures")
    with pytest.raises(DataError, match="is a folder; give the JSONL"):
        get_train_dataset(f"custom|{folder}", folder)


def test_mixture_takes_files(folder):
    write(folder / "two.jsonl", {**GOOD, "image": "pictures/b.png"})
    mixture = Mixture(folder, "custom", data={"custom": "own.jsonl||two.jsonl|train"})
    assert [row["name"] for row in mixture.describe()] == ["custom|own.jsonl", "custom|two.jsonl|train"]
    assert {mixture[number].image.shape for number in range(4)} == {(H, W, 3)}
    with pytest.raises(DataError, match=r"no file is given; add --custom_data"):
        Mixture(folder, "custom")
    with pytest.raises(DataError, match=r"no file \(looked in (.|\n)*no file \(looked in"):
        Mixture(folder, "custom", data={"custom": "x.jsonl||y.jsonl"})


def test_splits_are_named(folder):
    for spec, message in (
        ("custom|own.jsonl|vall", "unknown split 'vall'. Did you mean 'val'"),
        ("custom|own.jsonl", "has the splits train, val; write 'custom|own.jsonl|train'"),
        ("custom", r"write 'custom\|FILE.jsonl'"),
        ("custom|own.jsonl|val|x", r"write 'custom\|FILE.jsonl'"),
    ):
        with pytest.raises(DataError, match=message):
            get_eval_dataset(spec, folder)
    write(folder / "val.jsonl", {**GOOD, "split": "val"})
    assert len(get_eval_dataset("custom|val.jsonl", folder)) == 1
    with pytest.raises(DataError, match="unknown split 'train'"):
        get_train_dataset("custom|val.jsonl", folder)


def test_conversations_alone_cannot_be_scored(folder):
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    one(folder, {"image": "pictures/a.jpg", "conversations": turns})
    with pytest.raises(DataError, match="no query to score"):
        get_eval_dataset("custom|one.jsonl", folder)
    assert get_train_dataset("custom|one.jsonl", folder).sample(0, np.random.default_rng(0)).masks.shape == (0, H, W)


def test_a_long_file_is_small_in_memory(folder):
    """Masks stay on disk: memory is 48 bytes per line, independent of its content."""
    crowded = [[float(n % 50), float(n % 30)] for n in range(500)]
    lines = ({**GOOD, "query": f"cup {n}", "masks": [crowded]} for n in range(300))
    path = write(folder / "long.jsonl", *lines)
    kept = get_train_dataset("custom|long.jsonl", folder).file
    assert kept._rows.nbytes == 300 * 48 < path.stat().st_size / 50
    assert not [value for value in vars(kept).values() if isinstance(value, (list, dict)) and len(value) > 10]


# -- what is wrong: at the start, with file and line -------------------------------------------------------------------

HUMAN, GPT = {"from": "human", "value": "Where?"}, {"from": "gpt", "value": "It is [SEG]."}


def conversation_line(*turns: object, masks: object = (SQUARE,)) -> dict:
    return {"image": "pictures/a.jpg", "conversations": list(turns), "masks": list(masks)}


def without(key: str) -> dict:
    return {name: value for name, value in GOOD.items() if name != key}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (without("image"), "'image' is missing"),
        ({**GOOD, "image": 3}, "'image' must be a non-empty string, not '3'"),
        ({**GOOD, "image": " "}, "'image' must be a non-empty string"),
        ({**GOOD, "image": "pictures/c.jpg"}, "no image .*pictures/c.jpg"),
        ({**GOOD, "image": "pictures"}, "no image .*pictures"),
        ({**GOOD, "image": "pictures\\a.jpg"}, "no image"),
        (without("query"), "either 'query' or 'conversations'"),
        ({**GOOD, "conversations": [HUMAN, GPT]}, "either 'query' or 'conversations'"),
        ({**GOOD, "query": ""}, "'query' must be a non-empty string, not ''"),
        ({**GOOD, "query": None}, "'query' must be a non-empty string, not 'None'"),
        ({**GOOD, "query": ["the cup"]}, "'query' must be a non-empty string"),
        ('{"image": "pictures/a.jpg", "query": "\\ud83d", "masks": []}', "lone surrogate"),
        (without("masks"), "'masks' must be .* is missing"),
        ({**GOOD, "masks": None}, "'masks' must be .* not None"),
        ({**GOOD, "masks": "mask.png"}, "'masks' must be a list"),
        ({**GOOD, "masks": [5, 5, 15, 5, 15, 15]}, "'masks' must be a list"),
        ({**GOOD, "masks": [None]}, "'masks' must be a list"),
        ({**GOOD, "ignore": 3}, "'ignore' must be a list of polygons, RLE or PNG paths, not 3"),
        ({**GOOD, "masks": ["./pictures/../pictures/a.jpg"]}, "a.jpg is both the 'image' and in 'masks'"),
        ({**GOOD, "ignore": ["pictures/a.jpg"]}, "a.jpg is both the 'image' and in 'ignore'"),
        ('{"image": "pictures/a.jpg", "query": "x", "masks": [' + "1" * 5000 + "]}", "not valid JSON"),
        ({**GOOD, "mask": []}, "unknown key 'mask'. Did you mean 'masks'"),
        ({**GOOD, "split": ""}, "'split' must be a non-empty string"),
        ({**GOOD, "split": 1}, "'split' must be a non-empty string"),
        ({**GOOD, "size": [40]}, "'size' must be"),
        ({**GOOD, "size": [40.0, 60]}, "'size' must be"),
        ({**GOOD, "size": [0, 60]}, "'size' must be"),
        ({**GOOD, "meta": "x"}, "'meta' must be an object"),
        (conversation_line(), "must be pairs"),
        (conversation_line(HUMAN), "must be pairs"),
        (conversation_line(GPT, HUMAN), "expected a turn of 'human'"),
        (conversation_line(HUMAN, {"from": "gpt"}), "expected a turn of 'gpt'"),
        (conversation_line({**HUMAN, "value": "<image>"}, GPT), "a question or an answer is empty"),
        (conversation_line(HUMAN, GPT, masks=[]), r"1 \[SEG\] in the answers but 0 in 'masks'"),
        (conversation_line(HUMAN, GPT, masks=[SQUARE, FAR]), r"1 \[SEG\] in the answers but 2"),
        (conversation_line(HUMAN, {**GPT, "value": "<image> [SEG]"}), "an answer contains '<image>'"),
        ("[]", "a list; each line must be one JSON object"),
        ("{'image': 'pictures/a.jpg'}", "not valid JSON"),
        (json.dumps(GOOD)[:40], "not valid JSON"),
        (json.dumps(GOOD, indent=1), "not valid JSON"),
        (json.dumps(GOOD) + json.dumps(GOOD), "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_wrong_lines_are_named_at_the_start(folder, line, message):
    path = write(folder / "bad.jsonl", {**GOOD, "query": "good"}, "", line)
    for read in (get_train_dataset, get_eval_dataset):
        with pytest.raises(DataError, match=rf"bad\.jsonl, line 3: .*{message}"):
            read(f"custom|{path}|train", folder)


def test_all_wrong_lines_are_named_at_once(folder):
    write(folder / "bad.jsonl", *({**GOOD, "query": number} for number in range(30)))
    with pytest.raises(DataError, match=r"30 problem\(s\)\n.*line 1: (.|\n)*line 10: .*\n  and 20 more$"):
        get_train_dataset("custom|bad.jsonl", folder)


def test_text_that_is_not_utf8_is_named(folder):
    for encoding in ("cp1252", "utf-16", "utf-16-le", "gbk"):  # an old editor; PowerShell's ">"; a Chinese Windows
        write(folder / "bad.jsonl", {**GOOD, "query": "the café"}, encoding=encoding)
        with pytest.raises(DataError, match=r"bad\.jsonl, line 1: not UTF-8 text .*save the file as UTF-8"):
            get_train_dataset("custom|bad.jsonl", folder)


def test_lines_that_repeat_are_named(folder):
    """Also across splits: training data must not be scored."""
    write(folder / "bad.jsonl", GOOD, {**GOOD, "query": "x"}, {**GOOD, "image": "./pictures/a.jpg", "split": "val"})
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3: repeats line 1"):
        get_train_dataset("custom|bad.jsonl", folder)


@pytest.mark.parametrize("raw", [b"", b"\n \r\n"])
def test_files_without_a_line_are_named(folder, raw):
    (folder / "empty.jsonl").write_bytes(raw)
    with pytest.raises(DataError, match=r"empty\.jsonl has no line"):
        get_train_dataset("custom|empty.jsonl", folder)


# -- what is wrong: in masks and images, when they are decoded ---------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": [SQUARE, [[1, 1], [5, 5]]]}, "a polygon has 2 points; it needs 3"),
        ({"masks": [[SQUARE, [1, 1, 5, 5]]]}, "a polygon has 2 points"),
        ({"masks": [[]]}, "neither polygons nor RLE"),
        ({"masks": [[[]]]}, "a polygon has 0 points"),
        ({"masks": [[1, 1, 5, 5, 9]]}, "not pairs of numbers"),
        ({"masks": [[[1, 1], [5, 5], [9]]]}, "not a list of numbers"),
        ({"masks": [[["a", "b"], [1, 2], [3, 4]]]}, "not a list of numbers"),
        ({"masks": [[[1, 1], [5, 5], [float("nan"), 9]]]}, "NaN"),
        ({"masks": [[[1, 1], [5, 5], [float("inf"), 9]]]}, "NaN or infinite"),
        ({"masks": [[[1, 1], [5, 5], [1e7, 9]]]}, "far outside"),
        ({"masks": [[[1, 1], [5, 5], [10**400, 9]]]}, "not a list of numbers"),
        ({"ignore": [[[1, 1], [5, 5]]]}, "a polygon has 2 points; it needs 3"),
        ({"masks": [[[W + 2, 1], [W + 9, 1], [W + 9, 9]]]}, "empty mask"),
        ({"masks": [encode_mask(np.ones((W, H), bool))]}, r"an RLE has size \[60, 40\]; its image is \[40, 60\]"),
        ({"masks": [encode_mask(np.zeros((H, W), bool))]}, "empty mask"),
        ({"masks": [{}]}, "an RLE has size None"),
        ({"masks": [{"size": [H, W], "counts": [5, 5]}]}, "covers 10 pixels"),
        ({"masks": ["small.png"]}, r"small\.png is 30x20; its image is 60x40"),
        ({"masks": ["black.png"]}, r"black\.png is empty"),
        ({"masks": ["none.png"]}, r"none\.png cannot be read"),
        ({"masks": ["mask.jpg"]}, "is JPEG; masks must be PNG"),
        ({"masks": ["cut.png"]}, r"cut\.png cannot be read"),
        ({"size": [W, H]}, "the image is 60x40 but its annotation says 40x60"),
        ({"image": "broken.jpg"}, r"broken\.jpg cannot be decoded"),
    ],
)
def test_wrong_masks_and_images_are_named(folder, change, message):
    Image.fromarray(np.ones((20, 30), np.uint8)).save(folder / "small.png")
    Image.fromarray(np.zeros((H, W), np.uint8)).save(folder / "black.png")
    picture(folder / "mask.jpg")
    (folder / "cut.png").write_bytes((folder / "mask.png").read_bytes()[:60])
    (folder / "broken.jpg").write_bytes((folder / "pictures/a.jpg").read_bytes()[:200])
    write(folder / "bad.jsonl", {**GOOD, "image": "pictures/b.png"}, {**GOOD, **change})
    training, evaluation = get_train_dataset("custom|bad.jsonl", folder), get_eval_dataset("custom|bad.jsonl", folder)
    for read in (lambda: training.sample(1, np.random.default_rng(0)), lambda: evaluation[1]):
        with pytest.raises(DataError, match=rf"bad\.jsonl, line 2: .*{message}"):
            read()


def test_training_skips_and_counts_what_cannot_be_decoded(folder):
    picture(folder / "c.jpg").write_bytes(b"no image")
    write(folder / "mixed.jsonl", GOOD, {**GOOD, "image": "c.jpg"})
    mixture = Mixture(folder, "custom", data={"custom": "mixed.jsonl"})
    assert {mixture[number].source for number in range(20)} == {f"{folder / 'mixed.jsonl'}, line 1"}
    assert mixture.describe()[0]["skipped"] > 0


def test_a_file_that_changes_meanwhile_is_named(folder):
    dataset = get_train_dataset("custom|own.jsonl", folder)
    write(folder / "own.jsonl", "x" * 40, GOOD)
    with pytest.raises(DataError, match=r"own\.jsonl, line 1: not valid JSON"):
        dataset.sample(0, np.random.default_rng(0))


# -- files of other systems, and slips ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "image": "pictures\\a.jpg"}, r"write / instead of"),
        ({**GOOD, "image": "pictures/A.JPG"}, r"there is 'a\.jpg': another case"),
        ({**GOOD, "masks": [[[0.1, 0.1], [0.5, 0.1], [0.5, 0.5]]]}, r"they count pixels, not fractions"),
        ({**GOOD, "masks": ["masks\\a.png"]}, r"does not exist \(write / instead of"),
    ],
)
def test_paths_and_points_of_other_conventions(folder, line, message):
    one(folder, line)
    with pytest.raises(DataError, match=message):
        get_eval_dataset("custom|one.jsonl", folder)[0]


def test_lines_that_end_with_cr_alone(folder):
    (folder / "one.jsonl").write_bytes(b"\r".join([json.dumps(GOOD).encode()] * 2))
    with pytest.raises(DataError, match="end with CR alone"):
        get_eval_dataset("custom|one.jsonl", folder)


def test_a_query_is_not_absent_in_another_spelling(folder):
    path = folder / "one.jsonl"
    lines = [GOOD, {**GOOD, "query": "The  cup"}]
    for masks in (GOOD["masks"], []):
        lines[1]["masks"] = masks
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if masks:
            assert get_eval_dataset("custom|one.jsonl", folder).num_queries == 2
        else:
            with pytest.raises(DataError, match="line 2: contradicts line 1"):
                get_eval_dataset("custom|one.jsonl", folder)
