"""Shows the training data of a configuration, without a model:

    python scripts/inspect_data.py --config configs/tiny.yaml --pictures 6

Prints a line per data set (type, share of the samples, images, expressions, masks, absent and multiple targets,
unusable records, passes over its images), or all missing files with the paths tried. ``--pictures N`` also writes a
sheet of N samples per data set: image, question and answer, the mask of each [SEG], and the same with ignored pixels.
Accepts all settings of train_ds.py; those of the model have no effect.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.structures import Sample
from utils.command_line.parser import Parser
from utils.config import load_config, make_parser
from utils.datasets.base import DataError, TrainDataset
from utils.datasets.spec import Spec
from utils.inference import cli
from utils.plotting.overlays import Panel, evenly_spaced, save_picture, sheet
from utils.wording import counted


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(program="train_ds.py", description=__doc__)
    parser.add_argument(
        "--pictures", type=int, default=0, metavar="N", help="samples per data set to plot (default: 0)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data_sheets"), help="folder of the sheets (default: %(default)s)"
    )
    args, rest = parser.parse_with_settings(make_parser(), arguments)
    config = load_config(rest, needs=("data",))

    from utils.datasets.mixture import make_mixture

    mixture = make_mixture(config, check=False)
    images = config.total_steps * config.images_per_step()
    print(mixture.table(images))
    print(f"passes: over a data set's images, in a run of {counted(images, 'sample')} (one process)")
    for dataset in mixture.datasets if args.pictures > 0 else ():
        path = args.output / f"{Spec.parse(dataset.name).slug}.png"
        panels, problems = read_panels(dataset, args.pictures, config.train.seed)
        if panels:
            save_picture(path, sheet(panels, f"{dataset.name}: {counted(len(dataset), 'image')}"))
            print(f"wrote {path}")
        print(*(f"{dataset.name}: unusable: {problem}" for problem in problems), sep="\n", end="\n" if problems else "")
    return 0


def read_panels(dataset: TrainDataset, number: int, seed: int) -> tuple[list[Panel], list[str]]:
    """The panels of ``number`` evenly spaced samples, one per conversation; a message for each that is unusable."""
    panels: list[Panel] = []
    problems = []
    for index in evenly_spaced(len(dataset), number):
        try:
            panels += sample_panels(dataset.sample(index, np.random.default_rng((seed, index))))
        except DataError as error:
            problems.append(str(error))
    return panels, problems


def sample_panels(sample: Sample) -> list[Panel]:
    """One panel per conversation, with the masks of its [SEG] tokens."""
    return [
        Panel(
            image=sample.image,
            query=" / ".join(turn.question for turn in conversation),
            masks=masks == 1,
            truth=masks if len(masks) else None,
            answer=" / ".join(
                f"({turn.thought}) {turn.answer}" if turn.thought else turn.answer for turn in conversation
            ),
            notes=[Path(sample.source).name],
        )
        for conversation, masks in sample.by_conversation()
    ]


if __name__ == "__main__":
    sys.exit(cli.run(main))
