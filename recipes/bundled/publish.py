"""Export the trained pair, measure it, write its card: `python -m recipes.bundled.publish --out FOLDER`."""

from __future__ import annotations

import json
from pathlib import Path

from .card import write_card
from .evaluate import evaluate
from .export import export_pair
from .loop import arguments, settings_from


def publish(data: Path, work: Path, out: Path) -> None:
    """Write `out/target`, `out/draft` and `out/README.md`; the numbers stay in `work/evaluation.json`."""
    export_pair(work, out)
    result = evaluate(out, work)
    (work / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_card(data, work, out)
    print(f"wrote {out}")


def main() -> None:
    """Command line."""
    parser = arguments(__doc__ or "", minutes=5.0)
    parser.add_argument("--out", type=Path, default=None, help="where the pair goes; default WORK/export")
    options = parser.parse_args()
    settings = settings_from(options)
    publish(options.data, settings.work, options.out or settings.work / "export")


if __name__ == "__main__":
    main()
