"""The model zoo: published checkpoints, their published figures, and those obtained here (configs/zoo.yaml)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from model.loading.hub import REPOSITORY
from utils.datasets.spec import Spec
from utils.evaluation.benchmarks import BENCHMARKS, MODES, benchmark_of
from utils.evaluation.results import mismatched
from utils.files import write_atomically
from utils.plotting import text_tables

NOT_RUN = "not run here"


@dataclass(frozen=True)
class Obtained:
    """Figures that were obtained here, and by what.

    Attributes:
        metrics: name -> percent.
        commit: of this repository.
        device: such as ``NVIDIA H100 80GB HBM3``; precision: such as ``bfloat16``.
        fingerprint: of the weights that were evaluated.
        date: ISO, of the day.
    """

    metrics: dict[str, float]
    commit: str
    device: str
    precision: str
    fingerprint: str
    date: str

    def __str__(self) -> str:
        return f"{figures_text(self.metrics)} ({self.commit[:7]}, {self.device}, {self.precision}, {self.date})"


@dataclass
class Figure:
    """One evaluation of a checkpoint: the published metrics and those obtained here.

    Attributes:
        benchmark: with its split, such as ``ReasonSeg|val``.
        published: metric -> percent; empty if none is known to be of this file.
        source: where the published figures are; where they are not known, why.
        mode: ``teacher_forced`` or ``generate``; empty = the benchmark's default.
        obtained: None if it was not run.
    """

    benchmark: str
    published: dict[str, float]
    source: str
    mode: str = ""
    obtained: Obtained | None = None

    @property
    def spec(self) -> Spec:
        return Spec.parse(self.benchmark)

    @property
    def asked(self) -> str:
        """The mode of the evaluation."""
        return self.mode or benchmark_of(self.spec).mode


@dataclass
class Checkpoint:
    """A published checkpoint.

    Attributes:
        name: short, for ``scripts/reproduce.py``.
        method: such as ``UGround``; the heading on the page.
        weights: id on the Hugging Face hub; empty if it is not there (``download``).
        listed: the authors' page that names the weights, with its commit.
        revision: commit of the weights on the hub, where it is known.
        download: address of weights that are not on the hub.
        vision_tower: hub id of CLIP, which the files lack.
        flags: further flags of test.py.
        refused: why it cannot be loaded; empty = it can.
        note: what to know about its figures.
        tolerance: percentage points by which a figure obtained here may differ from the published one.
    """

    name: str
    method: str
    weights: str
    listed: str
    figures: list[Figure] = field(default_factory=list)
    revision: str = ""
    download: str = ""
    vision_tower: str = ""
    flags: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    note: str = ""
    tolerance: float = 1.0

    @property
    def version(self) -> str:
        """The value of ``--version``."""
        return f"{self.weights}@{self.revision}" if self.revision else self.weights


# -- reading and writing -----------------------------------------------------------------------------------------------


def load(path: Path) -> list[Checkpoint]:
    """Reads and checks a zoo.

    Raises:
        ValueError: naming the file and everything that is wrong in it.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, list) or not values:
        raise ValueError(f"{path}: a list of checkpoints is expected")
    problems: list[str] = []
    checkpoints = [_checkpoint(row, f"entry {number}", problems) for number, row in enumerate(values, start=1)]
    zoo = [checkpoint for checkpoint in checkpoints if checkpoint]
    names = [checkpoint.name for checkpoint in zoo]
    problems += [f"{name}: the name is there twice" for name in sorted({n for n in names if names.count(n) > 1})]
    for checkpoint in zoo:
        problems += [f"{checkpoint.name}: {problem}" for problem in _problems(checkpoint)]
    if problems:
        raise ValueError("\n  ".join([f"{path}:", *problems]))
    return zoo


def save(path: Path, zoo: Iterable[Checkpoint]) -> None:
    """Writes what ``load`` reads, below the comment that the file begins with; defaults are omitted."""
    comment = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8") if path.exists() else "")
    rows = [_compact(asdict(checkpoint), Checkpoint) for checkpoint in zoo]
    for row in rows:
        if "figures" in row:
            row["figures"] = [_compact(figure, Figure) for figure in row["figures"]]
    text = yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, width=120)
    write_atomically(path, (comment[0] if comment else "") + text)


