"""n-gram drafts: what followed before, nothing else, however the text grows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.speculation import DraftJob, DraftTree
from headrace.speculation.ngram import NGramDrafter


def job(tokens: list[int], depth: int = 4, width: int = 1, sequence: int = 1) -> DraftJob:
    return DraftJob(sequence, np.array(tokens, np.int32), depth, width)


def paths(tree: DraftTree) -> list[list[int]]:
    found: list[list[int]] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        found.append([*(found[parent] if parent >= 0 else []), token])
    return found


def test_a_repeated_text_is_drafted_to_its_end() -> None:
    (tree,) = NGramDrafter().draft([job([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], depth=3)])
    assert tree.is_chain
    assert tree.tokens.tolist() == [4, 5, 6]
    assert (np.diff(tree.probabilities) <= 0).all()


def test_a_new_ending_gets_nothing() -> None:
    (tree,) = NGramDrafter().draft([job([1, 2, 3, 4, 5])])
    assert len(tree) == 0


def test_the_longest_match_wins_and_then_the_newest() -> None:
    text = [7, 1, 2, 50, 8, 1, 2, 60, 7, 1, 2]
    (tree,) = NGramDrafter(longest=3).draft([job(text, depth=1)])
    assert tree.tokens.tolist() == [50]
    (tree,) = NGramDrafter(longest=2).draft([job(text, depth=1)])
    assert tree.tokens.tolist() == [60]


def test_width_adds_what_followed_elsewhere_and_merges_what_is_common() -> None:
    text = [1, 2, 5, 6, 0, 1, 2, 5, 7, 0, 1, 2, 9, 9, 0, 1, 2]
    (tree,) = NGramDrafter(longest=2).draft([job(text, depth=2, width=3)])
    assert sorted(paths(tree)) == [[5], [5, 6], [5, 7], [9], [9, 9]]
    assert (np.diff(tree.depths) >= 0).all()


def test_a_loop_is_drafted_only_as_far_as_it_is_known() -> None:
    (tree,) = NGramDrafter().draft([job([1, 1, 1, 1], depth=5)])
    assert set(tree.tokens.tolist()) == {1}


def naive(tokens: list[int], longest: int, shortest: int, depth: int) -> list[int]:
    """The continuation of the newest earlier occurrence of the longest known ending."""
    for length in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length : end] == tokens[-length:]:
                return tokens[end : end + depth]
    return []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 5), st.integers(1, 7))
def test_growing_texts_equal_a_search_from_scratch(tokens, shortest, depth, stride) -> None:
    drafter = NGramDrafter(longest=max(shortest, 3), shortest=shortest)
    for size in range(1, len(tokens) + 1, stride):
        (tree,) = drafter.draft([job(tokens[:size], depth)])
        assert tree.tokens.tolist() == naive(tokens[:size], max(shortest, 3), shortest, depth)


def test_another_text_under_the_same_number_is_indexed_anew() -> None:
    drafter = NGramDrafter()
    drafter.draft([job([1, 2, 3, 4, 1, 2])])
    (tree,) = drafter.draft([job([5, 6, 7, 8, 5, 6, 7], depth=1)])
    assert tree.tokens.tolist() == [8]
    drafter.forget(1)
    assert len(drafter.draft([job([1, 2])])[0]) == 0


def test_lengths_must_make_sense() -> None:
    with pytest.raises(ValueError, match="shortest"):
        NGramDrafter(longest=2, shortest=3)
