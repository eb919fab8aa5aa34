"""Histories follow their sequence and leave once nobody asks for them."""

from __future__ import annotations

import gc
import weakref

from headrace.engine.history import Histories


def counts(histories: Histories, prompt: tuple[int, ...], output: list[int]) -> dict[int, float]:
    history = histories.get(prompt, output)
    return dict(zip(history.ids.tolist(), history.counts.tolist(), strict=True))


def test_a_history_grows_with_its_output() -> None:
    histories, output = Histories(), [5]
    assert counts(histories, (1, 5), output) == {1: 0.0, 5: 1.0}
    first = histories.get((1, 5), output)
    output += [5, 9]
    assert counts(histories, first.prompt, output) == {1: 0.0, 5: 2.0, 9: 1.0}
    assert histories.get(first.prompt, output) is first


def test_what_is_not_asked_for_is_forgotten_and_counted_anew_when_it_comes_back() -> None:
    histories = Histories(patience=3)
    prompt, gone, stays = (1,), [7, 7], [8]
    old = weakref.ref(histories.get(prompt, gone))
    kept = histories.get(prompt, stays)
    for _ in range(4):
        gc.collect()
        assert old() is not None
        histories.begin_step()
        assert histories.get(prompt, stays) is kept
    gc.collect()
    assert old() is None
    assert counts(histories, prompt, gone) == {1: 0.0, 7: 2.0}
