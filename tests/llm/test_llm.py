from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.engine import fake
from tests.llm.doubles import CharTokenizer, llm, text_of

from headrace.core.errors import ContextTooLong, EngineUnavailable, HeadraceError, InvalidRequest
from headrace.core.request import SLO, SamplingParams
from headrace.engine.sampling.sampler import Sampled
from headrace.llm import LLM, RequestOutput

SEEDED = SamplingParams(max_tokens=12, seed=7, ignore_eos=True)


def expected(prompt: str, params: SamplingParams = SEEDED, index: int = 0) -> list[int]:
    ids = CharTokenizer("").encode(prompt)
    return fake.answer(fake.request("x", ids, max_tokens=params.max_tokens, seed=params.seed, ignore_eos=True), index)


@pytest.mark.parametrize(
    "prompts",
    [
        "abc",
        ["abc"],
        [66, 67, 68],
        [[66, 67, 68]],
        np.array([66, 67, 68]),
        {"prompt": "abc"},
        {"prompt_token_ids": [66, 67, 68]},
        [{"prompt_token_ids": (66, 67, 68)}],
    ],
    ids=repr,
)
def test_every_way_to_give_a_prompt(monkeypatch: pytest.MonkeyPatch, prompts: Any) -> None:
    model, _ = llm(monkeypatch)
    (result,) = model.generate(prompts, SEEDED, use_tqdm=False)
    assert result.prompt_token_ids == [66, 67, 68]
    assert result.outputs[0].token_ids == expected("abc")
    assert result.outputs[0].text == text_of(expected("abc"))


def test_results_come_in_the_order_of_the_prompts_whatever_runs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = llm(monkeypatch, max_sequences=3)
    prompts = [chr(65 + i) * (1 + 7 * i % 11) for i in range(20)]
    params = [SEEDED.with_(max_tokens=1 + i % 9) for i in range(20)]
    results = model.generate(prompts, params, use_tqdm=False)
    assert [r.prompt for r in results] == prompts
    assert [r.outputs[0].token_ids for r in results] == [expected(p, q) for p, q in zip(prompts, params, strict=True)]
    assert len({r.request_id for r in results}) == 20
    assert max(engine.runner.batches) > 1  # type: ignore[attr-defined]  # they did run together


def test_n_gives_the_answers_of_each_index(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llm(monkeypatch)
    (result,) = model.generate("abc", SEEDED.with_(n=3), use_tqdm=False)
    assert [answer.index for answer in result.outputs] == [0, 1, 2]
    assert [answer.token_ids for answer in result.outputs] == [expected("abc", index=i) for i in range(3)]


def test_a_stop_string_cuts_the_text_and_ends_only_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = llm(monkeypatch)
    whole = text_of(expected("abc"))
    stop = whole[5:7]
    cut, other = model.generate(["abc", "xyz"], [SEEDED.with_(stop=stop), SEEDED], use_tqdm=False)
    answer = cut.outputs[0]
    assert answer.text == whole[: whole.index(stop)]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert other.outputs[0].token_ids == expected("xyz")
    assert not engine.busy
    assert engine.stats().slots_free + engine.stats().slots_cached == engine.stats().slots_total


def test_why_an_answer_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llm(monkeypatch)
    full = expected("abc")
    by_length, by_id = model.generate(["abc", "abc"], [SEEDED, SEEDED.with_(stop_token_ids=[full[3]])], use_tqdm=False)
    assert (by_length.outputs[0].finish_reason, by_length.outputs[0].stop_reason) == ("length", None)
    assert (by_id.outputs[0].finish_reason, by_id.outputs[0].stop_reason) == ("stop", full[3])
    ended = next(
        r.outputs[0]
        for r in model.generate([chr(c) for c in range(65, 125)], SEEDED.with_(ignore_eos=False), use_tqdm=False)
        if r.outputs[0].finish_reason == "stop"
    )
    assert ended.token_ids[-1] == fake.EOS
    assert ended.stop_reason is None  # the model's own end of text, as in vLLM


def test_an_slo_is_measured_in_the_engines_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llm(monkeypatch)  # every step takes 10 ms
    targets = [SLO(ttft_ms=15, tpot_ms=15), SLO(tpot_ms=5), SLO(ttft_ms=5), SLO()]
    results = model.generate(["a", "b", "c", "d"], SEEDED, slo=targets, use_tqdm=False)
    assert [r.metrics.slo_met for r in results] == [True, False, False, None]
    assert results[0].metrics.ttft_ms == pytest.approx(10)
    assert results[0].metrics.tpot_ms == pytest.approx(10)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ("", InvalidRequest, "no token"),
        ([1, 500], InvalidRequest, "500"),
        ("a" * 300, ContextTooLong, "300 tokens"),
        (3.5, InvalidRequest, "no prompt"),
        ({"text": "abc"}, InvalidRequest, "prompt_token_ids"),
        ([1, "a"], InvalidRequest, "no prompt"),
        ({"prompt_token_ids": "abc"}, InvalidRequest, "no prompt"),
    ],
    ids=repr,
)
def test_one_bad_prompt_is_named_and_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, bad: Any, error: type[InvalidRequest], words: str
) -> None:
    model, engine = llm(monkeypatch)
    with pytest.raises(error, match=rf"prompts\[2\].*{words}"):
        model.generate(["abc", "def", bad, "ghi"], SEEDED, use_tqdm=False)
    assert engine.runner.batches == []  # type: ignore[attr-defined]
    assert not engine.busy
    assert model.generate("abc", SEEDED, use_tqdm=False)[0].outputs[0].token_ids == expected("abc")


