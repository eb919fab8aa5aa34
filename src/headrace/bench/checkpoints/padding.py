"""Cost-padded checkpoints: a small Llama's exact behaviour at a bigger one's cost.

Where no big checkpoint can be fetched, a random one gives realistic step times and meaningless text, so acceptance of
drafts, stop conditions and answer lengths mean nothing. A padded one has both. What keeps the function the same:

* the hidden width H grows to H' by entries that stay 0. A norm's mean square then shrinks by H / H', which the
  factors sqrt(H / H') on its weight and H / H' on its epsilon undo;
* added heads have zero queries and zero columns in the output projection; a wider head puts the old dimensions at the
  places where the wider rotary embedding turns at the old frequencies, and its queries make up for the score's new factor;
* added rows of the MLP are zero on both sides;
* added layers have random weights, and output projections of zeros: they cost what a layer costs and add nothing;
* added vocabulary must never win. One hidden entry carries a constant from the embedding to the head, where added rows,
  and only they, multiply it by a large negative number. Its square is taken out of epsilon again.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.bench.checkpoints.shapes import Shape, write_checkpoint
from headrace.core.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

NEVER = -1e4
"""Times the constant's value at the head: the logit of an added token."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
_SAMPLE = "The mill stands where the river falls.\n\ndef flow(width, depth):\n    return width * depth * 0.6\n"


@dataclass(frozen=True, slots=True)
class Padding:
    """From one shape to another.

    Attributes:
        old, new: the shapes.
        epsilon: of the old norms.
        constant: what the embedding writes into hidden entry ``old.hidden_size``; 0 where no vocabulary is added.
        gain: of the final norm on that entry.
    """

    old: Shape
    new: Shape
    epsilon: float
    constant: float
    gain: float

    @property
    def new_epsilon(self) -> float:
        """Epsilon of the padded norms."""
        return (self.epsilon * self.old.hidden_size - self.constant**2) / self.new.hidden_size

    def layer_of(self, index: int) -> int | None:
        """The old layer that the new layer ``index`` is, None for an added one. Old layers are spread evenly."""
        old, new = self.old.num_hidden_layers, self.new.num_hidden_layers
        here = index * old // new
        return here if here != (index + 1) * old // new else None


def pad(source: Path, out: Path, shape: Shape, *, seed: int = 0) -> Padding:
    """Write ``source`` (a Llama's folder) padded to ``shape`` into the folder ``out``.

    Linears are written in the source's precision where that is exact, so a bfloat16 checkpoint stays one; norms in float32.

    Raises:
        InvalidRequest: when the source is no plain Llama, the shape is smaller somewhere, or ``out`` cannot be written.
    """
    from safetensors.torch import load_file

    config = _config(source)
    old = Shape.of(config)
    _check(old, shape)
    weights = load_file(source / "model.safetensors")
    epsilon = float(config["rms_norm_eps"])
    table = weights["model.embed_tokens.weight"]
    half = table.new_tensor(epsilon * old.hidden_size / 2).sqrt().item()  # rounded as the embedding will be
    constant = half if shape.vocab_size > old.vocab_size else 0.0
    gain = _gain(source, constant) * math.sqrt(old.hidden_size / shape.hidden_size) if constant else 0.0
    padding = Padding(old, shape, epsilon, constant, gain)
    settings = {**config, **shape.config(), "rms_norm_eps": padding.new_epsilon, "dtype": "float32"}
    settings["headrace"] = {"padded_from": old.config()}
    write_checkpoint(out, settings, _tensors(weights, padding, seed))
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    return padding


