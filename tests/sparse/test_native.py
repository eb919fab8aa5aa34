"""The native sketch: codes, searches and attention against the torch reference, for every way K and V may lie."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.batch import ancestor_words
from headrace.models.cache import planes
from headrace.native import sketch as native
from headrace.native.build import available
from headrace.sparse import codebook
from headrace.sparse.attend import add_rest, attend_rows
from headrace.sparse.codebook import Codebook, Codes, fit
from headrace.sparse.index import PQIndex, attended
from headrace.sparse.layer import PQLayer, PQSettings
from headrace.sparse.regions import Regions
from headrace.sparse.sketch import Book, Question, Rows, Searcher, Sketch

pytestmark = pytest.mark.skipif(not available(), reason="needs a C++ compiler")

H, G = 2, 3


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _book(keys: torch.Tensor, codes: Codes) -> tuple[Codebook, Book]:
    fitted = fit(keys, codes, iterations=2)
    return fitted, Book(fitted)


@pytest.mark.parametrize("codes", [Codes(1, 3), Codes(2, 3), Codes(2, 6), Codes(4, 4), Codes(4, 8)], ids=str)
@pytest.mark.parametrize("size", [12, 16, 80])
def test_codes_are_the_references(codes: Codes, size: int) -> None:
    if size % codes.subspaces:
        pytest.skip("does not divide")
    keys = _random(H, 700, size)
    fitted, book = _book(keys, codes)
    sketch = Sketch(codes, book)
    sketch.append(keys[:, :600])
    sketch.append(keys[:, 600:])
    assert torch.equal(sketch.table.long(), fitted.assign(keys).long())
    assert torch.equal(sketch.part(40, 50), sketch.table[:, :, 40:50])
    again = Sketch(codes, book)
    again.put(sketch.table)
    assert torch.equal(again.table, sketch.table)


def _dense(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float
) -> torch.Tensor:
    """[n, H * G, D] over [H, L, D] rows of which each query sees some, bool[n, L]."""
    n, _, size = queries.shape
    packed = queries.view(n, H, G, size).permute(1, 0, 2, 3)
    scores = torch.einsum("hngd,hld->hngl", packed, keys) * scale
    weights = scores.masked_fill(~visible[None, :, None], -torch.inf).softmax(-1)
    return torch.einsum("hngl,hld->hngd", weights, values).permute(1, 0, 2, 3).reshape(n, H * G, size)


@settings(max_examples=60, deadline=None)
@given(
    codes=st.sampled_from([Codes(2, 3), Codes(4, 8)]), storage=st.sampled_from(["float32", "bfloat16", "int8"]),
    size=st.sampled_from([8, 12, 64]), length=st.integers(30, 90), rows=st.integers(1, 6), local=st.integers(0, 20),
    scattered=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_everything_retrieved_is_dense_attention(
    codes: Codes, storage: str, size: int, length: int, rows: int, local: int, scattered: bool, seed: int
) -> None:
    """Decode rows and draft trees over slots in any order, whatever they hold."""
    rng = np.random.default_rng(seed)
    total = length + rows
    slots = (rng.permutation(2 * total)[:total] if scattered else np.arange(total)).astype(np.int32)
    keys, values = _random(2 * total, H, size, seed=seed), _random(2 * total, H, size, seed=seed + 1)
    scales = None
    if storage == "int8":
        (keys, k_scale), (values, v_scale) = planes.encode(keys), planes.encode(values)
        scales = (k_scale, v_scale)
        seen = [planes.decode(keys, k_scale), planes.decode(values, v_scale)]
    else:
        keys, values = keys.to(getattr(torch, storage)), values.to(getattr(torch, storage))
        seen = [keys.float(), values.float()]
    seen_keys, seen_values = (part[torch.from_numpy(slots).long()].transpose(0, 1).contiguous() for part in seen)
    initial, middle = 4, length - local
    sketch = Sketch(codes, _book(seen_keys[:, initial:middle], codes)[1])
    where = Rows(keys, values, H * size, size, H, size, torch.from_numpy(slots[:length]), scales)
    sketch.code(where, initial, max(0, middle - initial - 5))  # the kernel codes the rest
    parents = np.array([-1, *(rng.integers(0, i) for i in range(1, rows))], np.int32)
    words = ancestor_words(parents)
    visible = torch.ones(rows, total, dtype=torch.bool)
    for i in range(rows):
        for j in range(rows):
            visible[i, length + j] = bool(words[i, 0] >> j & 1)
    queries = _random(rows, H * G, size, seed=seed + 2)
    out = torch.full_like(queries, torch.nan)
    most = middle - initial
    question = Question(
        sketch, where, queries, length, initial, middle, most, most, 0.3,
        own=torch.from_numpy(slots[length:].copy()), mask=torch.from_numpy(words),
    )  # fmt: skip
    Searcher().attend([question], [out])
    expected = _dense(queries, seen_keys, seen_values, visible, 0.3)
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
    assert sketch.length == most


def _layers(**changes: object) -> tuple[PQLayer, PQLayer]:
    settings_ = PQSettings(Regions(0.3, initial=4), Codes(2, 3), crossover=0, **changes)  # type: ignore[arg-type]
    return PQLayer(settings_), PQLayer(replace(settings_, compiled=False))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_the_references(residual: bool, dtype: torch.dtype) -> None:
    """A padded batch, three hundred steps: the same outputs, step by step."""
    keys, values = _random(2, H, 600, 16).to(dtype), _random(2, H, 600, 16, seed=1).to(dtype)
    both = _layers(residual=residual)
    padding = torch.tensor([0, 13])
    for layer in both:
        layer.update(keys[:, :, :250], values[:, :, :250])
    for at in range(250, 550):
        query = _random(2, H * G, 1, 16, seed=at).to(dtype)
        found = []
        for layer in both:
            layer.update(keys[:, :, at : at + 1], values[:, :, at : at + 1])
            found.append(layer.attend(query, 0.25, padding))
        torch.testing.assert_close(*found, atol=2e-2 if dtype is torch.bfloat16 else 1e-4, rtol=1e-3)
    for layer in both:
        layer.crop(-40)
    found = []
    for layer in both:
        layer.update(keys[:, :, 510:511], values[:, :, 510:511])
        found.append(layer.attend(query, 0.25, padding))
    torch.testing.assert_close(*found, atol=2e-2 if dtype is torch.bfloat16 else 1e-4, rtol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    keep=st.floats(0.05, 0.99),
    loud=st.floats(0.1, 6.0),
    codes=st.sampled_from([Codes(2, 4), Codes(4, 8)]),
    seed=st.integers(0, 50),
)
def test_an_adaptive_budget_covers_what_it_promises(keep: float, loud: float, codes: Codes, seed: int) -> None:
    """As many items as the share needs, within a bin of the histogram, between the least and the most."""
    keys = _random(H, 400, 16, seed=seed)
    reference = PQIndex(codes, iterations=2)
    reference.build(keys)
    assert reference.codebook is not None
    sketch = Sketch(codes, Book(reference.codebook))
    sketch.append(keys)
    queries = _random(H, G, 16, seed=seed + 1) * loud
    nothing = torch.empty(0)
    asked = queries.reshape(1, H * G, 16)
    least, most = 10, 200
    question = Question(sketch, Rows(nothing, nothing, 0, 0, H, 16), asked, 0, 0, 0, least, most, 0.25, keep)
    weights = attended(reference.scores(queries, 0.25)) / G
    for head, items in enumerate(Searcher().select(question)):
        assert least <= len(items) <= most
        covered = float(weights[head, items.long()].sum())
        ranked = weights[head].sort(descending=True).values.cumsum(0)
        needed = int((ranked < keep).sum()) + 1
        if len(items) < most and len(items) > least:
            assert covered >= keep * 0.93
            assert len(items) <= needed * 1.1 + 8


def test_what_is_left_out_is_the_references_estimate() -> None:
    keys, values = _random(H, 300, 16), _random(H, 300, 16, seed=1)
    codes = Codes(2, 4)
    reference = PQIndex(codes, iterations=2)
    reference.build(keys)
    assert reference.codebook is not None
    sketch = Sketch(codes, Book(reference.codebook))
    sketch.append(keys)
    queries = _random(H, G, 16, seed=2)
    out = torch.empty(1, H * G, 16)
    rows = Rows(keys, values, 16, 300 * 16, H, 16)
    question = Question(
        sketch, rows, queries.reshape(1, H * G, 16), 300, 0, 300, 20, 20, 0.25, value_sum=values.sum(1).contiguous()
    )
    searcher = Searcher()
    chosen = torch.stack(searcher.select(question)).long()
    searcher.attend([question], [out])
    scores = reference.scores(queries, 0.25)
    left = scores.scatter(2, chosen[:, None].expand(-1, G, -1), -torch.inf).logsumexp(-1)
    output, total = attend_rows(queries, keys, values, chosen, None, 0.25)
    torch.testing.assert_close(out.view(H, G, 16), add_rest(output, total, left, values.mean(1)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(out.view(H, G, 16), output, atol=1e-3)


def test_threads_change_no_bit() -> None:
    keys, values = _random(1, 8, 6000, 32), _random(1, 8, 6000, 32, seed=1)
    query, found = _random(1, 16, 1, 32, seed=2), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            layer = PQLayer(PQSettings(Regions(0.9), Codes(2, 6), iterations=1, crossover=0))
            layer.update(keys, values)
            found.append(layer.attend(query, 0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("count", [5, 16, 64])
def test_clustering_is_the_references(count: int) -> None:
    """An iteration assigns and sums alike; padding has no weight."""
    keys = _random(H, 900, 24)
    runs = codebook.split(keys, 3)
    weights = (torch.arange(900)[None] >= torch.tensor([[0], [50]])).float()
    centroids = _random(H, 3, count, 8, seed=1)
    codes, best, sums, counts = native.iterate(runs, weights, centroids)
    expected = codebook.iterate(runs, weights, centroids)
    assert torch.equal(codes, expected[0])
    torch.testing.assert_close((best, sums, counts), expected[1:], atol=1e-3, rtol=1e-4)
    assert counts[1, 0].sum() == 850
