"""What quantisation costs: the model read over a built-in text before and after.

The text is a few hundred tokens of several kinds. Two figures come of it: the mean negative log-likelihood of its tokens, and how
often the likeliest token stays the same. A few hundred tokens tell a broken model from a sound one and 0.1 nats from 0.01; they do
not rank methods that differ by less.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headrace.core.batch import Ints, Packer, Segment
from headrace.core.errors import HeadraceError
from headrace.core.protocols import Quality, Runner
from headrace.models.cache.slots import SlotPool
from headrace.models.loaded import LoadedModel
from headrace.models.runner import ModelRunner

CHUNK = 64
SECONDS = 5.0  # of one reading; no chunk begins after it

TEXT = '''\
The mill stood where the valley narrowed. In spring the snow of the upper farms came down all at once, and the old man opened
the sluice by a hand's breadth at a time, listening to the wheel. "You cannot hurry it," he used to say. "Let in more than
the wheel can take and the water goes over the wall; let in less and the neighbours wait for their flour until June." His
granddaughter kept the books. She knew that eleven sacks a day was a good day, and that nobody had ever ground twenty.

Rivers are measured by discharge, the volume of water that passes a cross-section in a second. It depends on the width and the
depth of the channel and on the speed of the current, which is highest near the middle and just below the surface. After heavy
rain the discharge of a small stream may rise a hundredfold within hours.

def moving_average(values, width):
    """Means of every `width` neighbours."""
    if width < 1:
        raise ValueError("width must be at least 1")
    total = sum(values[:width])
    means = [total / width]
    for left, right in zip(values, values[width:]):
        total += right - left
        means.append(total / width)
    return means

Item        Price   Count   Sum
Flour 1 kg   1.20       3   3.60
Salt         0.45       2   0.90
Yeast        0.15      10   1.50
Total                       6.00

{"station": "upper weir", "level_m": 2.31, "alarm": false, "readings": [2.28, 2.29, 2.31]}

Q: How many days are there in a leap year?
A: There are 366 days, because February has 29.

1, 2, 4, 8, 16, 32, 64, 128, 256
'''


@dataclass(frozen=True, slots=True)
class Reading:
    """A model read over some text under teacher forcing.

    Attributes:
        ids: int32[n] the tokens read.
        losses: float64[n - 1], the negative log-likelihood of each token after the first, in nats.
        greedy: int64[n - 1], the likeliest token in each place.
    """

    ids: Ints
    losses: Tensor
    greedy: Tensor


def sample(path: Path, *, limit: int, trust_remote_code: bool = False) -> Ints:
    """Token ids of the built-in text, at most ``limit``; none where the tokenizer of ``path`` cannot be read."""
    from headrace.models.text.tokenizer import Tokenizer

    try:
        ids = Tokenizer(path, trust_remote_code=trust_remote_code).encode(TEXT)
    except HeadraceError:
        ids = []
    return np.asarray(ids[:limit], np.int32)


def read_model(model: LoadedModel, ids: Ints, *, attention: str = "auto", seconds: float = SECONDS) -> Reading:
    """Read a model as it is, with K and V in its own dtype, through a runner that is dropped afterwards."""
    pool, implementation = SlotPool(len(ids)), model.module.config._attn_implementation
    try:
        return read(ModelRunner(model, pool, attention), pool, ids, seconds=seconds)
    finally:
        model.module.set_attn_implementation(implementation)


def read(runner: Runner, pool: SlotPool, ids: Ints, *, seconds: float = SECONDS) -> Reading:
    """Read ``ids``, at least two, through ``runner`` over free slots of ``pool``, chunk by chunk until ``seconds`` have passed.

    A slow machine thus reads less of the text rather than nothing: at least a chunk.
    """
    slots = pool.take(len(ids))
    losses, greedy, done = [], [], 0
    started = time.perf_counter()
    try:
        while done < len(ids) and (not done or time.perf_counter() - started < seconds):
            logits = runner.run(Packer().pack([_chunk(ids, slots, done)])).logits
            following = torch.from_numpy(ids[done + 1 : done + 1 + len(logits)]).to(logits.device, torch.int64)
            logits = logits[: len(following)]  # nothing follows the last token
            losses.append(torch.nn.functional.cross_entropy(logits, following, reduction="none").double().cpu())
            greedy.append(logits.argmax(-1).cpu())
            done += CHUNK
    finally:
        pool.release(slots)
    found = torch.cat(losses)
    return Reading(ids[: len(found) + 1], found, torch.cat(greedy))


def compare(before: Reading, after: Reading) -> Quality:
    """What changed between two readings of the same text, over the tokens that both got to."""
    shared = min(len(before.losses), len(after.losses))
    return Quality(
        tokens=shared,
        nll_before=before.losses[:shared].mean().item(),
        nll=after.losses[:shared].mean().item(),
        same_greedy=(before.greedy[:shared] == after.greedy[:shared]).double().mean().item(),
    )


def _chunk(ids: Ints, slots: Ints, first: int) -> Segment:
    last = min(first + CHUNK, len(ids))
    rows = np.arange(last - first, dtype=np.int32)
    positions = np.arange(first, last, dtype=np.int32)
    return Segment(0, ids[first:last], positions, slots[first:last], slots[:first], rows)
