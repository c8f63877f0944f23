"""grounding_suite: GSEval, captions of stuff, parts, one or several objects in COCO's unlabeled images (docs/data.md).

Source: hustvl/GroundingSuite (Hu et al., ICCV 2025). Evaluation only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.structures import EvalQuery, EvalSample
from utils.datasets.base import (
    DataError,
    DatasetRow,
    check_file_name,
    find_paths,
    is_text,
    read_object,
    read_text,
    single_split,
    unknown,
    warn_unusable,
)
from utils.datasets.images import find_image, missing_images, read_annotated
from utils.datasets.masks import decode_segmentation
from utils.datasets.spec import Spec

FILE = "GroundingSuite-Eval.jsonl"
CLASSES = {1: "stuff", 2: "part", 3: "multi", 4: "single"}  # of class_id, by the counts that the paper's averages need


class GroundingSuiteEval:
    """GSEval: one target per caption.

    Args:
        spec: ``GSEval|test``, the only split.
        row: the data set's row.
        dataset_dir: the root of all data.
    """

    def __init__(self, spec: Spec, row: DatasetRow, dataset_dir: Path) -> None:
        self.spec = spec
        if (split := single_split(spec, "test")) != "test":
            raise DataError(f"{spec}: {unknown('split', split, ['test'])}")
        [path] = find_paths(str(spec), {FILE: [dataset_dir / row.path / FILE]})
        self.folders = [dataset_dir / folder for folder in row.images]
        self.skipped: list[str] = []
        self.unusable: list[str] = []
        images: dict[str, list[dict[str, Any]]] = {}
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if line.strip():
                try:
                    record = _parse(line)
                    images.setdefault(record["image"], []).append(record)
                except DataError as error:
                    self.unusable.append(f"{path}, line {number}: {error}")
        if not images:
            raise DataError(f"{spec}: nothing usable in {path}: {(self.unusable or ['it is empty'])[0]}")
        self.images = list(images.values())
        warn_unusable(str(spec), self.unusable)
        self.not_found = missing_images(self.image_path, (records[0] for records in self.images))

    def image_path(self, record: dict[str, Any]) -> Path:
        return find_image(str(self.spec), record["image"], self.folders)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_queries(self) -> int:
        return sum(map(len, self.images))

    def __getitem__(self, index: int) -> EvalSample:
        records = self.images[index]
        name, size = records[0]["image"], tuple(records[0]["segmentation"]["size"])
        image = read_annotated(self.image_path(records[0]), f"{self.spec}, {name}", *size)
        queries = []
        for record in records:
            try:
                mask = decode_segmentation(record["segmentation"], *size)
            except DataError as error:
                raise DataError(f"{self.spec}, {name}, idx {record['id']}: {error}") from error
            queries.append(EvalQuery(record["id"], record["caption"], mask[None], meta={"class": record["class"]}))
        return EvalSample(f"{self.spec}/{name}", Path(name).stem, image, queries)


def _parse(line: str) -> dict[str, Any]:
    values = read_object(line)
    name = Path(check_file_name(values.get("image_path"), "'image_path' is")).name
    caption, segmentation, number = (values.get(key) for key in ("caption", "segmentation", "class_id"))
    if not is_text(caption):
        raise DataError(f"'caption' must be a non-empty string, not {str(caption)[:60]!r}")
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise DataError(f"'segmentation' must be an RLE with its size, not {str(segmentation)[:60]}")
    if number not in CLASSES or type(values.get("idx")) is not int:
        raise DataError(f"'class_id' is {number!r} and 'idx' {values.get('idx')!r}; both are numbers, class_id 1 to 4")
    kind = {"class": CLASSES[number], "id": str(values["idx"])}
    return {"image": name, "caption": caption.strip(), "segmentation": segmentation, **kind}
