"""LISA++: all forms of references in the text become [SEG] (docs/data.md)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from disk import H, W, box, square, write_image, write_json

from model.structures import Sample
from utils.datasets import DataError, DataOptions, get_train_dataset
from utils.datasets.reason_seg_plus import replace_references
from utils.datasets.templates import ANSWERS

FILES = {"instance_seg": "Instance_Seg", "cot": "COT", "conversations": "Conversations", "caption": "Caption"}
INFO = {
    "380": {"label name": "remote", "points": [square(2, 2)]},
    "348": [[square(20, 5)]],  # polygons nested once more
    "9": {"polygon": [[1, 1], [2, 2]]},
    "7": {"points": []},
}
INSTANCES = {
    "img_path": "coco/train2017/1.jpg",
    "English Question": "Which ones are remotes?",
    "ID": [380, 9, 348, 55],
    "points": INFO,
}
COT = {
    "image_path": "/somewhere/train2017/1.jpg",
    "English Question": "Where does the <380| remote> lie?",
    "English Answer": "The [SEG] is text; <380| remote> lies beside [<348| remote>, <9| cup>], <9| cup>.",
    "info": INFO,
}
TALK = "<person>: What is it? <robot>: A [380| remote, 348| remote]. <person>: Its color?\n<robot>: Black."
CONVERSATION = {"img_pth": "train2017\\1.jpg", "output": TALK, "info": INFO}
GOOD = {"instance_seg": INSTANCES, "cot": COT, "caption": COT, "conversations": CONVERSATION}


def path_of(root: Path, name: str) -> Path:
    return root / f"reason_seg_plus/LISA_Plus_{FILES[name]}.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_image(tmp_path / "coco/train2017/1.jpg")
    for name, item in GOOD.items():
        write_json(path_of(tmp_path, name), [item])
    return tmp_path


def first(root: Path, name: str, seed: int = 0, **options: int) -> Sample:
    return get_train_dataset(name, root, DataOptions(**options)).sample(0, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <380| remote>.", "a [SEG]."),
        ("a 《380|remote》.", "a [SEG]."),
        ("[<380| remote>, <348| remote>]", "[SEG] and [SEG]"),
        ("[380| remote, 348| remote]", "[SEG] and [SEG]"),
        ("[pizza <380>, pizza <348>, pizza <380>]", "[SEG], [SEG] and [SEG]"),
        ("[《380|remote》，《348|remote》]", "[SEG] and [SEG]"),
        ("[<380| a> and <348| b>]", "[SEG] and [SEG]"),
        ("[the big <380| remote>]", "[the big [SEG]]"),
        ("a <5| cup> , [5| cup] and [<380| a>, <5| cup>] .", "a, and [SEG]."),
        ("see [1], x < 3 | y and <b>", "see [1], x < 3 | y and <b>"),
        ("a pizza <380>", "a pizza [SEG]"),
    ],
)
def test_forms_of_references(text: str, expected: str) -> None:
    known = {"380", "348"}

    def render(references: list[tuple[str, str]]) -> str:
        tokens = ["[SEG]" for number, _ in references if number in known]
        return re.sub(", ([^,]*)$", r" and \1", ", ".join(tokens))

    assert replace_references(text, render) == expected


def test_names_of_references() -> None:
    seen: list[tuple[str, str]] = []
    replace_references(
        "<1| a cup> 《2|cat》 [pizza <3>, big pie <4>] [5| x, 6| y]", lambda references: seen.extend(references) or ""
    )
    assert seen == [("1", "a cup"), ("2", "cat"), ("3", "pizza"), ("4", "big pie"), ("5", "x"), ("6", "y")]


def test_instances_have_one_token_each(root: Path) -> None:
    assert get_train_dataset("instance_seg", root).describe() == {
        "images": 1, "expressions": 1, "masks": 2, "dropped": 2, "unusable": 0,
    }  # fmt: skip
    sample = first(root, "instance_seg")
    ((turn,),) = sample.conversations
    assert turn.answer in {answer.replace("{list}", "[SEG] and [SEG]") for answer in ANSWERS["instances"]}
    assert turn.question.startswith("Which ones are remotes? ")
    assert [mask[8, 8] for mask in sample.masks] == [1, 0]
    assert [mask[8, 25] for mask in sample.masks] == [0, 1]
    write_json(path_of(root, "instance_seg"), [{**INSTANCES, "ID": ["348"]}])
    sample = first(root, "instance_seg")
    assert sample.conversations[0][0].answer in ANSWERS["target"]
    assert sample.masks[0, 8, 25] == 1


@pytest.mark.parametrize("name", ["cot", "caption"])
def test_written_answers(root: Path, name: str) -> None:
    sample = first(root, name)
    ((turn,),) = sample.conversations
    assert turn.question == "Where does the remote lie?"
    assert turn.answer == "The [ SEG ] is text; [SEG] lies beside [SEG],."
    assert [mask[8, 8] for mask in sample.masks] == [1, 0]


def test_conversations(root: Path) -> None:
    (turns,) = first(root, "conversations").conversations
    assert [(turn.question, turn.answer) for turn in turns] == [
        ("What is it?", "A [SEG] and [SEG]."),
        ("Its color?", "Black."),
    ]


def test_conversations_share_an_image(root: Path) -> None:
    write_json(path_of(root, "cot"), [COT, {**COT, "English Answer": "<348| remote>"}, COT])
    assert get_train_dataset("cot", root).describe()["images"] == 1
    counts = {len(first(root, "cot", seed, questions_per_image=2).conversations) for seed in range(5)}
    assert counts == {2}
    assert len(first(root, "cot", questions_per_image=9).masks) == 5


@pytest.mark.parametrize(
    "points",
    [
        square(2, 2),
        [square(2, 2)],
        [[square(2, 2)]],
        box(2, 2),
        [box(2, 2), [1, 1, 2, 2]],
        {"points": [square(2, 2)]},
        {"polygon": square(2, 2)},
        {"size": [H, W], "counts": [H * 8 + 8, 1, H * (W - 8) - 9]},
    ],
)
def test_polygons_of_any_depth(root: Path, points: object) -> None:
    write_json(path_of(root, "cot"), [{**COT, "English Answer": "<380| remote>", "info": {"380": points}}])
    assert first(root, "cot").masks[0, 8, 8] == 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("instance_seg", {"ID": "380"}, "'ID' must be a list of mask ids, not 380"),
        ("instance_seg", {"ID": []}, "no id in 'ID' has a polygon"),
        ("instance_seg", {"ID": [55, 9]}, "no id in 'ID' has a polygon"),
        ("instance_seg", {"points": []}, "'points' must map mask ids to polygons"),
        ("instance_seg", {"English Question": " "}, "'English Question' must be a non-empty string"),
        ("instance_seg", {"img_path": None}, "no image path"),
        ("cot", {"image_path": 3}, "no image path in 'img_path', 'image_path' or 'img_pth': 3"),
        ("cot", {"image_path": "../"}, r"path '\.\./' ends in '\.\.', which is not a file name within its folder"),
        ("cot", {"image_path": "/"}, "path '/' ends in '', which is not a file name"),
        ("cot", {"image_path": "x" * 300}, "ends in 'xxx.*, which is not a file name"),
        ("cot", {"English Answer": None}, "'English Answer' must be a non-empty string, not None"),
        ("cot", {"English Answer": "no reference"}, r"none of the masks \[\] that the answer refers to"),
        ("cot", {"info": {"380": None}}, "none of the masks .* has a polygon in 'info'"),
        ("cot", {"info": {"380": [[1, 1], [2, 2]]}}, "none of the masks"),
        ("cot", {"info": {"380": [[[[[[[square(1, 1)]]]]]]]}}, "none of the masks"),
        ("caption", {"info": "x"}, "'info' must map mask ids to polygons, not x"),
        ("conversations", {"output": "hello"}, "'output' must consist of turns"),
        ("conversations", {"output": "<person>: a"}, "'output' must consist of turns"),
        ("conversations", {"output": "<robot>: a <person>: b"}, "'output' must consist of turns"),
        ("conversations", {"output": "<person>: a <robot>: "}, "'output' must consist of turns"),
        ("conversations", {"output": "<person>: a <robot>: b"}, "none of the masks"),
    ],
)
def test_bad_items_are_named(root: Path, name: str, change: dict, message: str) -> None:
    path = path_of(root, name)
    write_json(path, [{**GOOD[name], **change}])
    with pytest.raises(DataError, match=rf"nothing usable in .*\.json: .*item 0: .*{message}"):
        get_train_dataset(name, root)
    write_json(path, [3, {**GOOD[name], **change}, GOOD[name]])
    counts = get_train_dataset(name, root).describe()
    assert (counts["images"], counts["unusable"]) == (1, 2)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([[1, 1], [9, 9], [float("nan"), 3]], "NaN"),
        ([[1, 1], [9, 9], [1e9, 3]], "far outside"),
        ([[1, 1], [9, 9], [-1e9, 3]], "far outside"),
        ([[1, 1], [9, 9], ["x", 3]], "not a list of numbers"),
        (square(W + 5, 2), "empty mask"),
        ({"size": [H + 1, W], "counts": [5]}, "an RLE has size"),
        ({"size": [H, W], "counts": [5]}, "covers 5 pixels"),
    ],
)
def test_a_mask_that_cannot_be_drawn_is_an_error(root: Path, points: object, message: str) -> None:
    """The mixture counts such records; without its token the answer would be another one."""
    answer = "<380| a> and <348| b>."
    for others in ({}, {"348": square(2, 2)}):
        write_json(path_of(root, "cot"), [{**COT, "English Answer": answer, "info": {"380": points, **others}}])
        with pytest.raises(DataError, match=f"cot/1.jpg: mask 380: .*{message}"):
            first(root, "cot")


@pytest.mark.parametrize(("name", "dropped"), [("instance_seg", 2), ("cot", 1), ("conversations", 0)])
def test_references_without_a_polygon_are_counted(root: Path, name: str, dropped: int) -> None:
    counts = get_train_dataset(name, root).describe()
    assert (counts["dropped"], counts["unusable"]) == (dropped, 0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'[{"img_path": ', "not valid JSON"),
        (b"{}", "holds a dict"),
        (b"[]", "the list is empty"),
        (b"\x81\x8d", "is not utf-8 text"),
    ],
)
def test_bad_files_are_named(root: Path, raw: bytes, message: str) -> None:
    path_of(root, "caption").write_bytes(raw)
    with pytest.raises(DataError, match=message):
        get_train_dataset("caption", root)


def test_encodings_and_missing_files(root: Path) -> None:
    path = path_of(root, "caption")
    text = json.dumps([{**COT, "English Question": "Le café?"}], ensure_ascii=False, indent=1).replace("\n", "\r\n")
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(text.encode(encoding))
        assert first(root, "caption").conversations[0][0].question == "Le café?"
    path.unlink()
    with pytest.raises(DataError, match=r"no annotations \(looked in .*LISA_Plus_Caption\.json\)"):
        get_train_dataset("caption", root)
    (root / "coco/train2017/1.jpg").unlink()
    with pytest.raises(DataError, match=r"no image 1\.jpg \(looked in .*mscoco.*coco/train2017/1\.jpg\)"):
        get_train_dataset("cot", root)
    with pytest.raises(DataError, match="'cot' has no splits"):
        get_train_dataset("cot|train", root)
