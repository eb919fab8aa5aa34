"""The draft model's drafter: the same trees as from scratch, whatever it kept, and no slot lost."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tests import tiny

from headrace.core.batch import Batch
from headrace.core.errors import OutOfMemory
from headrace.core.protocols import StepResult
from headrace.core.speculation import DraftJob, DraftTree
from headrace.models.beam import likeliest
from headrace.models.cache.slots import SlotPool
from headrace.models.runner import ModelRunner
from headrace.speculation.model_drafter import ModelDrafter


def drafter(slots: int = 400, **options: int) -> tuple[ModelDrafter, SlotPool]:
    pool = SlotPool(slots)
    model = tiny.loaded("llama")
    runner = ModelRunner(model, pool)
    return ModelDrafter(runner, pool, likeliest, **{"context": tiny.CONTEXT} | options), pool


def job(tokens: list[int], depth: int = 4, width: int = 1, sequence: int = 1) -> DraftJob:
    return DraftJob(sequence, np.array(tokens, np.int32), depth, width)


def text(seed: int, count: int) -> list[int]:
    return random.Random(seed).choices(range(4, tiny.VOCAB), k=count)


def fresh(tokens: list[int], depth: int, width: int) -> DraftTree:
    made, _ = drafter()
    (tree,) = made.draft([job(tokens, depth, width)])
    return tree


def assert_same(one: DraftTree, other: DraftTree) -> None:
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.parents.tolist() == other.parents.tolist()
    assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


def path(tree: DraftTree, node: int) -> list[int]:
    found: list[int] = []
    while node >= 0:
        found.insert(0, int(tree.tokens[node]))
        node = int(tree.parents[node])
    return found


def test_a_chain_is_greedy_decoding() -> None:
    tokens = text(0, 20)
    tree = fresh(tokens, 4, 1)
    assert tree.is_chain
    for depth in range(4):
        one = fresh([*tokens, *tree.tokens[:depth].tolist()], 1, 1)
        assert one.tokens[0] == tree.tokens[depth]


@pytest.mark.parametrize("width", [1, 3])
def test_what_was_kept_gives_the_same_trees_as_from_scratch(width: int) -> None:
    """Accept nothing, a part or all of the draft, fall back, be preempted, grow without drafts: always as from scratch."""
    made, pool = drafter()
    choose = random.Random(width)
    tokens = text(1, 12)
    for turn in range(8):
        (tree,) = made.draft([job(tokens, 4, width)])
        assert_same(tree, fresh(tokens, 4, width))
        accepted = path(tree, choose.randrange(-1, len(tree)))
        tokens = [*tokens, *accepted, choose.randrange(4, tiny.VOCAB)]
        if turn == 3:
            tokens += text(turn, 5)  # steps without drafts
        if turn == 5:
            tokens = tokens[:10] + text(6, 4)  # another text altogether
    made.forget(1)
    assert pool.free == pool.size


def test_company_changes_nothing() -> None:
    made, pool = drafter()
    texts = {n: text(n, 5 + 7 * n) for n in range(1, 5)}
    trees = made.draft([job(t, 3, 2, n) for n, t in texts.items()])
    for tree, tokens in zip(trees, texts.values(), strict=True):
        assert_same(tree, fresh(tokens, 3, 2))
    for n in texts:
        made.forget(n)
    assert pool.free == pool.size


def test_each_job_gets_its_own_depth() -> None:
    made, _ = drafter()
    short, long = made.draft([job(text(1, 9), 1, 1, 1), job(text(2, 9), 5, 1, 2)])
    assert (len(short), len(long)) == (1, 5)


def test_a_long_prompt_is_caught_up_with_in_pieces() -> None:
    made, _ = drafter(max_rows=16)
    tokens = text(3, 40)
    sizes = [len(made.draft([job(tokens, 2)])[0]) for _ in range(3)]
    assert sizes == [0, 0, 2]
    assert_same(made.draft([job(tokens, 2)])[0], fresh(tokens, 2, 1))


def test_slots_of_others_are_taken_back_and_what_does_not_fit_gets_nothing() -> None:
    made, pool = drafter(slots=48)
    assert len(made.draft([job(text(1, 30), 3, 1, 1)])[0]) == 3
    (tree,) = made.draft([job(text(2, 30), 3, 1, 2)])
    assert_same(tree, fresh(text(2, 30), 3, 1))
    assert len(made.draft([job(text(3, 60), 3, 1, 3)])[0]) == 0
    for n in (1, 2, 3):
        made.forget(n)
    assert pool.free == pool.size


def test_a_text_beyond_the_draft_models_context_gets_nothing() -> None:
    made, _ = drafter(context=20)
    assert len(made.draft([job(text(1, 18), 3)])[0]) == 0
    assert len(made.draft([job(text(1, 17), 3)])[0]) == 3


def test_out_of_memory_means_no_draft_and_no_slot_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    made, pool = drafter()

    def fails(self: ModelRunner, batch: Batch) -> StepResult:
        raise OutOfMemory("full")

    monkeypatch.setattr(ModelRunner, "run", fails)
    assert [len(t) for t in made.draft([job(text(1, 9)), job(text(2, 9), sequence=2)])] == [0, 0]
    assert pool.free == pool.size


def test_a_stale_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: keeping guesses that turned out wrong changes the trees."""
    made, _ = drafter()
    tokens = text(1, 12)
    (tree,) = made.draft([job(tokens, 4)])
    wrong = [*tokens, int(tree.tokens[0]) ^ 1, 9]
    held = made._texts[1]
    held.nodes = {(-1, wrong[-2]): next(iter(held.nodes.values()))}
    (next_tree,) = made.draft([job(wrong, 4)])
    assert next_tree.probabilities != pytest.approx(fresh(wrong, 4, 1).probabilities, abs=1e-5)


def test_words_the_draft_model_has_not_are_read_as_its_last_one() -> None:
    """A target's table may be longer than the draft's, and an id beyond one's own would read memory that is not there."""
    known = text(3, 10)
    tree = fresh([*known, tiny.VOCAB + 40_000, 5], 3, 1)
    assert_same(tree, fresh([*known, tiny.VOCAB - 1, 5], 3, 1))