def _config(source: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rotary = (config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default")
    if config.get("model_type") != "llama" or rotary != "default" or config.get("attention_bias"):
        raise InvalidRequest(f"{source} cannot be padded: only a plain Llama can, such as bundled", field="model")
    return config


def _check(old: Shape, new: Shape) -> None:
    smaller = [name for name, value in old.config().items() if new.config()[name] < value and name[:3] != "tie"]
    if smaller:
        raise InvalidRequest(
            f"the shape is smaller than the model in {', '.join(smaller)}: choose a bigger one", field="like"
        )
    if _group(new) < _group(old) or new.head_dim % old.head_dim:
        raise InvalidRequest("the shape's heads cannot hold the model's: choose another one", field="like")
    if new.vocab_size > old.vocab_size and new.hidden_size == old.hidden_size:
        raise InvalidRequest("more vocabulary needs a wider hidden size: choose a bigger shape", field="like")


def _group(shape: Shape) -> int:
    return shape.num_attention_heads // shape.num_key_value_heads


def _gain(source: Path, constant: float) -> float:
    """A factor that brings the constant, behind the final norm, to the size of the other entries there.

    Much smaller, it would be lost where activations are rounded to 8 bits; much larger, it would cost the others precision.
    """
    import torch
    from tokenizers import Tokenizer

    from headrace.models.load import load

    module = load(str(source), dtype="float32", device="cpu", progress=False).module
    ids = torch.tensor([Tokenizer.from_file(str(source / "tokenizer.json")).encode(_SAMPLE).ids])
    seen: list[Tensor] = []
    module.model.norm.register_forward_hook(lambda _, args, out: seen.extend((args[0], out)))
    with torch.inference_mode():
        module(ids)
    ahead, behind = (rows.square().mean(-1).sqrt() for rows in seen)
    return float((ahead * behind).median()) / constant


def _tensors(weights: Mapping[str, Tensor], padding: Padding, seed: int) -> Iterator[tuple[str, Tensor]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    old, new = padding.old, padding.new
    table = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", table)
    embedding = _table(table, padding, padding.constant)
    yield "model.embed_tokens.weight", embedding
    if not new.tie_word_embeddings:
        yield "lm_head.weight", _table(head, padding, 0.0)
    elif head is not table:
        raise InvalidRequest("a model with a head of its own cannot take a shape that ties it", field="like")
    yield "model.norm.weight", _norm(weights["model.norm.weight"], padding, padding.gain)
    for index in range(new.num_hidden_layers):
        source, name = padding.layer_of(index), f"model.layers.{index}."
        if source is None:
            yield from ((name + part, tensor) for part, tensor in _added(new, table.dtype, generator))
            continue
        for part, tensor in _kept({k: weights[f"model.layers.{source}.{k}"] for k in _PARTS}, old, new):
            yield name + part, tensor
        for part in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            yield name + part, _norm(weights[f"model.layers.{source}.{part}"], padding, 0.0)


_PARTS = tuple(
    f"{block}.{name}_proj.weight"
    for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for name in names
)


def _table(table: Tensor, padding: Padding, constant: float) -> Tensor:
    """An embedding or head: old rows with the constant, added rows with what makes them lose."""
    rows, width = table.shape
    wide = table.new_zeros(padding.new.vocab_size, padding.new.hidden_size)
    wide[:rows, :width] = table
    if padding.new.vocab_size > rows:
        wide[:rows, width] = constant
        wide[rows:, width] = NEVER
    return wide


def _norm(weight: Tensor, padding: Padding, gain: float) -> Tensor:
    width = padding.old.hidden_size
    wide = weight.float().new_zeros(padding.new.hidden_size)
    wide[:width] = weight.float() * math.sqrt(width / padding.new.hidden_size)
    if gain:
        wide[width] = gain
    return wide


def _kept(parts: Mapping[str, Tensor], old: Shape, new: Shape) -> Iterator[tuple[str, Tensor]]:
    """Linears of an old layer in their wider form."""
    ratio = new.head_dim // old.head_dim
    queries = _places(old, new, old.num_attention_heads, _group(old), _group(new))
    keys = _places(old, new, old.num_key_value_heads, 1, 1)
    dim, wide, hidden = old.hidden_size, new.hidden_size, new.intermediate_size
    query_width, key_width = (n * new.head_dim for n in (new.num_attention_heads, new.num_key_value_heads))
    q = parts["self_attn.q_proj.weight"]
    if not math.sqrt(ratio).is_integer():
        q = q.float()  # an inexact factor needs the room
    for name, rows, count in (
        ("q", queries, query_width), ("k", keys, key_width), ("v", keys, key_width),
    ):  # fmt: skip
        part = f"self_attn.{name}_proj.weight"
        found = (q if name == "q" else parts[part]).new_zeros(count, wide)
        found[rows, :dim] = q * math.sqrt(ratio) if name == "q" else parts[part]
        yield part, found
    out = parts["self_attn.o_proj.weight"]
    found = out.new_zeros(wide, query_width)
    found[:dim, queries] = out
    yield "self_attn.o_proj.weight", found
    for part in ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"):
        small = parts[part]
        found = small.new_zeros(*((wide, hidden) if "down" in part else (hidden, wide)))
        found[: small.shape[0], : small.shape[1]] = small
        yield part, found


def _places(old: Shape, new: Shape, heads: int, group: int, new_group: int) -> list[int]:
    """Where each old row of a projection goes: heads stay with their K and V head, dimensions with their frequency."""
    ratio = new.head_dim // old.head_dim
    return [
        (head // group * new_group + head % group) * new.head_dim + dim * ratio
        for head in range(heads)
        for dim in range(old.head_dim)
    ]


def _added(shape: Shape, dtype: Any, generator: Any) -> Iterator[tuple[str, Tensor]]:
    """A layer that costs what a layer costs and adds nothing."""
    import torch

    width, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    sizes = {"self_attn.q": queries, "self_attn.k": keys, "self_attn.v": keys, "mlp.gate": inner, "mlp.up": inner}
    for name, rows in sizes.items():
        yield f"{name}_proj.weight", (torch.randn(rows, width, generator=generator) * 0.02).to(dtype)
    yield "self_attn.o_proj.weight", torch.zeros(width, queries, dtype=dtype)
    yield "mlp.down_proj.weight", torch.zeros(width, inner, dtype=dtype)
    yield "input_layernorm.weight", torch.ones(width)
    yield "post_attention_layernorm.weight", torch.ones(width)
