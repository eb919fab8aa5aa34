"""A small Llama for training, parameter for parameter the one `LlamaForCausalLM` loads.

The parameter names, the half-split rotary layout and the RMS norms are those of the `transformers`
class, so a state dict goes from one to the other without a conversion. What differs is speed on a CPU:
matrices are multiplied in bfloat16 (AMX tiles where there are any), query/key/value and gate/up run as one
product each, and the loss never holds the logits of a whole batch.

Shapes: B sequences, T tokens a sequence, D hidden width, H query heads, G key/value heads,
K = head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 0.02


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one model; every count is a number of units, not bytes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def parameters(self) -> int:
        """Stored weights (the LM head is the embedding, counted once)."""
        attention = self.hidden_size * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        return self.vocab_size * self.hidden_size + self.layers * (attention + feed_forward + norms) + self.hidden_size

    def weights_per_token(self) -> int:
        """Weights read to decode one token: every layer and the LM head (one embedding row is ignored)."""
        return self.parameters()

    def to_hf(self, special: dict[str, int]) -> dict[str, Any]:
        """`config.json` of the equivalent `LlamaForCausalLM`; `special` holds the bos, eos and pad ids."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": INIT_STD,
            "tie_word_embeddings": True,
            "use_cache": True,
            "dtype": "bfloat16",
            "bos_token_id": special["bos"],
            "eos_token_id": special["eos"],
            "pad_token_id": special["pad"],
        }


def config_from(values: dict[str, Any]) -> ModelConfig:
    """A `ModelConfig` from a plain mapping (a config.toml table, a checkpoint)."""
    return ModelConfig(**values)


def config_values(config: ModelConfig) -> dict[str, Any]:
    """The plain mapping `config_from` reads back."""
    return asdict(config)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each row of `x` [..., D] to unit root mean square, in fp32, times `weight` [D]."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout: `x` [B, heads, T, K], `cos` and `sin` [T, K/2] in fp32."""
    half = x.shape[-1] // 2
    left, right = x[..., :half].float(), x[..., half:].float()
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


class Norm(nn.Module):
    """An RMS norm that owns its gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal attention over whole rows; the three input products are one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width = config.hidden_size
        self.q_proj = nn.Linear(width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        joint = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)).to(x.dtype)
        packed = F.linear(x, joint).view(batch, length, -1, self.head_dim).transpose(1, 2)
        query, key, value = packed.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        groups = self.heads // self.kv_heads
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), self.o_proj.weight.to(x.dtype))


class FeedForward(nn.Module):
    """SwiGLU with gate and up as one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        joint = torch.cat((self.gate_proj.weight, self.up_proj.weight)).to(x.dtype)
        gate, up = F.linear(x, joint).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj.weight.to(x.dtype))


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """Embedding, layers and final norm: `LlamaModel` by parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = Norm(config.hidden_size, config.norm_eps)


class TinyLlama(nn.Module):
    """The trainable model; `hidden` is the forward pass, the head is the transposed embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, compute: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.compute = config, compute
        self.model = Stack(config)
        self.run_block: Callable[..., Tensor] = lambda block, x, cos, sin: block(x, cos, sin)
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        angles = torch.outer(torch.arange(config.max_positions, dtype=torch.float64), config.rope_theta**-steps)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def init_weights(self, seed: int) -> None:
        """Gaussian weights; the matrices that write to the residual stream are scaled down by depth."""
        generator = torch.Generator().manual_seed(seed)
        shrink = 1.0 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            scale = INIT_STD * (shrink if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
            parameter.data.normal_(0.0, scale, generator=generator)

    def use_compiled_blocks(self) -> None:
        """Fuse the elementwise work of a layer; all layers share one compiled graph a shape."""
        self.run_block = torch.compile(self.run_block, dynamic=False)

    def hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states [B, T, D] in the compute dtype for token `ids` [B, T]."""
        length = ids.shape[1]
        x = F.embedding(ids, self.model.embed_tokens.weight).to(self.compute)
        cos, sin = self.cos[:length], self.sin[:length]
        for block in self.model.layers:
            x = self.run_block(block, x, cos, sin)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] in fp32 of `hidden` [..., D]."""
        return F.linear(hidden, self.model.embed_tokens.weight.to(hidden.dtype)).float()
