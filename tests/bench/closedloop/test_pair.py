"""Runs of accepted drafts on models made of tables, the held-out texts, and the trees that steps are timed with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from headrace.bench.closedloop.pair import accepted_runs, heldout
from headrace.bench.closedloop.steps import TREES, tree_segments


class Successor:
    """Says after each token the one that ``wrong`` names for it, else the next number."""

    def __init__(self, wrong: dict[int, int] | None = None) -> None:
        self._wrong = wrong or {}

    def generate(self, prompts: torch.Tensor, *, max_new_tokens: int, **_: object) -> torch.Tensor:
        rows = prompts.tolist()
        for row in rows:
            for _ in range(max_new_tokens):
                row.append(self._wrong.get(row[-1], row[-1] + 1))
        return torch.tensor(rows)

    def __call__(self, ids: torch.Tensor, *, logits_to_keep: int) -> SimpleNamespace:
        after = [[self._wrong.get(token, token + 1) for token in row[-logits_to_keep:]] for row in ids.tolist()]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor(after), 64).float())


def test_a_chain_is_accepted_up_to_the_first_other_choice_from_every_place() -> None:
    prompts = torch.tensor([[1, 2, 3], [20, 21, 22]])
    assert accepted_runs(Successor(), Successor(), prompts, 6).tolist() == [[4, 4, 4], [4, 4, 4]]
    # The draft errs after token 6, which is the fourth it is asked about in the first row: 4 5 6 then not 7.
    assert accepted_runs(Successor(), Successor({6: 0}), prompts, 6).tolist() == [[3, 2, 1], [4, 4, 4]]


def test_the_held_out_texts_have_sources_licences_and_enough_to_read() -> None:
    pieces = heldout()
    assert len({piece["source"] for piece in pieces}) == len(pieces) >= 5
    assert all(piece["licence"] and len(piece["text"]) > 4000 for piece in pieces)


def test_trees_have_as_many_rows_as_they_say_at_the_depth_of_their_parents() -> None:
    context = np.arange(10, dtype=np.int32)
    segments = dict(tree_segments(context, np.arange(10, 10 + max(TREES), dtype=np.int32)))
    assert {rows: len(segment.tokens) for rows, segment in segments.items()} == {1: 1, 8: 8, 16: 16}
    assert segments[8].positions.tolist() == [10, 11, 12, 13, 11, 12, 12, 11]
    assert segments[1].parents is None
