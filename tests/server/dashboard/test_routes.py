"""The dashboard's files and data, without a browser."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from tests.server.conftest import Running, Serve, eventually
from tests.server.dashboard.test_board import Feed
from tests.server.fake_service import MODEL, FakeService

from headrace.core.errors import EngineUnavailable
from headrace.core.outputs import EngineStats
from headrace.core.request import SLO
from headrace.server.dashboard import monitor
from headrace.server.dashboard import routes as dashboard
from headrace.server.dashboard.monitor import Monitor
from headrace.server.slo.classes import SLOClasses

FILES = Path(dashboard.__file__).parent / "page"
CLASSES = SLOClasses({"chat": SLO(60_000, 60_000), "never": SLO(0.001)}, "chat")


def data(running: Running, after: int = 0, **headers: str) -> dict[str, Any]:
    reply = running.http().get("/dashboard/data", params={"after": after}, headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


def requests_of(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [dict(zip(found["requests"]["columns"], row, strict=True)) for row in found["requests"][kind]]


def test_every_file_is_served_and_listed(serve: Serve) -> None:
    http = serve().http()
    assert {path.name for path in FILES.iterdir()} == set(dashboard.TYPES)
    for path in ("/dashboard", *sorted(dashboard.OPEN_PATHS)):
        reply = http.get(path)
        assert reply.status_code == 200
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "no-referrer"
    for name in ("", "nothing.js", "../app.py", "%2e%2e/app.py", "..%2fapp.py"):
        assert http.get(f"/dashboard/{name}").status_code == 404


def foreign(text: str) -> list[str]:
    """Addresses of other servers in a text, but for the names of XML's languages."""
    found = re.findall(r"""(?:https?:|["'(])//[^\s"')]+""", text)
    return [address for address in found if "www.w3.org/2000/svg" not in address]


def inline(text: str) -> list[str]:
    """What a strict policy forbids in a page: scripts and styles that stand in it."""
    return re.findall(r"<script(?![^>]*\bsrc=)[^>]*>|<style|\sstyle=|\son[a-z]+=", text)


def test_nothing_comes_from_outside_and_nothing_stands_inline() -> None:
    for path in FILES.iterdir():
        assert foreign(path.read_text()) == [], path.name
    assert inline((FILES / "index.html").read_text()) == []
    assert foreign('import "https://cdn.example/x.js"; url(//cdn.example/y)') != []
    assert len(inline('<script>1</script><p style="x" onclick="y"><style>')) == 4


