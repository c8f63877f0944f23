"""Writes a training run's report.html: curves, tables, validation pictures, settings and versions in one file.

    python scripts/report.py runs/tiny

train_ds.py does so at the end of a run. This also works for a run that is still going, was resumed or was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.command_line.parser import Parser
from utils.inference import cli


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a folder that train_ds.py wrote, runs/NAME")
    args = parser.parse_args(arguments)

    from utils.training.run_report import write_report

    print(f"wrote {write_report(args.run)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
