"""Tables of all data sets. Add a data set as a row of ``DATASETS``; add a type as a row of ``TYPES`` and a reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from utils.datasets.base import (
    DataError,
    DataOptions,
    DatasetRow,
    EvalDataset,
    TrainDataset,
    check_complete,
    coco_folders,
    unknown,
)
from utils.datasets.custom import CustomEval, CustomTrain
from utils.datasets.fp_refer_seg import FpReferSegTrain
from utils.datasets.grounding_suite import GroundingSuiteEval
from utils.datasets.hallu_seg_bench import HalluSegBench
from utils.datasets.multi_reason_seg import MultiReasonSegEval, MultiReasonSegTrain
from utils.datasets.parquet_sets import ParquetEval
from utils.datasets.reason_seg import ReasonSegEval, ReasonSegTrain
from utils.datasets.reason_seg_plus import ReasonSegPlusTrain
from utils.datasets.refer_seg import ReferSegEval, ReferSegTrain
from utils.datasets.sem_seg import SemSegTrain
from utils.datasets.spec import Spec
from utils.datasets.vqa import VqaTrain

__all__ = [
    "DATASETS",
    "TYPES",
    "DataError",
    "DataOptions",
    "Spec",
    "get_eval_dataset",
    "get_train_dataset",
    "trained_types",
]


@dataclass(frozen=True)
class Type:
    """Readers of a type of data set.

    Attributes:
        train: makes a ``TrainDataset`` from (spec, row, dataset_dir, options); None = evaluation only.
        evaluate: makes an ``EvalDataset`` from (spec, row, dataset_dir); None = training only.
        default: the data sets used if a configuration names only the type; empty = it must name files.
    """

    train: Callable[..., TrainDataset] | None
    evaluate: Callable[..., EvalDataset] | None
    default: str


TYPES = {
    "sem_seg": Type(SemSegTrain, None, "ade20k||cocostuff||pascal_part||paco_lvis||mapillary"),
    "refer_seg": Type(ReferSegTrain, ReferSegEval, "refclef||refcoco||refcoco+||refcocog"),
    "neg_refer_seg": Type(FpReferSegTrain, ReferSegEval, "R-refcoco||R-refcoco+||R-refcocog"),
    "correct_refer_seg": Type(FpReferSegTrain, ReferSegEval, "fprefcoco||fprefcoco+||fprefcocog"),
    "vqa": Type(VqaTrain, None, "llava_instruct_150k"),
    "reason_seg": Type(ReasonSegTrain, ReasonSegEval, "ReasonSeg|train"),
    "reason_seg_plus": Type(ReasonSegPlusTrain, None, "instance_seg||cot||conversations||caption"),
    "multi_reason_seg": Type(MultiReasonSegTrain, MultiReasonSegEval, "MultiReasonSeg|train"),
    "custom": Type(CustomTrain, CustomEval, ""),
    "grounding_suite": Type(None, GroundingSuiteEval, ""),
    "hallu_seg_bench": Type(None, HalluSegBench, ""),
    "parquet": Type(None, ParquetEval, ""),
}

_REFS = ("refs({split_by}).p", "refs({split_by}).json")
_GREFS = ("grefs({split_by}).json", "grefs({split_by}).p")
_ZOM_IMAGES = tuple(f"refer_seg/refzom/{folder}" for folder in ("trainval2014", "train2014", "val2014"))


def _false_premises(kind: str, name: str, split_by: str) -> DatasetRow:
    images, suffix = coco_folders("train2014"), "_exclude_unified"
    return DatasetRow(kind, f"refer_seg/{name}", images, _REFS, split_by, suffix, false_premises=True)


def _lisa_plus(part: str) -> DatasetRow:
    return DatasetRow("reason_seg_plus", f"reason_seg_plus/LISA_Plus_{part}.json", coco_folders("train2017"))


DATASETS = {
    "ade20k": DatasetRow("sem_seg", "ade20k/annotations/training", ("ade20k/images/training",)),
    "cocostuff": DatasetRow("sem_seg", "cocostuff/train2017", coco_folders("train2017")),
    "pascal_part": DatasetRow(
        "sem_seg", "vlpart/pascal_part/train.json", ("vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages",)
    ),
    "paco_lvis": DatasetRow("sem_seg", "vlpart/paco/annotations/paco_lvis_v1_train.json", coco_folders("")),
    "mapillary": DatasetRow(
        "sem_seg", "mapillary/training/v2.0/labels", ("mapillary/training/images",), ("mapillary/config_v2.0.json",)
    ),
    "refclef": DatasetRow("refer_seg", "refer_seg/refclef", ("refer_seg/images/saiapr_tc-12",), _REFS, "unc"),
    "refcoco": DatasetRow("refer_seg", "refer_seg/refcoco", coco_folders("train2014"), _REFS, "unc"),
    "refcoco+": DatasetRow("refer_seg", "refer_seg/refcoco+", coco_folders("train2014"), _REFS, "unc"),
    "refcocog": DatasetRow("refer_seg", "refer_seg/refcocog", coco_folders("train2014"), _REFS, "umd"),
    "grefcoco": DatasetRow("refer_seg", "refer_seg/grefcoco", coco_folders("train2014"), _GREFS, "unc", joint=True),
    "refzom": DatasetRow("refer_seg", "refer_seg/refzom", _ZOM_IMAGES, ("Ref_ZOM.p",), joint=True),
    "R-refcoco": _false_premises("neg_refer_seg", "R-refcoco", "unc"),
    "R-refcoco+": _false_premises("neg_refer_seg", "R-refcoco+", "unc"),
    "R-refcocog": _false_premises("neg_refer_seg", "R-refcocog", "umd"),
    "fprefcoco": _false_premises("correct_refer_seg", "fprefcoco", "berkeley"),
    "fprefcoco+": _false_premises("correct_refer_seg", "fprefcoco+", "berkeley"),
    "fprefcocog": _false_premises("correct_refer_seg", "fprefcocog", "berkeley"),
    "llava_instruct_150k": DatasetRow("vqa", "llava_dataset/llava_instruct_150k.json", coco_folders("train2017")),
    "ReasonSeg": DatasetRow("reason_seg", "reason_seg/ReasonSeg"),
    "instance_seg": _lisa_plus("Instance_Seg"),
    "cot": _lisa_plus("COT"),
    "conversations": _lisa_plus("Conversations"),
    "caption": _lisa_plus("Caption"),
    "MultiReasonSeg": DatasetRow("multi_reason_seg", "multi_reason_seg/MultiReasonSeg", annotations=("MUSE_{}.json",)),
    "MMR": DatasetRow("multi_reason_seg", "multi_reason_seg/MMR", annotations=("MMR_{}.json",), gives_answers=True),
    "GSEval": DatasetRow("grounding_suite", "groundingsuite", coco_folders("unlabeled2017")),
    "ReasonSeg-R": DatasetRow("parquet", "reason_seg/ReasonSeg-R", annotations=("test",)),
    "ReasonSeg-X": DatasetRow("parquet", "reason_seg/ReasonSeg-X", annotations=("test", "val", "train")),
    "HalluSegBench": DatasetRow("hallu_seg_bench", "hallusegbench"),
    "refcoco-m": DatasetRow("parquet", "refer_seg/refcoco-m", annotations=("val",)),
    "custom": DatasetRow("custom", ""),
}


def trained_types() -> list[str]:
    """The types that a mixture may have: those with training data."""
    return [name for name, kind in TYPES.items() if kind.train]


def get_train_dataset(spec: Spec | str, dataset_dir: str | Path, options: DataOptions | None = None) -> TrainDataset:
    """Opens the training data of a spec such as ``"refcoco"`` or ``"ReasonSeg|train"``.

    Raises:
        DataError: if the name is unknown, or files are missing or invalid.
    """
    spec, row, root = _look_up(spec, dataset_dir)
    if (train := TYPES[row.type].train) is None:
        raise DataError(f"{spec.name!r} is for evaluation alone (docs/data.md)")
    return train(spec, row, root, options or DataOptions())


def get_eval_dataset(spec: Spec | str, dataset_dir: str | Path, allow_missing: bool = False) -> EvalDataset:
    """Opens a benchmark's split such as ``"ReasonSeg|val_short"`` or ``"refcoco|unc|val"``.

    Raises:
        DataError: if the split does not exist, or if a record is unusable and ``allow_missing`` is false.
    """
    spec, row, root = _look_up(spec, dataset_dir)
    evaluate = TYPES[row.type].evaluate
    if evaluate is None:
        known = [name for name, other in DATASETS.items() if TYPES[other.type].evaluate]
        raise DataError(f"{spec.name!r} has no evaluation. Data sets with evaluation: {', '.join(known)}")
    dataset = evaluate(spec, row, root)
    if not allow_missing:
        check_complete(dataset)
    return dataset


def _look_up(spec: Spec | str, dataset_dir: str | Path) -> tuple[Spec, DatasetRow, Path]:
    spec = Spec.parse(spec) if isinstance(spec, str) else spec
    if spec.name not in DATASETS:
        raise DataError(unknown("data set", spec.name, DATASETS))
    root = Path(dataset_dir)
    if not root.is_dir():
        raise DataError(f"--dataset_dir {root} is not a folder; give the one that holds {DATASETS[spec.name].path}")
    return spec, DATASETS[spec.name], root
