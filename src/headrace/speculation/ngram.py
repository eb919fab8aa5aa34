"""Drafts that cost nothing: what followed the last time the text ended like this (prompt lookup).

Code that is edited, documents that are summarised and tool calls that repeat themselves are full of text that was
there before. For each sequence the places of its n-grams are kept, so a lookup costs a dictionary access however long
the text is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.core.speculation import DraftJob, DraftTree, empty_tree

_TRUST = 2.0
"""A match of n tokens is trusted like n successes after so many failures."""


class _Text:
    """A sequence's n-grams: for every length the place after each one's last occurrences, newest last."""

    __slots__ = ("known", "last", "places")

    def __init__(self, longest: int) -> None:
        self.known = 0
        self.last = -1
        self.places: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(longest)]


class NGramDrafter:
    """Conforms to :class:`headrace.core.speculation.Drafter`; trees branch where the text once went on differently.

    Args:
        longest, shortest: lengths of the endings looked for, the longest first.
        remembered: places kept of each n-gram, the newest ones.
        name: of the source.
    """

    def __init__(self, longest: int = 4, shortest: int = 2, remembered: int = 4, name: str = "ngram") -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"n-grams of {shortest} to {longest} tokens: give 1 <= shortest <= longest")
        self.name, self.free = name, True
        self._longest, self._shortest, self._remembered = longest, shortest, remembered
        self._texts: dict[int, _Text] = {}

    def draft(self, jobs: Sequence[DraftJob]) -> list[DraftTree]:
        """One tree per job; empty where the ending is new."""
        return [self._tree(job) for job in jobs]

    def forget(self, sequence: int) -> None:
        """The sequence has ended."""
        self._texts.pop(sequence, None)

    def _tree(self, job: DraftJob) -> DraftTree:
        text = self._indexed(job)
        size = len(job.tokens)
        for length in range(min(self._longest, size - 1), self._shortest - 1, -1):
            ending = tuple(job.tokens[size - length :].tolist())
            # The newest place is the ending itself, after which nothing is known yet.
            places = [p for p in text.places[length - 1].get(ending, ()) if p < size]
            if places:
                return self._merged(job, places[::-1][: job.width], length)
        return empty_tree(self.name)

    def _indexed(self, job: DraftJob) -> _Text:
        """The n-grams of a job's text, with what is new since the last job."""
        text = self._texts.get(job.sequence)
        size = len(job.tokens)
        if text is None or text.known > size or (text.known and int(job.tokens[text.known - 1]) != text.last):
            text = self._texts[job.sequence] = _Text(self._longest)
        begin = max(0, text.known - self._longest + 1)
        fresh = job.tokens[begin:].tolist()
        for end in range(text.known + 1, size + 1):
            for length in range(self._shortest, min(self._longest, end) + 1):
                gram = tuple(fresh[end - length - begin : end - begin])
                places = text.places[length - 1].setdefault(gram, [])
                places.append(end)
                if len(places) > self._remembered:
                    del places[0]
        text.known, text.last = size, int(job.tokens[size - 1])
        return text

    def _merged(self, job: DraftJob, places: list[int], length: int) -> DraftTree:
        """What followed at each place, newest first, common beginnings merged.

        The first token is trusted by the length of the match, later ones as it grows; places share what trust there is.
        """
        ids: list[int] = []
        parents: list[int] = []
        given: list[float] = []
        children: dict[tuple[int, int], int] = {}
        for rank, place in enumerate(places):
            node = -1
            for depth, token in enumerate(job.tokens[place : place + job.depth].tolist()):
                known = children.get((node, token))
                if known is None:
                    matched = length + depth
                    trust = matched / (matched + _TRUST) * 0.5**rank
                    known = children[node, token] = len(ids)
                    ids.append(token)
                    parents.append(node)
                    given.append(trust)
                node = known
        return _layered(DraftTree.of(ids, parents, given, self.name))


def _layered(tree: DraftTree) -> DraftTree:
    """``tree`` with its nodes sorted by depth, as everywhere else."""
    return tree if tree.is_chain else tree.part(np.argsort(tree.depths, kind="stable").astype(np.int32))
