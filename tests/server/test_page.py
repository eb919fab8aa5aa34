"""The dashboard in headless Chromium: it renders, follows, recovers, asks for a key, and speaks to nobody else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from tests.server.browser import launched
from tests.server.conftest import Running, Serve
from tests.server.fake_service import MODEL, FakeService

from headrace.core.request import SLO
from headrace.server.dashboard import board, steps
from headrace.server.slo.classes import SLOClasses

CLASSES = SLOClasses({"chat": SLO(60_000, 60_000), "never": SLO(0.001)}, "chat")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from launched()


class Visit:
    """A tab, with everything it asked for and complained of."""

    def __init__(self, browser: Any, **options: Any) -> None:
        self.page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.page.set_default_timeout(60_000)
        self.requests: list[Any] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("console", lambda said: said.type == "error" and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self, url: str, state: str = "live") -> Any:
        self.page.goto(f"{url}/dashboard")
        self.until(state)
        return self.page

    def until(self, state: str) -> None:
        self.page.wait_for_selector(f"body[data-state={state}]")

    def until_true(self, script: str) -> None:
        """Wait; by asking from here, as the page's policy lets no text be run as a script, not even a test's."""
        end = time.monotonic() + 60
        while not self.page.evaluate(script):
            assert time.monotonic() < end, f"not in a minute: {script}"
            self.page.wait_for_timeout(50)

    def text(self, selector: str) -> str:
        return self.page.inner_text(selector)

    def foreign(self, url: str) -> list[str]:
        """What it asked of others than ``url``."""
        return [r.url for r in self.requests if urlsplit(r.url).netloc != urlsplit(url).netloc]


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    visits: list[Visit] = []

    def start(**options: Any) -> Visit:
        visits.append(Visit(browser, **options))
        return visits[-1]

    yield start
    for one in visits:
        one.page.close()


def ask(running: Running, **fields: Any) -> None:
    reply = running.http().post("/v1/completions", json={"prompt": "zyzzyva", **fields})
    assert reply.status_code == 200


def test_it_renders_empty_and_follows_a_request(visit, serve: Serve) -> None:
    running = serve(slo_classes=CLASSES)
    seen = visit()
    page = seen.open(running.url)
    assert page.title() == f"{MODEL} · headrace"
    assert page.is_visible("#timeline-empty")
    assert "No request yet" in seen.text("#timeline-empty")
    assert page.is_hidden("#key-form")
    ask(running)
    ask(running, slo="never")
    seen.until_true("document.querySelectorAll('#recent tr').length === 2")
    latest = seen.text("#recent")
    assert "missed" in latest
    assert "met" in latest
    assert page.is_hidden("#timeline-empty")
    words = "2 requests: 1 on time or met, 0 at risk, 1 missed, 0 without a target"
    seen.until_true(f"document.querySelector('#timeline').ariaLabel === '{words}'")
    assert "50 %" in seen.text("#attained")
    assert "0 % (0 of 1)" in seen.text("#classes")
    assert "zyzzyva" not in page.content()
    assert seen.complaints == []
    assert seen.foreign(running.url) == []
    assert seen.foreign("http://elsewhere.invalid") != [], "the check must be able to fail"


def test_a_request_is_live_before_it_ends(visit, serve: Serve) -> None:
    running = serve(FakeService(delay_s=0.05), slo_classes=CLASSES)
    seen = visit()
    seen.open(running.url)
    body = {"prompt": "abc", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with running.http().stream("POST", "/v1/completions", json=body) as reply:
        next(reply.iter_lines())
        seen.until_true("document.querySelector('#recent')?.textContent.includes('decode')")
        assert "on time" in seen.text("#recent")
        assert seen.text("#open") == "1"
    seen.until_true("document.querySelector('#recent').textContent.includes('cancelled')")


def test_the_policy_stops_what_a_script_would_load_from_elsewhere(visit, serve: Serve) -> None:
    running = serve()
    seen = visit()
    page = seen.open(running.url)
    stopped = page.evaluate(
        """() => new Promise((done) => {
            document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
            document.body.append(Object.assign(new Image(), { src: "http://elsewhere.invalid/x.png" }));
        })"""
    )
    assert stopped == "img-src"
    page.evaluate(
        """() => { const made = document.createElement("script"); made.textContent = "window.ran = 1"; document.body.append(made); }"""
    )
    assert page.evaluate("window.ran") is None
    end = time.monotonic() + 60
    while len(seen.complaints) < 2:  # they come in their own time
        assert time.monotonic() < end, "the check for complaints must be able to fail"
        page.wait_for_timeout(50)


def test_the_key_is_asked_for_sent_as_a_header_and_kept_for_the_tab(visit, serve: Serve) -> None:
    running = serve(api_keys=(("ann", "sk-one"),))
    seen = visit()
    page = seen.open(running.url, state="key")
    assert page.is_visible("#key-form")
    assert page.is_hidden("#main")
    page.fill("#key", "sk-wrong")
    page.press("#key", "Enter")
    seen.until_true("document.querySelector('#key-problem').textContent.includes('does not know')")
    page.fill("#key", "sk-one")
    page.click("button")
    seen.until("live")
    assert page.is_hidden("#key-form")
    assert page.input_value("#key") == ""
    page.reload()
    seen.until("live")
    asked = [r for r in seen.requests if "/data" in r.url]
    assert asked[-1].all_headers()["authorization"] == "Bearer sk-one"
    assert all("sk-" not in r.url for r in seen.requests)
    assert page.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"


def test_a_lost_connection_is_told_and_found_again(visit, serve: Serve) -> None:
    running = serve()
    seen = visit()
    page = seen.open(running.url)
    page.route("**/dashboard/data*", lambda route: route.abort())
    seen.until("lost")
    assert page.is_visible("#banner")
    assert "does not answer" in seen.text("#banner")
    assert "no connection" in seen.text("#link")
    page.unroute("**/dashboard/data*")
    seen.until("live")
    assert page.is_hidden("#banner")


def test_another_run_of_the_server_starts_a_new_picture(visit, serve: Serve) -> None:
    first, second = serve(), serve()
    for _ in range(3):
        ask(first)
    seen = visit()
    page = seen.open(first.url)
    seen.until_true("document.querySelectorAll('#recent tr').length === 3")
    ask(second)
    page.route(
        "**/dashboard/data*", lambda route: route.continue_(url=route.request.url.replace(first.url, second.url))
    )
    seen.until_true("document.querySelectorAll('#recent tr').length === 1")


def synthetic(open_count: int, more: int) -> dict[str, Any]:
    """An answer as full as it can be."""
    row = ["chat", "decode", "met", 1.0, 1.1, 2.0, None, 100, 20, 900.0, 50.0, 8, 4]
    ended = ["chat", "finished", "missed", 1.0, 1.1, 2.0, 50.0, 100, 20, 900.0, 50.0, 8, 4]
    return {
        "epoch": "e", "revision": 9, "now": 58.0, "state": "ready", "model": "m", "version": "0", "step_limit": 512,
        "phases": {"queued": more, "prefill": 0, "decode": open_count}, "ended": 12_345, "classes": [],
        "requests": {
            "columns": board.COLUMNS,
            "open": [[1000 + i, *row] for i in range(open_count)],
            "ended": [[i, *ended] for i in range(400)],
        },
        "steps": {"columns": steps.COLUMNS, "rows": [[float(i), 10, 0.5, 90, 80, 40, 30, 500, 100, 1000, 9, 9] for i in range(58)]},
    }  # fmt: skip


def test_thousands_of_requests(visit, serve: Serve) -> None:
    running = serve()
    seen = visit()
    body = json.dumps(synthetic(300, 2700))
    seen.page.route("**/dashboard/data*", lambda route: route.fulfill(body=body, content_type="application/json"))
    page = seen.open(running.url)
    assert seen.text("#open") == "3,000"
    assert "2,700 more are open" in seen.text("#timeline-note")
    assert "have no room here" in seen.text("#timeline-note")
    assert page.get_attribute("#timeline", "aria-label").startswith("700 requests")
    assert page.evaluate("document.querySelectorAll('#recent tr').length") == 12
    assert seen.complaints == []


FROZEN = """() => new Promise((done) => {
    const canvas = document.querySelector("#timeline");
    const before = canvas.toDataURL();
    setTimeout(() => done(canvas.toDataURL() === before), 1500);
})"""


@pytest.mark.parametrize(("wish", "frozen"), [("reduce", True), ("no-preference", False)])
def test_motion(visit, serve: Serve, wish: str, frozen: bool) -> None:
    """Between two answers nothing moves for those who want no motion; for others time goes on."""
    running = serve()
    seen = visit(reduced_motion=wish)
    answers = 0

    def once(route: Any) -> None:
        nonlocal answers
        answers += 1
        if answers == 1:
            route.fulfill(body=json.dumps(synthetic(5, 0)), content_type="application/json")

    seen.page.route("**/dashboard/data*", once)  # the second question is never answered
    page = seen.open(running.url)
    assert page.evaluate(FROZEN) is frozen


SMALLEST_TEXT = """() => {
    const texts = [...document.querySelectorAll("p, td, th, dd, dt, li")];
    return Math.min(...texts.map((element) => parseFloat(getComputedStyle(element).fontSize)));
}"""


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_it_fits_any_width_in_light_and_dark(visit, serve: Serve, width: int) -> None:
    running = serve(slo_classes=CLASSES)
    ask(running)
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = visit(viewport={"width": width, "height": 800}, color_scheme=scheme).open(running.url)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(SMALLEST_TEXT) >= 12
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2


def test_names_for_those_who_do_not_see(visit, serve: Serve) -> None:
    page = visit().open(serve().url)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("canvas, input, section, [role=region]")]
            .filter((e) => !(e.ariaLabel || e.getAttribute("aria-labelledby") || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.querySelectorAll('canvas:not([role=img])').length") == 0
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("document.querySelectorAll('h1').length") == 1
