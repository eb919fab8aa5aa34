"""Fused norms, gated MLPs and attention projections, swapped into an unpatched transformers decoder.

A decode step is dozens of small tensor operations per layer, and on a CPU their dispatch costs as much as the products between them.
Each module here does the work of one of the checkpoint's modules in a few native calls.

Nothing is swapped on a name's word. A module that has the right parts is run beside its replacement on random inputs, and
only if the two agree to rounding does the replacement go in; for attention the queries, keys, values and settings that reach
the attention function are compared too. A family that does anything else in there (another rotary layout, a clip, a
scale) fails the comparison and keeps its module.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headrace.models.fused.pinned import Pinned
from headrace.native import blocks
from headrace.native.memory import Arena
from headrace.native.skinny import QUANTISED, PackedMatrix, Storage

log = logging.getLogger(__name__)

Rotary = Literal["halves", "interleaved"]
"""Dimension i is paired with i + T / 2, or 2i with 2i + 1, T being the dimensions that are rotated."""

TOLERANCE, COARSE = 1e-5, 1e-2
PROBE = "headrace-probe"
"""Name of the attention function that only looks."""


class FusedNorm(Pinned):
    """RMS norm over the last dimension: float32[..., W] to the same.

    Args:
        scale: float32[W], what the normalised values are multiplied by.
        epsilon: added to the mean square.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("scale", scale.detach().clone().contiguous(), persistent=False)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Norm of every row."""
        return blocks.rms_norm(x, self.scale, self.epsilon)


class FusedMLP(Pinned):
    """MLP ``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))``: float32[..., h] to the same.

    Args:
        gate_up: the gate's and the up projection's rows, [2 * I, h]; the up projection's, [I, h], where there is no gate.
        down: [h, I].
        activation: of the gate, or of what stands alone.

    Attributes:
        gated: whether there is a gate.
    """

    def __init__(self, gate_up: PackedMatrix, down: PackedMatrix, activation: blocks.Activation) -> None:
        super().__init__()
        self.gate_up, self.down, self.activation = gate_up, down, activation
        self.gated = gate_up.columns != down.depth

    def forward(self, x: Tensor) -> Tensor:
        """The MLP of every row."""
        inner = blocks.gate(self.gate_up.matmul(x.reshape(-1, x.shape[-1])), self.activation, gated=self.gated)
        return self.down.matmul(inner).view(x.shape)


class FusedAttention(Pinned):
    """Grouped-query attention around transformers' attention interface, with one product for Q, K and V.

    It carries every plain attribute of the module it stands for (``layer_idx``, ``scaling``, ``sliding_window``, ...),
    because attention functions read them.

    Args:
        original: the module it stands for.
        qkv: rows of Q, K and V, [(Hq + 2 Hkv) * D, h].
        out: [h, Hq * D].
        heads: (Hq, Hkv, D).
        norms: of Q and K ahead of rotation, each over heads or over all of them at once; None for none.
        rotary: how the dimensions of Q and K are paired for rotation, None where they are not rotated.
    """

    layer_idx: int

    def __init__(
        self,
        original: nn.Module,
        qkv: PackedMatrix,
        out: PackedMatrix,
        heads: tuple[int, int, int],
        norms: tuple[FusedNorm, FusedNorm] | None,
        rotary: Rotary | None,
    ) -> None:
        super().__init__()
        self.__dict__.update({name: value for name, value in vars(original).items() if not name.startswith("_")})
        self.config: Any = original.config
        self._eager: Any = getattr(sys.modules[type(original).__module__], "eager_attention_forward", None)
        self.qkv, self.out, self.heads, self.norms, self.rotary = qkv, out, heads, norms, rotary
        self.settings: dict[str, Any] = {}

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers' attention modules: float32[B, N, h] to the same, and the weights if the function returns any."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        shape = hidden_states.shape[:-1]
        query, key, value = self._project(hidden_states, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self._eager
        )
        found, weights = attend(self, query, key, value, attention_mask, **self.settings, **kwargs)
        rows = found.reshape(-1, self.heads[0] * self.heads[2])
        return self.out.matmul(rows).view(*shape, -1), weights

    def _project(self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Q [B, Hq, N, D], K and V [B, Hkv, N, D], normed and rotated."""
        queries, keys, size = self.heads
        packed = self.qkv.matmul(hidden.reshape(-1, hidden.shape[-1]))
        turned, split = (queries + keys) * size, queries * size
        if self.norms is not None:
            of_query, of_key = self.norms
            blocks.rms_norm_(packed[:, :split], of_query.scale, of_query.epsilon)
            blocks.rms_norm_(packed[:, split:turned], of_key.scale, of_key.epsilon)
        if self.rotary:
            if angles is None:
                raise ValueError("position_embeddings are needed: this layer rotates its queries and keys")
            cosines, sines = (part.expand(*hidden.shape[:-1], -1).reshape(packed.shape[0], -1) for part in angles)
            blocks.rotate_(packed[:, :turned], size, cosines, sines, interleaved=self.rotary == "interleaved")
        heads = packed.view(*hidden.shape[:-1], queries + 2 * keys, size).transpose(1, 2)
        return heads[:, :queries], heads[:, queries : queries + keys], heads[:, queries + keys :]


