"""A transformers checkpoint of a Llama as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7}
NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's token types


def write(checkpoint: Path, out: Path, kind: str) -> None:
    """Write ``checkpoint`` to the file ``out`` with matrices stored as ``kind`` (a key of :data:`FILE_TYPES`).

    Raises:
        ValueError: the checkpoint is no Llama, or has parts this writer does not know.
    """
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise ValueError(f"{checkpoint} is a {config['model_type']}: only Llamas without biases are written as GGUF")
    writer = gguf.GGUFWriter(str(out), "llama")
    _settings(writer, config)
    writer.add_file_type(FILE_TYPES[kind])
    _tokens(writer, checkpoint, config)
    stored = getattr(gguf.GGMLQuantizationType, kind.upper())
    tensors = {
        name: array for file in sorted(checkpoint.glob("*.safetensors")) for name, array in load_file(file).items()
    }
    if config.get("tie_word_embeddings"):
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    for name, array in _renamed(tensors, config):
        if array.ndim == 1 or kind == "f32":
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _settings(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope type {rope['rope_type']!r} is not written as GGUF: only the default is")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_vocab_size(config["vocab_size"])


def _tokens(writer: Any, checkpoint: Path, config: dict[str, Any]) -> None:
    """The byte-level BPE vocabulary; ids the tokenizer lacks (padded embeddings) get names that no text contains."""
    data = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    words = [f"[unused {i}]" for i in range(config["vocab_size"])]
    types = [UNUSED] * len(words)
    for word, i in data["model"]["vocab"].items():
        words[i], types[i] = word, NORMAL
    for token in data["added_tokens"]:
        words[token["id"]], types[token["id"]] = token["content"], CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]])
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    if end is not None:
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def _renamed(tensors: dict[str, Any], config: dict[str, Any]) -> Any:
    import numpy as np

    heads = config["num_attention_heads"]
    turned = {"attn_q": heads, "attn_k": config.get("num_key_value_heads", heads)}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, array in tensors.items():
        array = np.ascontiguousarray(array, np.float32)
        stem = name.removesuffix(".weight")
        if stem in top:
            yield f"{top[stem]}.weight", array
            continue
        _, _, layer, part = stem.split(".", 3)
        new = _LAYER[part]
        if new in turned:  # llama.cpp rotates neighbouring pairs, transformers the two halves of a head
            array = array.reshape(turned[new], 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        yield f"blk.{layer}.{new}.weight", np.ascontiguousarray(array)