def test_lists_that_do_not_match(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llm(monkeypatch)
    with pytest.raises(InvalidRequest, match="sampling_params has 2 entries for 1 prompts"):
        model.generate("abc", [SEEDED, SEEDED], use_tqdm=False)
    with pytest.raises(InvalidRequest, match="slo has 1 entries for 2 prompts"):
        model.generate(["a", "b"], SEEDED, slo=[SLO()], use_tqdm=False)


def test_no_prompts_no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llm(monkeypatch)
    assert model.generate([], SEEDED, use_tqdm=False) == []


def test_an_interrupt_leaves_the_engine_empty_and_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = llm(monkeypatch)
    run, calls = engine.runner.run, iter(range(100))

    def interrupted(batch: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return run(batch)

    monkeypatch.setattr(engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(["abc", "xyz"], SEEDED, use_tqdm=False)
    assert not engine.busy
    assert model.generate("abc", SEEDED, use_tqdm=False)[0].outputs[0].token_ids == expected("abc")


def test_chat_takes_one_conversation_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llm(monkeypatch)
    talk = [{"role": "user", "content": "hi"}]
    one = model.chat(talk, SEEDED, use_tqdm=False)
    many = model.chat([talk, talk], SEEDED, use_tqdm=False)
    assert [len(one), len(many)] == [1, 2]
    for result in (*one, *many):
        assert result.outputs[0].token_ids == expected("user: hi")
    with pytest.raises(InvalidRequest, match=r"prompts\[1\]"):
        model.chat([talk, [{"role": "user"}]], SEEDED, use_tqdm=False)


def test_progress_is_shown_on_the_error_stream(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = llm(monkeypatch)
    model.generate(["abc", "xyz"], SEEDED, use_tqdm=False)
    assert capsys.readouterr() == ("", "")
    model.generate(["abc", "xyz"], SEEDED)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "2/2" in shown.err
    assert "tok/s" in shown.err


def test_unknown_engine_options_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match=r"'max_sequence'.*max_sequences"):
        LLM(max_sequence=3)
    seen: list[Any] = []
    monkeypatch.setattr("headrace.compose.build_engine", lambda config: seen.append(config) or fake.engine())
    monkeypatch.setattr("headrace.models.text.tokenizer.Tokenizer", CharTokenizer)
    LLM("some/folder", max_sequences=3, dtype="bfloat16").close()
    assert (seen[0].model, seen[0].dtype, seen[0].limits.max_sequences) == ("some/folder", "bfloat16", 3)


def test_closing_aborts_what_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = llm(monkeypatch)
    with model:
        engine.add(fake.request("left over", [1, 2, 3]))
    assert engine.step()[0].reason == "abort"
    with pytest.raises(EngineUnavailable, match="closed"):
        model.generate("abc", SEEDED, use_tqdm=False)
    model.close()


def test_result_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = llm(monkeypatch)
    (result,) = model.generate("abc", SEEDED, use_tqdm=False)
    assert isinstance(result, RequestOutput)
    assert result.finished


def test_an_answer_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt that starts with token 90 gets bad logits; its neighbours end as if it were not there."""
    model, engine = llm(monkeypatch)
    real = engine.sampler.sample

    def sample(result: Any, rows: Any) -> Any:
        drawn = real(result, rows)
        lost = Sampled(-1, error=HeadraceError("bad logits"))
        return [lost if d.prompt[0] == 90 else s for d, s in zip(rows, drawn, strict=True)]

    monkeypatch.setattr(engine.sampler, "sample", sample)
    good, bad, other = model.generate(["abc", [90, 3], "xyz"], SEEDED, use_tqdm=False)
    assert (bad.outputs[0].finish_reason, bad.outputs[0].error) == ("error", "bad logits")
    assert bad.finished
    for result, prompt in ((good, "abc"), (other, "xyz")):
        assert result.outputs[0].error is None
        assert result.outputs[0].token_ids == expected(prompt)