def fuse(
    module: nn.Module,
    *,
    storage: Storage = "auto",
    arena: Arena | None = None,
    finish: Callable[[nn.Module], object] | None = None,
) -> dict[str, int]:
    """Swap fused modules in wherever they agree with what is there; float32 on the CPU, before linears are packed.

    Args:
        module: a transformers ``*ForCausalLM`` in evaluation mode.
        storage, arena: as for :class:`PackedMatrix`.
        finish: called with each part that goes in, to pack its matrices elsewhere; the room they took is used again.

    Returns:
        How many of each kind: {"attention": .., "mlp": .., "norm": ..}.

    Raises:
        NativeUnavailable: when the kernels cannot be compiled here.
    """
    pack = _Packer(storage, Arena() if arena is None else arena)
    counts = dict.fromkeys(("attention", "mlp", "norm"), 0)
    with torch.inference_mode():
        for path in [path for path, _ in module.named_modules()]:
            try:
                child = module.get_submodule(path)
            except AttributeError:
                continue  # its parent has been swapped
            for kind, fused in (("attention", _attention), ("mlp", _mlp), ("norm", _norm)):
                mark = pack.arena.mark()
                if path and (found := fused(child, pack)) is not None:
                    module.set_submodule(path, found)
                    counts[kind] += 1
                    if finish is not None:
                        finish(found)
                        pack.arena.rewind(mark)
                    break
                pack.arena.rewind(mark)
            del child
    log.info("fused %s", ", ".join(f"{count} {kind}s" for kind, count in counts.items()))
    return counts


@dataclass(frozen=True, slots=True)
class _Packer:
    """Packs the rows of linears, in order, into one matrix."""

    storage: Storage
    arena: Arena

    def __call__(self, linears: list[Any]) -> PackedMatrix:
        weight, bias = linears[0].weight, linears[0].bias
        if len(linears) > 1:
            # The joined copy goes back to the system when dropped; from the heap, megabytes of it would stay behind.
            nbytes = sum(linear.weight.nbytes for linear in linears)
            joined = Arena(nbytes).take(nbytes).view(torch.float32).view(-1, weight.shape[1])
            weight = torch.cat([linear.weight for linear in linears], out=joined)
            if any(linear.bias is not None for linear in linears):
                bias = torch.cat([torch.zeros(i.out_features) if i.bias is None else i.bias for i in linears])
        return PackedMatrix(weight, bias, self.storage, self.arena)