def _compact(values: dict[str, Any], of: type) -> dict[str, Any]:
    """Without values that are empty or the default."""
    defaults = {each.name: each.default for each in fields(of)}
    required = {each.name for each in fields(of) if each.default is MISSING and each.default_factory is MISSING}
    return {
        name: value
        for name, value in values.items()
        if name in required or (value not in (None, "", [], {}) and value != defaults[name])
    }


def _checkpoint(values: Any, place: str, problems: list[str]) -> Checkpoint | None:
    if not (row := _fields(values, Checkpoint, place, problems)):
        return None
    figures = []
    for number, item in enumerate(row.get("figures", ()), start=1):
        here = f"{row['name']}, figure {number}"
        if not (figure := _fields(item, Figure, here, problems)):
            continue
        if figure.get("obtained") is not None:
            obtained = _fields(figure["obtained"], Obtained, f"{here}, obtained", problems)
            figure["obtained"] = Obtained(**obtained) if obtained else None
        figures.append(Figure(**figure))
    return Checkpoint(**row | {"figures": figures})


def _fields(values: Any, of: type, place: str, problems: list[str]) -> dict[str, Any]:
    """The values of a dataclass; empty, and ``problems`` grow, if they are not."""
    if not isinstance(values, dict):
        problems.append(f"{place}: not a mapping")
        return {}
    known = {each.name for each in fields(of)}
    needed = {each.name for each in fields(of) if each.default is MISSING and each.default_factory is MISSING}
    wrong = [f"{place}: unknown key {key!r}" for key in values if key not in known]
    wrong += [f"{place}: {key} is missing" for key in sorted(needed - values.keys())]
    plain = {key: value for key, value in values.items() if key in known and key not in ("figures", "obtained")}
    wrong += [f"{place}: {key} is of another type" for key in mismatched(plain, of)]
    if not isinstance(values.get("figures", []), list):
        wrong.append(f"{place}: figures is no list")
    problems.extend(wrong)
    return {} if wrong else dict(values)


