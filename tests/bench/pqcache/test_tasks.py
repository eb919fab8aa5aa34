"""Tasks are what they say: exact lengths, answers that a literal reading of the context gives, the same from the same seed."""

from __future__ import annotations

import pytest

from headrace.bench.pqcache.tasks import FAMILIES, Language, Shape, Task, as_text, make, of_tokenizer, synthetic
from headrace.core.errors import InvalidRequest

LANGUAGE = synthetic(512)
SHAPE = Shape(1000, value=5, hops=3)


def _facts(task: Task, language: Language = LANGUAGE, size: int = 2) -> dict[tuple[int, ...], tuple[int, ...]]:
    """Every "SET name rest ." of a context, read from left to right."""
    found = {}
    for place, token in enumerate(task.context):
        if token == language.define:
            end = task.context.index(language.stop, place)
            found[task.context[place + 1 : place + 1 + size]] = task.context[place + 1 + size : end]
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("seed", range(3))
def test_contexts_have_their_length_and_begin_at_the_beginning(family: str, seed: int) -> None:
    task = make(family, LANGUAGE, SHAPE, seed)
    assert len(task.context) == SHAPE.length
    assert task.context[0] == LANGUAGE.start
    assert LANGUAGE.start not in task.context[1:]
    assert task.questions
    assert make(family, LANGUAGE, SHAPE, seed) == task
    assert make(family, LANGUAGE, SHAPE, seed + 1) != task


@pytest.mark.parametrize("family", ["needle", "multikey", "pairs", "passages"])
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_what_the_context_says_of_the_name(family: str, seed: int) -> None:
    task = make(family, LANGUAGE, SHAPE, seed)
    facts = _facts(task)
    for question in task.questions:
        assert question.suffix[0] == LANGUAGE.ask
        assert facts[question.suffix[1:]] == question.answer


@pytest.mark.parametrize("seed", range(3))
def test_variables_are_followed_hop_by_hop(seed: int) -> None:
    task = make("variables", LANGUAGE, SHAPE, seed)
    facts = _facts(task)
    for question in task.questions:
        name, said = question.suffix[1:], []
        while name in facts:
            name = facts[name]
            said += name
        assert tuple(said) == question.answer
        assert len(said) == 2 * (SHAPE.hops - 1) + 1


@pytest.mark.parametrize("seed", range(3))
def test_moved_questions_stand_in_front_and_only_their_markers_behind(seed: int) -> None:
    task = make("moved", LANGUAGE, SHAPE, seed)
    facts = _facts(task)
    for question in task.questions:
        ask, marker = question.suffix
        assert ask == LANGUAGE.ask
        place = task.context.index(marker)
        assert place < 5 * len(task.questions)
        name = task.context[place + 1 : place + 3]
        assert question.answer == name + facts[name]


def test_names_of_many_keys_differ_in_one_word_only() -> None:
    names = list(_facts(make("multikey", LANGUAGE, Shape(4096, spacing=16), 0)))
    near = sum(any(a != b and (a[0] == b[0] or a[1] == b[1]) for b in names) for a in names)
    assert near > 0.9 * len(names)


def test_pairs_leave_no_haystack() -> None:
    task = make("pairs", LANGUAGE, SHAPE, 0)
    assert sum(token in LANGUAGE.filler for token in task.context) < SHAPE.fact


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="longer"):
        make("multikey", LANGUAGE, Shape(16), 0)
    with pytest.raises(InvalidRequest, match="needle"):
        make("haystack", LANGUAGE, SHAPE, 0)
    with pytest.raises(InvalidRequest, match="markers"):
        make("moved", LANGUAGE, Shape(4096, questions=17), 0)
    with pytest.raises(InvalidRequest, match="too few"):
        synthetic(40)


def test_a_tokenizers_words_come_back_as_the_same_tokens() -> None:
    """The tasks are text for any model with a tokenizer: what is decoded encodes to the tokens it came from."""
    from transformers import AutoTokenizer

    from headrace.models.checkpoints.hub import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve("bundled"))
    language = of_tokenizer(tokenizer)
    task = make("multikey", language, Shape(600), 0)
    assert (
        tuple(tokenizer(tokenizer.decode(task.context[1:]), add_special_tokens=False)["input_ids"]) == task.context[1:]
    )
    rows = as_text(task, tokenizer)
    assert len(rows) == len(task.questions)
    assert set(rows[0]) >= {"context", "question", "answer_prefix", "answer", "max_new_tokens"}
    assert rows[0]["answer"][0] in rows[0]["context"]
