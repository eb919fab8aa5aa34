"""Seeded long-context tasks in the manner of RULER (arXiv 2404.06654), over any vocabulary of whole-word tokens.

Every task states facts, ``SET name name value ... value .``, somewhere in a long haystack and asks for some of them. An answer
has several tokens, because a prompt is read exactly by every method compared: only what follows the first token depends on
what a method kept.
The question comes last, except in :func:`moved`, where it opens the prompt and the prompt ends with a mere reference to it.

A context may carry several questions, each answered on its own: reading the haystack is what costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.core.errors import InvalidRequest

MARKERS = 16
"""Distinct references to questions that open a prompt."""


@dataclass(frozen=True, slots=True)
class Language:
    """Token ids that tasks are written in.

    Attributes:
        start: opens every context.
        ask: comes before a question.
        define, stop: come before and after a fact.
        markers: references to questions, for :func:`moved`.
        names, values, filler: disjoint words for what facts are about, what they say, and the haystack.
    """

    start: int
    ask: int
    define: int
    stop: int
    markers: tuple[int, ...]
    names: tuple[int, ...]
    values: tuple[int, ...]
    filler: tuple[int, ...]

    @classmethod
    def of(cls, words: Sequence[int], start: int) -> Language:
        """A language of distinct tokens ``words``: a quarter names, a quarter values, the rest filler."""
        if len(words) < MARKERS + 3 + 64:
            raise InvalidRequest(f"{len(words)} words are too few for the tasks: give {MARKERS + 67}", field="words")
        ask, define, stop = words[:3]
        rest = words[3 + MARKERS :]
        quarter = len(rest) // 4
        names, values, filler = rest[:quarter], rest[quarter : 2 * quarter], rest[2 * quarter :]
        return cls(start, ask, define, stop, tuple(words[3 : 3 + MARKERS]), tuple(names), tuple(values), tuple(filler))


def synthetic(size: int) -> Language:
    """The language over the ids 0 to ``size`` - 1."""
    return Language.of(range(1, size), 0)


def of_tokenizer(tokenizer: Any) -> Language:
    """The language over the words that are one token of a transformers tokenizer, a space before them included.

    Words are lower-case ASCII of three letters and more, in a fixed scrambled order, so that names, values and filler are alike.
    """
    found = []
    for word, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        plain = word[1:]
        if (
            word[:1] in ("\u0120", "\u2581")
            and len(plain) >= 3
            and plain.isascii()
            and plain.isalpha()
            and plain.islower()
        ):
            found.append(number)
    order = np.random.default_rng(0).permutation(len(found))
    start = tokenizer.bos_token_id
    if start is None:
        raise InvalidRequest("the tokenizer has no token that opens a text", field="tokenizer")
    return Language.of([found[i] for i in order], start)


@dataclass(frozen=True, slots=True)
class Question:
    """What follows a context, and the tokens that answer it."""

    suffix: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One context of exactly the length asked for, its suffixes not counted, and questions on it."""

    family: str
    context: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes in tokens.

    Attributes:
        length: of the context.
        name, value: of a fact's two halves.
        questions: asked of one context, at most; a single needle takes one.
        hops: of a chain of variables.
        spacing: haystack tokens to one fact, where there are many.
    """

    length: int
    name: int = 2
    value: int = 8
    questions: int = 4
    hops: int = 4
    spacing: int = 96

    @property
    def fact(self) -> int:
        """Tokens of one fact."""
        return self.name + self.value + 2


Family = Callable[[Language, Shape, np.random.Generator], Task]


def needle(language: Language, shape: Shape, rng: np.random.Generator) -> Task:
    """One fact in a haystack."""
    facts = _facts(language, shape, rng, 1)
    return Task("needle", _scatter(language, shape.length, facts, rng), _ask(language, facts, rng, 1, shape.name))


def multikey(language: Language, shape: Shape, rng: np.random.Generator) -> Task:
    """Many facts in a haystack, whose names share words."""
    facts = _facts(language, shape, rng, max(2, shape.length // (shape.fact + shape.spacing)), shared=True)
    context = _scatter(language, shape.length, facts, rng)
    return Task("multikey", context, _ask(language, facts, rng, shape.questions, shape.name))


def pairs(language: Language, shape: Shape, rng: np.random.Generator) -> Task:
    """Key-value retrieval: the haystack is facts and nothing else."""
    facts = _facts(language, shape, rng, (shape.length - 1) // shape.fact)
    context = _scatter(language, shape.length, facts, rng)
    return Task("pairs", context, _ask(language, facts, rng, shape.questions, shape.name))


def variables(language: Language, shape: Shape, rng: np.random.Generator) -> Task:
    """Variable tracking: ``SET x y .`` along several chains in any order; the answer names every variable on the way from x.

    A chain's last variable is set to a word of the values.
    """
    chains = max(shape.questions, shape.length // (4 * shape.spacing) // shape.hops)
    names = _names(language, shape.name, rng, chains * shape.hops, shared=False)
    statements, questions = [], []
    for chain in range(chains):
        links = names[chain * shape.hops : (chain + 1) * shape.hops]
        ends = [*links[1:], tuple(_draw(rng, language.values, 1))]
        for name, end in zip(links, ends, strict=True):
            statements.append((language.define, *name, *end, language.stop))
        answer = tuple(token for end in ends for token in end)
        questions.append(Question((language.ask, *links[0]), answer))
    order = rng.permutation(len(statements))
    context = _scatter(language, shape.length, [statements[i] for i in order], rng)
    return Task("variables", context, tuple(questions[: shape.questions]))


def moved(language: Language, shape: Shape, rng: np.random.Generator) -> Task:
    """:func:`multikey` with its questions before the haystack; after it comes the marker of the one to repeat and answer."""
    if shape.questions > len(language.markers):
        raise InvalidRequest(f"at most {len(language.markers)} questions have markers", field="questions")
    facts = _facts(language, shape, rng, max(shape.questions, shape.length // (shape.fact + shape.spacing)))
    asked = [facts[i] for i in rng.permutation(len(facts))[: shape.questions]]
    opening, questions = [], []
    for marker, fact in zip(language.markers, asked, strict=False):
        opening += [marker, *_name(fact, shape.name), language.stop]
        questions.append(Question((language.ask, marker), _name(fact, shape.name) + _value(fact, shape.name)))
    body = _scatter(language, shape.length - len(opening), facts, rng)
    return Task("moved", (body[0], *opening, *body[1:]), tuple(questions))


def passages(language: Language, shape: Shape, rng: np.random.Generator) -> Task:
    """Facts with long values, half of the haystack: a long answer, read off a passage token by token."""
    count = max(1, (shape.length - 1) // (2 * shape.fact))
    facts = _facts(language, shape, rng, count)
    context = _scatter(language, shape.length, facts, rng)
    return Task("passages", context, _ask(language, facts, rng, shape.questions, shape.name))


FAMILIES: Mapping[str, Family] = {
    "needle": needle,
    "multikey": multikey,
    "pairs": pairs,
    "variables": variables,
    "moved": moved,
    "passages": passages,
}


def make(family: str, language: Language, shape: Shape, seed: int) -> Task:
    """The task of a family; the same arguments give the same one.

    Raises:
        InvalidRequest: no such family, or the language has too few words or the context too little room.
    """
    if family not in FAMILIES:
        raise InvalidRequest(f"there is no task {family!r}: choose from {', '.join(FAMILIES)}", field="family")
    rng = np.random.default_rng([seed, shape.length, *family.encode()])
    return FAMILIES[family](language, shape, rng)


def as_text(task: Task, tokenizer: Any) -> list[dict[str, Any]]:
    """A row per question in the columns that long-context evaluations exchange (context, question, answer_prefix, answer ...)."""
    return [
        {
            "task": task.family,
            "context": tokenizer.decode(task.context),
            "question": tokenizer.decode(question.suffix),
            "answer_prefix": "",
            "answer": [tokenizer.decode(question.answer)],
            "max_new_tokens": len(question.answer),
        }
        for question in task.questions
    ]


Fact = tuple[int, ...]


def _name(fact: Fact, size: int) -> Fact:
    return fact[1 : 1 + size]


def _value(fact: Fact, size: int) -> Fact:
    return fact[1 + size : -1]


def _facts(language: Language, shape: Shape, rng: np.random.Generator, count: int, shared: bool = False) -> list[Fact]:
    names = _names(language, shape.name, rng, count, shared)
    return [(language.define, *name, *_draw(rng, language.values, shape.value), language.stop) for name in names]


def _names(language: Language, size: int, rng: np.random.Generator, count: int, shared: bool) -> list[Fact]:
    """Distinct names; ``shared`` ones use few words, so that they differ from many others in one place only."""
    words = len(language.names)
    if shared and size > 1:
        words = min(words, max(2, int(np.ceil((4 * count) ** (1.0 / size)))))
    if words**size < count:
        raise InvalidRequest(
            f"{count} facts need more names than the language has: give shorter contexts", field="length"
        )
    pool = rng.permutation(len(language.names))[:words]
    numbers = rng.choice(words**size, count, replace=False)
    return [tuple(language.names[pool[number // words**place % words]] for place in range(size)) for number in numbers]


def _draw(rng: np.random.Generator, words: Sequence[int], count: int) -> list[int]:
    return [words[i] for i in rng.integers(0, len(words), count)]


def _haystack(language: Language, count: int, rng: np.random.Generator) -> list[int]:
    """Filler as words come in text: few of them often (Zipf)."""
    share = 1.0 / np.arange(1, len(language.filler) + 1)
    return [language.filler[i] for i in rng.choice(len(language.filler), count, p=share / share.sum())]


def _scatter(language: Language, length: int, facts: Sequence[Fact], rng: np.random.Generator) -> Fact:
    """``length`` tokens: the facts in their order at random places of a haystack."""
    room = length - 1 - sum(len(fact) for fact in facts)
    if room < 0:
        raise InvalidRequest(
            f"a context of {length} tokens has no room for its facts: give a longer one", field="length"
        )
    hay = _haystack(language, room, rng)
    places = np.sort(rng.integers(0, room + 1, len(facts)))
    out, taken = [language.start], 0
    for place, fact in zip(places.tolist(), facts, strict=True):
        out += [*hay[taken:place], *fact]
        taken = place
    return (*out, *hay[taken:])


def _ask(
    language: Language, facts: Sequence[Fact], rng: np.random.Generator, count: int, size: int
) -> tuple[Question, ...]:
    chosen = rng.permutation(len(facts))[:count]
    return tuple(Question((language.ask, *_name(facts[i], size)), _value(facts[i], size)) for i in chosen)