def _problems(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with values that have the right type."""
    wrong = [
        f"{key} {value!r} is no id of the hub (org/name)"
        for key, value in (("weights", checkpoint.weights), ("vision_tower", checkpoint.vision_tower))
        if value and not REPOSITORY.fullmatch(value)
    ]
    if bool(checkpoint.weights) == bool(checkpoint.download):
        wrong.append("give either weights (an id of the hub) or download (an address)")
    if not checkpoint.figures and not (checkpoint.refused or checkpoint.note):
        wrong.append("without figures, a note says why")
    for figure in checkpoint.figures:
        metrics = {*figure.published, *(figure.obtained.metrics if figure.obtained else ())}
        if figure.spec.name not in BENCHMARKS:
            wrong.append(f"{figure.benchmark}: unknown benchmark")
        elif unknown := metrics - set(benchmark_of(figure.spec).metrics):
            wrong.append(f"{figure.benchmark} has no {', '.join(sorted(unknown))}")
        if figure.mode not in ("", *MODES):
            wrong.append(f"{figure.benchmark}: mode {figure.mode!r} is not {' or '.join(MODES)}")
        if not all(1 < value <= 100 for value in figure.published.values()):
            wrong.append(f"{figure.benchmark}: published figures are in percent")
    runs = [(figure.benchmark, figure.asked) for figure in checkpoint.figures]
    return wrong + [f"{spec}, {mode}: twice" for spec, mode in sorted({run for run in runs if runs.count(run) > 1})]


# -- the page ----------------------------------------------------------------------------------------------------------

PAGE = """# Model zoo

<!-- Made from configs/zoo.yaml by python scripts/reproduce.py --page: edit that file, not this one. -->

Published checkpoints, the figures published for them, and the figures obtained here. Metrics are in percent.

    python scripts/reproduce.py {example} --dataset_dir dataset

downloads a checkpoint, evaluates it with `test.py` on its benchmarks, and compares each figure with the published one.
With `--record` it writes the figures into `configs/zoo.yaml` and this page, with commit, device and precision; the YAML
file has the fingerprint of the weights, too. **{not_run}** means what it says: {count}.

**Tolerance**: a difference of more than {tolerance:g} percentage point is reported, and is exit code 1. GSVA's README
has figures up to half a point from those of its paper, by precision alone.

A folder takes the place of a hub id with `--version`, and of CLIP's with `--vision_tower`. Flags of `test.py` follow
after `--`. [weights.md](weights.md#published-checkpoints) says what each layout needs and what of it is not verified,
[evaluation.md](evaluation.md#protocols) how the protocols count.

Hub ids are those of the authors' pages, at the commit in the tables. The files themselves were not looked at, so no
revision is given.
"""


def page(zoo: Sequence[Checkpoint]) -> str:
    """docs/zoo.md."""
    figures = [figure for checkpoint in zoo for figure in checkpoint.figures]
    missing = sum(figure.obtained is None for figure in figures)
    example = next((checkpoint.name for checkpoint in zoo if not checkpoint.refused), "NAME")
    count = f"{missing} of the {len(figures)} evaluations below were not run"
    tolerance = Checkpoint.tolerance
    sections = [PAGE.format(example=example, tolerance=tolerance, not_run=NOT_RUN, count=count)]
    for method in dict.fromkeys(checkpoint.method for checkpoint in zoo):
        sections.append(_section(method, [checkpoint for checkpoint in zoo if checkpoint.method == method]))
    return "\n".join(sections)


def _section(method: str, zoo: Sequence[Checkpoint]) -> str:
    files = [
        ["name", "weights", "flags", "listed in"],
        *([*_files(checkpoint), checkpoint.listed] for checkpoint in zoo),
    ]
    figures = [["name", "benchmark", "mode", "published", "obtained here", "source"]]
    for checkpoint in zoo:
        for figure in checkpoint.figures:
            obtained = str(figure.obtained or NOT_RUN)
            row = [figure.benchmark, figure.asked, figures_text(figure.published) or "-", obtained, figure.source]
            figures.append([checkpoint.name, *row])
    parts = [f"## {method}\n", text_tables.markdown(files) + "\n"]
    if len(figures) > 1:
        parts.append(text_tables.markdown(figures) + "\n")
    notes = [(each.name, each.refused and f"not supported: {each.refused}", each.note) for each in zoo]
    lines = [f"- `{name}`: {'. '.join(filter(None, texts))}." for name, *texts in notes if any(texts)]
    return "\n".join([*parts, *(["\n".join(lines) + "\n"] if lines else [])])


def _files(checkpoint: Checkpoint) -> list[str]:
    weights = f"`{checkpoint.version}`" if checkpoint.weights else f"[files]({checkpoint.download}), not on the hub"
    flags = {"vision_tower": checkpoint.vision_tower, **checkpoint.flags}
    return [
        f"`{checkpoint.name}`",
        weights,
        " ".join(f"`--{name} {value}`" for name, value in flags.items() if value) or "-",
    ]


def figures_text(metrics: dict[str, float]) -> str:
    """``gIoU 64.17, cIoU 71.08``."""
    return ", ".join(f"{name} {value:g}" for name, value in metrics.items())


# -- comparing ---------------------------------------------------------------------------------------------------------


def compare(
    checkpoint: Checkpoint, obtained: Sequence[tuple[Figure, dict[str, float]]]
) -> tuple[list[list[str]], bool]:
    """A table, its head first, and whether all figures agree.

    Args:
        obtained: a figure and its metrics in percent, for each evaluation that ran.
    """
    rows, agree = [["benchmark", "mode", "metric", "published", "obtained", "difference", ""]], True
    for figure, metrics in obtained:
        for name, value in metrics.items():
            cells = [figure.benchmark, figure.asked, name]
            if name in figure.published:
                difference = value - figure.published[name]
                within = abs(difference) <= checkpoint.tolerance + 1e-9
                agree &= within
                verdict = f"{'within' if within else 'OUTSIDE'} ±{checkpoint.tolerance:g}"
                cells += [f"{figure.published[name]:g}", f"{value:.2f}", f"{difference:+.2f}", verdict]
            else:
                cells += ["-", f"{value:.2f}", "-", "nothing to compare with"]
            rows.append(cells)
    return rows, agree
