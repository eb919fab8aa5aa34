"""Policies compared in the simulator: the orderings that their papers promise, and claims that follow from rows."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest
from tests.data import trace
from typer.testing import CliRunner

from headrace.bench import metrics, simulate
from headrace.bench.results import recheck
from headrace.bench.simulate import Simulation, replay
from headrace.bench.simulation.machines import LinearMachine
from headrace.bench.workloads.arrivals import Arrival, poisson
from headrace.bench.workloads.traces import load_trace
from headrace.cli import app
from headrace.core.batch import StepShape
from headrace.core.errors import InvalidRequest
from headrace.core.policy import Limits
from headrace.core.request import SLO

MACHINE = LinearMachine(step_ms=10.0, row_ms=0.1)


def rows_of(arrivals: list[Arrival], policy: str, **options: object) -> list[metrics.RequestRow]:
    setting = Simulation(**{"limits": Limits(8, 256, 1024)} | options)  # type: ignore[arg-type]
    found = replay(setting, arrivals, MACHINE, policy, 1.0)
    return [r for r in found if r["kind"] == "request"]  # type: ignore[misc]


def test_chunked_prefill_bounds_the_tail_of_decoding() -> None:
    arrivals = poisson(1.5, 150, seed=1, lengths=[(64, 60), (2000, 60)])
    limits = Limits(16, 64, 4096)
    tails = {
        p: metrics.summary(rows_of(arrivals, p, limits=limits))["tpot_ms_p99"] for p in ("chunked", "prefill-first")
    }
    longest_step = MACHINE.cost(StepShape(64, 0, 0, 1, 0))
    assert tails["chunked"] <= longest_step * (1 + 1e-9)
    assert tails["prefill-first"] > 1.4 * longest_step


def test_prefill_first_is_quicker_to_the_first_token() -> None:
    arrivals = poisson(2.0, 150, seed=1, lengths=[(64, 60), (2000, 60)])
    found = {p: metrics.summary(rows_of(arrivals, p))["ttft_ms_p50"] for p in ("chunked", "prefill-first")}
    assert found["prefill-first"] < found["chunked"]


def test_feedback_queues_spare_short_answers_the_long_ones() -> None:
    arrivals = poisson(4.0, 200, seed=2, lengths=[(40, 10)] * 9 + [(40, 1500)])
    short = {}
    for policy in ("chunked", "mlfq"):
        rows = rows_of(arrivals, policy)
        assert all(r["finished"] for r in rows), "nobody starves"
        short[policy] = statistics.mean(r["e2e_ms"] or 0 for r in rows if r["output_tokens"] == 10)
    assert short["mlfq"] < 0.2 * short["chunked"]


def test_the_urgent_do_not_notice_the_rest() -> None:
    calm = [Arrival(float(i), 100, 20, priority=0, category="urgent") for i in range(30)]
    flood = [Arrival(0.02 * i, 300, 200, priority=5) for i in range(200)]
    mixed = sorted([*calm, *flood], key=lambda a: a.time_s)

    def urgent(arrivals: list[Arrival], policy: str) -> dict[str, float]:
        return metrics.summary([r for r in rows_of(arrivals, policy, slots=4000) if r["category"] == "urgent"])

    alone, crowded = urgent(calm, "priority"), urgent(mixed, "priority")
    others = urgent(
        [Arrival(a.time_s, a.prompt_tokens, a.output_tokens, category=a.category) for a in mixed], "chunked"
    )
    # A step under way is finished first, and the step's spare rows go to the rest: at most one full step more, and longer steps.
    assert crowded["ttft_ms_p99"] < alone["ttft_ms_p99"] + 2 * 40
    assert crowded["tpot_ms_p99"] < 40
    assert others["ttft_ms_p50"] > 20 * crowded["ttft_ms_p50"], "without priorities they drown"


def test_counters_share_evenly_between_a_heavy_and_a_light_owner() -> None:
    heavy = [Arrival(0.01 * i, 100, 50, owner="heavy") for i in range(400)]
    light = [Arrival(0.1 * i, 100, 50, owner="light") for i in range(100)]
    arrivals = sorted([*heavy, *light], key=lambda a: a.time_s)
    shares = {}
    for policy in ("chunked", "vtc"):
        setting = Simulation(limits=Limits(8, 256, 1024))
        rows = [r for r in replay(setting, arrivals, MACHINE, policy, 1.0) if r["kind"] == "request"]
        until = 10.0 + 1.0  # both still have requests waiting
        served = {
            o: sum(r["decoded"] for r in rows if r["owner"] == o and r["end_s"] < until) for o in ("heavy", "light")
        }
        shares[policy] = served["light"] / served["heavy"]
    assert shares["vtc"] == pytest.approx(1.0, abs=0.15)
    assert shares["chunked"] < 0.4


def test_rescaling_loads_the_machine() -> None:
    arrivals = poisson(1.0, 60, seed=4, lengths=[(200, 60)], slo=SLO(tpot_ms=14.0))
    result = simulate.run(Simulation(policies=("chunked",), rates=(0.2, 20.0)), arrivals, LinearMachine(10.0, 0.3))
    assert result.claims["attainment_chunked_at_0.2"] == 1.0
    assert result.claims["attainment_chunked_at_20"] < 0.5
    assert result.claims["sim_hours_per_minute"] > 0
    assert result.claims == simulate.claims(json.loads(json.dumps(result.rows)))
    assert {len(curve) for panel in simulate.panels(result.rows).values() for curve in panel.values()} == {2}


def test_hours_say_of_their_requests_what_the_requests_would() -> None:
    arrivals = poisson(0.05, 400, seed=4, lengths=[(200, 60)], slo=SLO(tpot_ms=10.5))
    machine = LinearMachine(10.0, 0.3)
    whole = simulate.run(Simulation(policies=("chunked",)), arrivals, machine)
    short = simulate.run(Simulation(policies=("chunked",), by_hour=True), arrivals, machine)
    rows = [r for r in short.rows if r["kind"] == "hour"]
    assert [r["hour"] for r in rows] == [0, 1, 2]
    assert not [r for r in short.rows if r["kind"] == "request"]
    rate = f"{rows[0]['rate']:g}"
    requests = [r for r in whole.rows if r["kind"] == "request"]
    assert short.claims[f"requests_chunked_at_{rate}"] == len(requests)
    assert short.claims[f"finished_chunked_at_{rate}"] == len(requests)
    assert short.claims[f"attainment_chunked_at_{rate}"] == pytest.approx(
        whole.claims[f"attainment_chunked_at_{rate}"], abs=1e-3
    )
    assert 0 < short.claims[f"attainment_chunked_at_{rate}"] < 1
    first = [r["ttft_ms"] for r in requests if r["arrival_s"] - 1.0 < 3600]
    assert rows[0]["requests"] == len(first)
    assert rows[0]["ttft_ms_p99"] == pytest.approx(metrics.percentile(first, 99), abs=1e-3)
    assert short.claims["simulated_hours"] == pytest.approx(2.2, abs=0.3)


@pytest.mark.parametrize(("options", "field"), [({"policies": ("fastest",)}, "policy"), ({"rates": (0.0,)}, "rate")])
def test_wrong_settings_are_named(options: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Simulation(**options)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_the_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "sim.json", tmp_path / "sim.png"
    arguments = ["bench", "simulate", "--rate", "2", "--rate", "4", "--policy", "vtc", "--requests", "20",
                 "--json", str(out), "--plot", str(plot)]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert recheck(out, {"simulate": simulate.claims}) == {}
    claims = json.loads(out.read_text())["claims"]
    assert claims["throughput_tok_s_vtc_at_2"] > 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    tampered = json.loads(out.read_text())
    tampered["claims"]["throughput_tok_s_vtc_at_2"] += 1
    out.write_text(json.dumps(tampered))
    assert "throughput_tok_s_vtc_at_2" in recheck(out, {"simulate": simulate.claims})


def test_the_command_repeats_a_trace_for_hours(tmp_path: Path) -> None:
    out, mine = tmp_path / "sim.json", tmp_path / "mine.jsonl"
    mine.write_text(
        "".join(f'{{"emission_time_ms": {60_000 * i}, "input_length": 9, "output_length": 3}}\n' for i in range(7))
    )
    arguments = ["bench", "simulate", "--trace", str(mine), "--hours", "2", "--policy", "chunked", "--json", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    data = json.loads(out.read_text())
    assert [r["hour"] for r in data["rows"] if r["kind"] == "hour"] == [0, 1, 2]
    assert sum(r["requests"] for r in data["rows"] if r["kind"] == "hour") == 121
    assert recheck(out, {"simulate": simulate.claims}) == {}


def test_a_plot_without_matplotlib_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = CliRunner().invoke(app, ["bench", "simulate", "--plot", str(tmp_path / "x.png")])
    assert isinstance(done.exception, InvalidRequest)
    assert "headrace[plots]" in done.exception.message


@pytest.mark.slow
def test_an_hour_of_azure_conversations_takes_less_than_a_minute() -> None:
    arrivals = load_trace(trace("azure_llm_2023_conv.csv.gz"))
    setting = Simulation(limits=Limits(128, 1024, 4096))
    started = time.process_time()
    rows = replay(setting, arrivals, LinearMachine(15.0, 0.03, 0.05), "chunked", 5.5)
    taken = time.process_time() - started  # of the processor: other programs do not count
    assert rows[-1]["virtual_s"] > 3400
    assert sum(r["kind"] == "request" and r["finished"] for r in rows) == len(arrivals)
    assert taken < 60
