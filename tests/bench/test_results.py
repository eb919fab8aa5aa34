"""Result files: claims follow from the rows, and a file that says otherwise is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.bench import engine
from headrace.bench.results import new_result, recheck
from headrace.core.errors import InvalidRequest


def rows() -> list[dict[str, object]]:
    rates = {"generate": [10.0, 30.0, 20.0], "continuous batching": [5.0, 5.0, 50.0], "headrace": [40.0, 1.0, 60.0]}
    return [
        {"system": system, "batch": 8, "repeat": i, "decode_tok_s": rate, "outside_forward_share": 0.01 * i}
        for system, values in rates.items()
        for i, rate in enumerate(values)
    ]


def test_claims_are_ratios_of_medians() -> None:
    assert engine.claims(rows()) == {
        "decode_b8_vs_generate": 2.0,
        "decode_b8_vs_continuous_batching": 8.0,
        "outside_forward_share_b8": 0.01,
    }


def test_a_stored_result_is_checked_against_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "engine.json"
    new_result("engine", rows(), engine.claims, (0.0, 0.0, 0.0)).write(path)
    assert recheck(path, {"engine": engine.claims}) == {}
    data = json.loads(path.read_text())
    data["claims"]["decode_b8_vs_generate"] = 3.0
    path.write_text(json.dumps(data))
    assert recheck(path, {"engine": engine.claims}) == {"decode_b8_vs_generate": (3.0, 2.0)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"name": "engine", "claims": 3, "rows": []}',
        '{"name": "engine", "claims": {}, "rows": [3]}',
        '{"name": "other", "claims": {}, "rows": []}',
    ],
)
def test_what_is_no_result_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=r"x\.json is not a result file"):
        recheck(path, {"engine": engine.claims})


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidRequest, match="choose another --json"):
        new_result("engine", rows(), engine.claims, (0.0,)).write(tmp_path / "file" / "engine.json")


def test_an_unknown_shape_is_refused_with_the_choices() -> None:
    with pytest.raises(InvalidRequest, match="20m, 125m"):
        engine.run(engine.EngineBench(shape="7b"))
