"""One run of several parts: what ends one of them early costs that part, and the file keeps the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from headrace.bench import serve
from headrace.bench.serve import Setting
from headrace.core.errors import EngineUnavailable, InvalidRequest

ROW = {"kind": "tree", "rows": 1, "context": 8, "ms": [1.0]}


def parts(
    monkeypatch: pytest.MonkeyPatch, closed: BaseException | None = None, swept: BaseException | None = None
) -> None:
    """Both parts write a row; then they raise what they are given."""

    def part(error: BaseException | None) -> Callable[..., None]:
        def measure(setting: Setting, rows: list[dict[str, Any]], report: Callable[[str], None]) -> None:
            rows.append(dict(ROW))
            if error is not None:
                raise error

        return measure

    monkeypatch.setattr(serve, "_closed", part(closed))
    monkeypatch.setattr(serve, "_open", part(swept))


def test_a_whole_run_is_not_partial(monkeypatch: pytest.MonkeyPatch) -> None:
    parts(monkeypatch)
    told: list[tuple[int, int]] = []
    result = serve.run(Setting(), on_part=lambda done, total: told.append((done, total)))
    assert (result.rows, result.partial) == ([ROW, ROW], False)
    assert told == [(0, 2), (1, 2), (2, 2)]


def test_an_interrupted_part_keeps_its_rows_and_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    parts(monkeypatch, closed=KeyboardInterrupt())
    result = serve.run(Setting())
    assert (result.rows, result.partial) == ([ROW], True)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (EngineUnavailable("headrace serve ended: no memory"), "ended early: headrace serve ended: no memory"),
        (ZeroDivisionError("division by zero"), "ended early: ZeroDivisionError: division by zero"),
    ],
)
def test_a_part_that_fails_costs_itself_only(error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts(monkeypatch, closed=error)
    result = serve.run(Setting())
    assert [row["kind"] for row in result.rows] == ["tree", "skipped", "tree"]
    assert result.rows[1]["reason"] == reason
    assert result.partial


def test_a_run_that_measures_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise EngineUnavailable("nothing starts")

    monkeypatch.setattr(serve, "_open", refused)
    with pytest.raises(EngineUnavailable, match="nothing starts"):
        serve.run(Setting(skip=frozenset({"closed"})))


def test_a_trace_that_cannot_be_read_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts(monkeypatch, closed=AssertionError("measured"), swept=AssertionError("measured"))
    with pytest.raises(InvalidRequest, match=r"absent\.csv"):
        serve.run(Setting(traces=(tmp_path / "absent.csv",)))
