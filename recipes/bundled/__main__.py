"""The whole recipe: `python -m recipes.bundled --data DATA --work WORK --out FOLDER --minutes 120`.

A training that was interrupted continues and one that was finished is left as it is, so the command can be given again until
it is done.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .data import prepare
from .distill import DraftTrainer, make_generated
from .loop import arguments, settings_from
from .publish import publish
from .train import TargetTrainer

TARGET_SHARE, DRAFT_SHARE = 0.8, 0.16  # of --minutes; the rest is for data, evaluation and export


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", minutes=112.0)
    parser.add_argument("--out", type=Path, default=None, help="where the pair goes; default WORK/export")
    options = parser.parse_args()
    settings = settings_from(options)
    out = options.out or settings.work / "export"
    prepare(options.data, options.work, settings.config)
    TargetTrainer(dataclasses.replace(settings, minutes=settings.minutes * TARGET_SHARE)).run()
    make_generated(settings)
    DraftTrainer(dataclasses.replace(settings, minutes=settings.minutes * DRAFT_SHARE)).run()
    publish(options.data, settings.work, out)


if __name__ == "__main__":
    main()