def test_no_markup_is_made_of_data() -> None:
    for path in FILES.glob("*.js"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", path.read_text()), (
            path.name
        )


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    wide = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(wide[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for what is drawn."""
    block = re.findall(r":root \{(.*?)\}", (FILES / "style.css").read_text(), re.DOTALL)[scheme]
    colour = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{3,6})", block))
    for text in ("ink", "soft", "missed"):
        assert contrast(colour[text], colour["card"]) >= 4.5, text
    assert contrast(colour["soft"], colour["page"]) >= 4.5
    assert contrast(colour["card"], colour["accent"]) >= 4.5  # the button
    for drawn in ("met", "risk", "none", "prefill", "decode", "accepted"):
        assert contrast(colour[drawn], colour["card"]) >= 3, drawn
    assert contrast("#777", "#888") < 3


def test_data_needs_a_key_and_the_page_does_not(serve: Serve) -> None:
    running = serve(api_keys=(("ann", "sk-one"),))
    http = running.http()
    assert http.get("/dashboard").status_code == http.get("/dashboard/app.js").status_code == 200
    assert http.get("/dashboard/data").status_code == 401
    assert http.get("/dashboard/data", params={"key": "sk-one", "api_key": "sk-one"}).status_code == 401
    found = data(running, authorization="Bearer sk-one")
    assert found["model"] == MODEL
    assert "ann" not in json.dumps(found)


def test_it_can_be_left_out(serve: Serve) -> None:
    http = serve(dashboard=False).http()
    for path in ("/dashboard", "/dashboard/app.js", "/dashboard/data"):
        assert http.get(path).status_code == 404


def test_a_request_is_seen_while_it_runs_and_after(serve: Serve) -> None:
    running = serve(FakeService(delay_s=0.02), slo_classes=CLASSES)
    body = {"prompt": "zyzzyva", "max_tokens": 500, "ignore_eos": True, "stream": True}
    with running.http().stream("POST", "/v1/completions", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        found = data(running)
        (row,) = requests_of(found, "open")
        assert (row["number"], row["class"], row["phase"], row["standing"], row["prompt"]) == (
            1,
            "chat",
            "decode",
            "met",
            7,
        )
        assert found["phases"] == {"queued": 0, "prefill": 0, "decode": 1}
        assert found["classes"][0]["open"]["met"] == 1
    assert eventually(lambda: data(running)["ended"] == 1)
    running.http().post("/v1/completions", json={"prompt": "zyzzyva", "slo": "never"})
    found = data(running)
    assert [row["phase"] for row in requests_of(found, "ended")] == ["cancelled", "finished"]
    chat, never = found["classes"]
    assert (chat["name"], chat["judged"]) == ("chat", 0)
    assert (never["name"], never["met"], never["judged"], never["ttft_ms"]) == ("never", 0, 1, 0.001)
    assert "zyzzyva" not in json.dumps(found)
    assert requests_of(data(running, found["revision"]), "ended") == []


def test_bad_revisions(serve: Serve) -> None:
    http = serve().http()
    for after in ("-1", "x", "1e3"):
        reply = http.get("/dashboard/data", params={"after": after})
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "after"


def test_steps_are_sampled_while_the_server_runs(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "SAMPLE_S", 0.02)
    service = FakeService()
    running = serve(service)
    for _ in range(3):
        running.http().post("/v1/completions", json={"prompt": "abc"})
    assert eventually(lambda: len(data(running)["steps"]["rows"]) >= 2)
    found = data(running)
    assert found["step_limit"] == 512
    assert len(found["steps"]["rows"][0]) == len(found["steps"]["columns"])


def test_sampling_survives_an_engine_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "SAMPLE_S", 0.001)
    answers: list[Any] = [EngineUnavailable("gone"), ValueError("a defect"), EngineStats(steps=1), EngineStats(steps=2)]

    class Stub:
        state = "ready"
        service: Any

        async def stats(self) -> EngineStats:
            answer = answers.pop(0) if answers else EngineStats(steps=3)
            if isinstance(answer, Exception):
                raise answer
            return answer

    stub: Any = Stub()
    stub.service = stub
    made = Monitor(SLOClasses())

    async def body() -> None:
        task = asyncio.create_task(made.run(stub))
        end = time.monotonic() + 20
        while not made.steps.rows(0) and time.monotonic() < end:
            await asyncio.sleep(0.005)
        task.cancel()

    asyncio.run(body())
    assert made.steps.rows(0)[0][1] == 1


def test_the_answer_is_small_however_much_there_is(serve: Serve) -> None:
    running = serve(slo_classes=CLASSES)
    seen = running.serving.monitor
    feeds = [Feed(f"r{i}", time.monotonic()) for i in range(3000)]
    for feed in feeds:
        seen.opened(feed)
    for feed in feeds[1000:]:
        seen.closed(feed)
    for step in range(5000):
        seen.steps.add(float(step), EngineStats(steps=step, slots_total=1 << 20, slots_free=7))
    reply = running.http().get("/dashboard/data")
    found = reply.json()
    sizes = [len(rows) for rows in (found["steps"]["rows"], found["requests"]["open"], found["requests"]["ended"])]
    assert sizes == [300, 300, 400]
    assert (found["phases"]["queued"], found["ended"]) == (1000, 2000)
    assert len(reply.content) < 100_000


def test_the_picture_in_the_documents_is_small() -> None:
    for path in (Path(__file__).parents[3] / "docs/img").glob("dashboard*.png"):
        assert 10_000 < path.stat().st_size < 300_000


def test_polling_is_not_logged_but_failures_are(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "headrace.access")
    running = serve(api_keys=(("ann", "k"),))
    data(running, authorization="Bearer k")
    assert "/dashboard/data" not in caplog.text
    running.http().get("/dashboard/data")
    assert eventually(lambda: "/dashboard/data 401" in caplog.text)