def _norm(module: nn.Module, pack: _Packer | None = None) -> FusedNorm | None:
    """A fused form of an RMS norm that multiplies by its weight, or by 1 + weight."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if set(parameters) != {"weight"} or weight is None or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    if not _plain(weight) or isinstance(module, nn.LayerNorm):
        return None
    # Rows so small that epsilon matters, ordinary ones and large ones.
    x = random(3, weight.shape[0]) * torch.tensor([[1e-3], [1.0], [1e2]])
    for scale in (weight, 1.0 + weight):
        fused = FusedNorm(scale, epsilon)
        if same(outcome(module, x), fused(x)):
            return fused
    return None


def _mlp(module: nn.Module, pack: _Packer) -> FusedMLP | None:
    """A fused form of an MLP of the usual names, the gate ahead of the up projection where one linear holds both."""
    children = dict(module.named_children())
    down: Any = children.pop("down_proj", None)
    names = ("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",)
    first = next((found for some in names if (found := _take(children, some))), [])
    if not first or not _linears(down, *first) or _stateful(module, children):
        return None
    wide, inner = [linear.out_features for linear in first], down.in_features
    if wide not in ([inner, inner], [2 * inner], [inner]):
        return None
    gate_up, below = pack(first), pack([down])
    inputs = [random(1, 5, gate_up.depth), 4.0 * random(2, 1, gate_up.depth)]
    expected = [outcome(module, x) for x in inputs]
    for activation in blocks.ACTIVATIONS:
        fused = FusedMLP(gate_up, below, activation)
        if all(same(want, fused(x)) for want, x in zip(expected, inputs, strict=True)):
            return fused
    return None


def _attention(module: nn.Module, pack: _Packer) -> FusedAttention | None:
    """A fused form of an attention module of the usual names."""
    children, size = dict(module.named_children()), getattr(module, "head_dim", None)
    out: Any = children.pop("o_proj", None)
    config: Any = getattr(module, "config", None)
    inner = _take(children, ("q_proj", "k_proj", "v_proj")) or _take(children, ("qkv_proj",))
    norms = _take(children, ("q_norm", "k_norm"))
    if not inner or not size or config is None or not _linears(out, *inner) or _stateful(module, children):
        return None
    queries = out.in_features // size
    keys = (sum(linear.out_features for linear in inner) // size - queries) // 2
    widths = [queries * size, keys * size, keys * size]
    if [linear.out_features for linear in inner] not in (widths, [sum(widths)]):
        return None
    fused_norms = [_norm(norm) for norm in norms]
    if None in fused_norms:
        return None
    pair = (fused_norms[0], fused_norms[1]) if norms else None
    qkv, below = pack(inner), pack([out])
    for rotary in ("halves", "interleaved", None):
        fused = FusedAttention(module, qkv, below, (queries, keys, size), pair, rotary)  # type: ignore[arg-type]
        if all(_attends_alike(module, fused, config, shape) for shape in ((1, 5), (2, 3))):
            return fused
    return None


def _attends_alike(original: nn.Module, fused: FusedAttention, config: Any, shape: tuple[int, int]) -> bool:
    """Whether both hand the same queries, keys, values and settings to the attention function, and give the same output."""
    hidden = random(*shape, fused.qkv.depth)
    angles = random(*shape, fused.heads[2])
    call = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
    with _looking(config) as seen:
        expected = outcome(original, hidden, **call)
        if expected is None or len(seen) != 1:
            return False
        settings = seen[0][1]
        if fused.settings and not _equal_settings(fused.settings, settings):
            return False
        fused.settings = settings
        found = fused(hidden, **call)
    (before, _), (after, _) = seen
    return same(expected[0], found[0]) and all(same(a, b) for a, b in zip(before, after, strict=True))


@contextlib.contextmanager
def _looking(config: Any) -> Iterator[list[tuple[tuple[Tensor, ...], dict[str, Any]]]]:
    """Meanwhile attention records its (query, key, value) and settings, and gives back the queries."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> tuple[Tensor, None]:
        seen.append(((query.clone(), key.clone(), value.clone()), settings))
        return query.transpose(1, 2).contiguous(), None

    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[PROBE] = look
    config._attn_implementation = PROBE
    try:
        yield seen
    finally:
        config._attn_implementation = before
        ALL_ATTENTION_FUNCTIONS.pop(PROBE)


def _equal_settings(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        one[name] is other[name] or (not isinstance(one[name], Tensor) and one[name] == other[name]) for name in one
    )


def outcome(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What ``module`` gives, or None where it does not take such a call: then it is not what we took it for."""
    try:
        return module(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError):
        return None


def same(expected: Any, found: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Equal up to rounding, measured against the largest value."""
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    return bool((expected - found).abs().max() <= tolerance * expected.abs().max())


def tolerance(matrix: PackedMatrix) -> float:
    """What rounding may change in a product with ``matrix``: where rows are quantised, it may move one by a step of 1 / 127."""
    return COARSE if matrix.storage in QUANTISED else TOLERANCE


def random(*shape: int) -> Tensor:
    """Normally distributed numbers, the same ones for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def _take(children: dict[str, nn.Module], names: tuple[str, ...]) -> list[Any]:
    """The children of these names, removed from ``children``; none when one is missing."""
    return [children.pop(name) for name in names] if set(names) <= set(children) else []


def _linears(*modules: Any) -> bool:
    return all(type(module) is nn.Linear and _plain(module.weight) and not hooked(module) for module in modules)


def _plain(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype is torch.float32


def hooked(module: nn.Module) -> bool:
    """Whether ``module`` has hooks, which a replacement would not call."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _stateful(module: nn.Module, others: dict[str, nn.Module]) -> bool:
    """Whether a hook, or a child we make no use of, could matter."""
    return hooked(module) or any(True for child in others.values() for _ in child.parameters())
