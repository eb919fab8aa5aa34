"""One layer of a transformers cache that attends through an index."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import CacheLayerMixin

from headrace.core.errors import InvalidRequest
from headrace.core.retrieval import CROSSOVER
from headrace.sparse.attend import add_rest, attend_rows
from headrace.sparse.codebook import Codes
from headrace.sparse.gather import Gathered
from headrace.sparse.index import PQIndex
from headrace.sparse.native import NativeIndex
from headrace.sparse.regions import Regions, Window
from headrace.sparse.search import compiled_kind
from headrace.sparse.sketch import Question, Rows, Searcher


@dataclass(frozen=True, slots=True)
class PQSettings:
    """How a layer searches.

    Attributes:
        regions: the budget and how it is spent.
        codes: sub-spaces and bits of the sketch.
        iterations: of Lloyd at a fit.
        refresh: fit anew once the middle has grown by this share since the last fit, because the keys of a long answer drift away from
            centroids fitted on its prompt; None never does, as in the paper.
        residual: mend the output with the estimated weight of what was not read.
        enough: stop retrieving for a head once this share of the middle's estimated attention is covered, and retrieve up to
            ``stretch`` times the budget for one where it is not; None retrieves the same number always, as in the paper. Only the
            native kernels do; elsewhere heads retrieve the same number.
        stretch: see ``enough``.
        device_bytes: what K and V of the layer may take on the model's device. Beyond, they live in host memory, and a decode step
            fetches the rows that it reads; the sketch stays on the device. None for no bound. On a CPU both are the same memory.
        crossover: contexts shorter than this are attended to whole; by default those in which that was measured to be as fast.
        seed: of the draw that a fit starts from.
        compiled: search and attend by compiled kernels where there are some; else by the torch reference.
    """

    regions: Regions = field(default_factory=Regions)
    codes: Codes = field(default_factory=Codes)
    iterations: int = 8
    refresh: float | None = 0.25
    residual: bool = False
    crossover: int = CROSSOVER
    seed: int = 0
    compiled: bool = True
    enough: float | None = None
    stretch: float = 2.0
    device_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.enough is not None and not 0.0 < self.enough < 1.0:
            raise InvalidRequest(f"enough is {self.enough}: give a share between 0 and 1, or None", field="enough")
        if self.stretch < 1.0:
            raise InvalidRequest(f"stretch is {self.stretch}: give a factor of at least 1", field="stretch")
        if self.refresh is not None and self.refresh <= 0:
            raise InvalidRequest(f"refresh is {self.refresh}: give a share above 0, or None for never", field="refresh")
        if self.iterations < 0 or self.crossover < 0:
            raise InvalidRequest("iterations and crossover are numbers of 0 or more", field="iterations")


class PQLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """K and V of every token, kept exactly, and a sketch of the middle keys that says which of them a decode step reads.

    Prompts, chunks and drafts of several tokens attend exactly; one token at a time goes through :meth:`attend`. Rows are
    numbered sequence by sequence, KV heads within: R = B * H.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    keys: Any  # transformers' base class declares them None or a tensor
    values: Any

    def __init__(self, settings: PQSettings | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.settings = settings or PQSettings()
        self._start()

    def _start(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.length = 0
        self.prompt = 0
        self.hosted = False
        self.fetched = 0  # bytes that the last step copied from host memory
        self.index: PQIndex | None = None
        self._fitted = 0
        self._sum: Tensor | None = None  # of the first `_summed` values of the middle, float32[R, D]
        self._summed = 0
        self._gathered = Gathered() if self.settings.compiled else None
        self._searcher = Searcher() if self.settings.compiled else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new rows [B, H, n, D]; gives back all of them, as views, or, from host memory, copies for several new ones and a single
        new one alone: :meth:`attend` reads the rest where it is.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        added = key_states.shape[2]
        self._settle(self.length + added)
        self.keys = _put(self.keys, self.length, key_states)
        self.values = _put(self.values, self.length, value_states)
        self.length += added
        if self.hosted and added == 1:
            return key_states, value_states
        keys, values = (part[:, :, : self.length].to(self.device) for part in (self.keys, self.values))
        return keys, values

    def _settle(self, length: int) -> None:
        """Move the rows to host memory when ``length`` of them would exceed what they may take on the device."""
        bound = self.settings.device_bytes
        batch, heads, _, size = self.keys.shape
        if bound is not None and not self.hosted and 2 * batch * heads * length * size * self.dtype.itemsize > bound:
            self.hosted = True
            self.keys, self.values = self.keys.cpu(), self.values.cpu()

    @property
    def device_bytes(self) -> int:
        """Bytes on the model's device between steps: the sketch, and K and V where they live there."""
        rows = (
            0
            if self.hosted or not self.is_initialized
            else 2 * self.keys[:, :, : self.length].numel() * self.dtype.itemsize
        )
        return rows + (0 if self.index is None else self.index.nbytes)

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self._start()

    def crop(self, tokens: int) -> None:
        """Forget ``-tokens`` tokens, or, for a positive number, all but the first ``tokens``."""
        if not self.is_initialized or tokens == 0:
            return
        self.length = max(0, self.length + tokens) if tokens < 0 else min(self.length, tokens)
        self.prompt = min(self.prompt, self.length)
        if self.index is not None:
            first, last = self.window.middle(self.length)
            self.index.truncate(last - first)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._take(torch.arange(self.keys.shape[0], device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._take(torch.arange(self.keys.shape[0], device=self.device)[indices])

    def _take(self, chosen: Tensor) -> None:
        if not self.is_initialized:
            return
        chosen = chosen.to(self.device)
        heads = self.keys.shape[1]
        own = chosen.to(self.keys.device)
        self.keys, self.values = self.keys.index_select(0, own), self.values.index_select(0, own)
        rows = (chosen[:, None] * heads + torch.arange(heads, device=self.device)).flatten()
        if self.index is not None:
            self.index.select_rows(rows)
        if self._sum is not None:
            self._sum = self._sum.index_select(0, rows)

    @property
    def window(self) -> Window:
        """Sizes of the regions now. What is there when the first token is retrieved for counts as the prompt."""
        return self.settings.regions.window(self.prompt or self.length - 1, self.length)

    def attend(self, query: Tensor, scale: float, padding: Tensor | None = None) -> Tensor:
        """Attention of the newest token.

        Args:
            query: [B, Hq, 1, D].
            scale: factor on the scores.
            padding: int64[B], tokens at the start of each sequence that are not its own; none by default.

        Returns:
            [B, Hq, 1, D] of the query's dtype.
        """
        batch, query_heads, _, size = query.shape
        heads = self.keys.shape[1]
        rows = batch * heads
        queries = query.reshape(rows, query_heads // heads, size)
        skip = None if padding is None else padding.repeat_interleave(heads)
        keys, values = (part[:, :, : self.length].flatten(0, 1) for part in (self.keys, self.values))
        window = self.window
        first, last = window.middle(self.length)
        if self.length < self.settings.crossover or last - first <= max(
            window.retrieved, self.settings.codes.centroids
        ):
            output = self._whole(queries, keys, values, skip, scale)
        else:
            self._catch_up(keys, first, last, skip)
            if isinstance(self.index, NativeIndex) and self._searcher is not None:
                output = self._ask(self._searcher, self.index, queries, window, skip, scale)
            else:
                output = self._retrieve(queries, keys, values, window, skip, scale)
        return output.to(query.dtype).view(batch, query_heads, 1, size)

    def _whole(self, queries: Tensor, keys: Tensor, values: Tensor, skip: Tensor | None, scale: float) -> Tensor:
        """Attention to everything; the queries of a group are rows of one product, so that K and V are read once."""
        mask = None
        keys, values = keys.to(queries.device), values.to(queries.device)
        if skip is not None:
            mask = (torch.arange(self.length, device=keys.device) >= skip[:, None])[None, :, None]
        asked = queries.to(keys.dtype)[None]
        return scaled_dot_product_attention(asked, keys[None], values[None], mask, scale=scale)[0]

    def _wanted(self, window: Window) -> int:
        """Tokens to retrieve."""
        return window.retrieved

    def _ask(
        self, searcher: Searcher, index: NativeIndex, queries: Tensor, window: Window, skip: Tensor | None, scale: float
    ) -> Tensor:
        """Code what has left the window, search and attend in one native call."""
        batch, heads, _, size = self.keys.shape
        first, last = window.middle(self.length)
        wanted, enough = self._wanted(window), self.settings.enough
        most = wanted if enough is None else int(wanted * self.settings.stretch)
        if self.settings.residual:
            self._sum_values(first, first + index.length, skip)
        asked = queries.float().reshape(batch, 1, -1, size).contiguous()
        out = torch.empty_like(asked)
        sums = None if self._sum is None else self._sum.view(batch, heads, size)
        questions = [
            Question(
                sketch,
                Rows(self.keys[row], self.values[row], self.keys.stride(2), self.keys.stride(1), heads, size),
                asked[row],
                self.length,
                first,
                last,
                wanted // 4,
                min(most, last - first),
                scale,
                enough or 0.0,
                None if sums is None else sums[row],
            )
            for row, sketch in enumerate(index.sketches)
        ]
        searcher.attend(questions, list(out))
        index.resynchronise()
        self._summed = last - first
        return out.view(queries.shape)

    def _sum_values(self, first: int, last: int, skip: Tensor | None) -> None:
        """Make the running sum that of the values [first, last); the kernel adds those that it codes."""
        if self._sum is None or self._summed != last - first:
            self._sum, self._summed = None, 0
            self._mean_value(self.values[:, :, first:last].flatten(0, 1), skip)

    def _catch_up(self, keys: Tensor, first: int, last: int, skip: Tensor | None) -> None:
        """Code the tokens that have left the local window since the last step, once each; fit anew when it is time."""
        settings, count = self.settings, last - first
        stale = (
            self.index is not None and settings.refresh is not None and count > self._fitted * (1.0 + settings.refresh)
        )
        if self.index is None:
            self.prompt = self.length - 1
        if self.index is None or stale:
            self.index = self._new_index()
            # A row that is padding almost throughout still needs a key to fit on; selection leaves it out all the same.
            native = isinstance(self.index, NativeIndex)
            self.index.build(
                keys[:, first:last].to(self.device), skip if skip is None or native else skip.clamp(max=count - 1)
            )
            self._fitted = count
        elif count > self.index.length and not isinstance(self.index, NativeIndex):
            self.index.append(keys[:, first + self.index.length : last].to(self.device))

    def _new_index(self) -> PQIndex:
        settings = self.settings
        kind = compiled_kind(settings.codes, self.device) if settings.compiled else PQIndex
        more = {"heads": self.keys.shape[1]} if issubclass(kind, NativeIndex) else {}
        return kind(settings.codes, iterations=settings.iterations, seed=settings.seed, **more)

    def _retrieve(
        self, queries: Tensor, keys: Tensor, values: Tensor, window: Window, skip: Tensor | None, scale: float
    ) -> Tensor:
        assert self.index is not None
        first, last = window.middle(self.length)
        found = self.index.select(queries, window.retrieved, scale)
        index, valid = self._rows(found + first, first, last, skip)
        middle = values[:, first:last]
        if self.hosted:
            keys, values, index = self._fetch(keys, values, index)
        if self.settings.residual:
            output, total = attend_rows(queries, keys, values, index, valid, scale)
            scores = self.index.scores(queries, scale)
            left = scores.scatter(2, found[:, None].expand(-1, scores.shape[1], -1), -torch.inf)
            return add_rest(output, total, left.logsumexp(-1), self._mean_value(middle, skip))
        if self._gathered is not None and not self.hosted and Gathered.takes(self.keys):
            return self._gathered.attend(queries, self.keys, self.values, index, valid, scale)
        return attend_rows(queries, keys, values, index, valid, scale)[0]

    def _fetch(self, keys: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows [R, k] of K and V from host memory, and their places there."""
        wide = index.to(keys.device)[..., None].expand(-1, -1, keys.shape[-1])
        near = [part.gather(1, wide).to(self.device) for part in (keys, values)]
        self.fetched = sum(part.nbytes for part in near)
        return near[0], near[1], torch.arange(index.shape[1], device=self.device).expand(len(index), -1)

    def _rows(self, found: Tensor, first: int, last: int, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows to attend to, [R, k], the newest token last, and which of them count: initial, retrieved, local."""
        initial = torch.arange(first, device=found.device).expand(len(found), -1)
        local = torch.arange(last, self.length, device=found.device).expand(len(found), -1)
        if skip is None:
            return torch.cat([initial, found, local], 1), None
        # Each sequence's initial tokens begin behind its padding; what lies beyond the middle is attended to anyway.
        behind = skip[:, None]
        initial = initial + behind
        valid = torch.cat([initial < last, found >= behind + first, local >= behind], 1)
        return torch.cat([initial, found, local], 1), valid

    def _mean_value(self, middle: Tensor, skip: Tensor | None) -> Tensor:
        """Mean of the middle's values [R, n, D] without padding, from a running sum: float32[R, D]."""
        count = middle.shape[1]
        if self._sum is None or self._summed > count:
            self._sum, self._summed = torch.zeros(len(middle), middle.shape[2], device=self.device), 0
        fresh = middle[:, self._summed :].to(self.device).float()
        if skip is None:
            self._sum += fresh.sum(1)
            real = torch.full((len(middle), 1), float(count), device=self.device)
        else:
            places = torch.arange(self._summed, count, device=self.device)
            self._sum += torch.einsum("rn,rnd->rd", (places[None] >= skip[:, None]).float(), fresh)
            real = (count - skip).clamp(min=1)[:, None].float()
        self._summed = count
        return self._sum / real


def _put(store: Tensor, at: int, rows: Tensor) -> Tensor:
    """``store`` [B, H, capacity, D] with ``rows`` [B, H, n, D] at ``at``, grown by half where it is too short.

    On a CPU a prompt gets that room at once: memory that nobody writes to costs nothing there, and copying a long prompt's rows for its
    first token does.
    """
    need = at + rows.shape[2]
    if store.shape[2] < need:
        spare = need if store.device.type == "cpu" else at
        grown = store.new_empty(*rows.shape[:2], max(need, spare + spare // 2), rows.shape[3])
        grown[:, :, :at] = store[:, :, :at]
        store = grown
    store[:, :, at:need] = rows
    return store
