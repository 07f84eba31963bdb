"""GGUF files of the family in examples/, float32, with llama.cpp's names and its order of rotary dimensions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from safetensors.torch import load_file

WEIGHTS = Path(__file__).parents[2] / "examples" / "family" / "weights"
BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """transformers turns dimension i with i + d / 2, llama.cpp's llama 2 i with 2 i + 1."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def vocabulary(folder: Path) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and the merges of the folder's byte-level BPE."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    tokens = sorted(ids, key=ids.__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    types = [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens]
    return tokens, types, [" ".join(pair) for pair in tokenizer["model"]["merges"]]


def write_vocabulary(writer: GGUFWriter, tokens, types, merges, eos: int = 2) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(eos)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)


def close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llama(
    path: Path,
    name: str,
    *,
    padding: int = 0,
    rename: dict[int, str] | None = None,
    types: dict[int, int] | None = None,
    eos: int = 2,
    template: str | None = None,
    poison: int | None = None,
    quantised: bool = False,
) -> Path:
    """The model ``name`` of the family.

    padding: rows of padding behind the vocabulary. rename, types: other texts and types of some ids. eos: what ends a
    text. template: of chats. poison: an id whose embedding is NaN. quantised: matrices in 8 bits.
    """
    folder = WEIGHTS / name
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    tokens, kinds, merges = vocabulary(folder)
    tokens += [f"[PAD{len(tokens) + i}]" for i in range(padding)]
    kinds += [TokenType.UNUSED] * padding
    for token, text in (rename or {}).items():
        tokens[token] = text
    for token, kind in (types or {}).items():
        kinds[token] = kind

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(len(tokens))
    write_vocabulary(writer, tokens, kinds, merges, eos)
    if template is not None:
        writer.add_chat_template(template)

    embedding = weights["model.embed_tokens.weight"]
    embedding = torch.cat([embedding, embedding.new_zeros(padding, embedding.shape[1])])
    if poison is not None:  # the output layer, which llama.cpp takes from the embedding, keeps its numbers
        writer.add_tensor("output.weight", embedding.numpy().copy())
        embedding[poison] = float("nan")
    writer.add_tensor("token_embd.weight", embedding.numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(config["num_hidden_layers"]):
        for theirs, ours in BLOCK.items():
            weight = weights[f"model.layers.{layer}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                weight = rotated(weight, config["num_attention_heads"])
            values, kind = np.ascontiguousarray(weight.numpy()), None
            if quantised and weight.dim() == 2:
                kind = GGMLQuantizationType.Q8_0
                values = quantize(values, kind)
            writer.add_tensor(f"blk.{layer}.{ours}.weight", values, raw_dtype=kind)
    close(writer)
    return path


def write_mamba(path: Path) -> Path:
    """A small random Mamba with the family's vocabulary: its state cannot go back."""
    width, inner, state, rank, kernel = 32, 64, 16, 2, 4
    tokens, types, merges = vocabulary(WEIGHTS / "ref")
    writer = GGUFWriter(path, "mamba")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_conv_kernel(kernel)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(state)
    writer.add_ssm_time_step_rank(rank)
    writer.add_file_type(0)
    write_vocabulary(writer, tokens, types, merges)
    random = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        values = random.standard_normal(shape).astype(np.float32) / 8
        writer.add_tensor(name, values, raw_dtype=GGMLQuantizationType.F32)

    tensor("token_embd.weight", len(tokens), width)
    tensor("output_norm.weight", width)
    tensor("blk.0.attn_norm.weight", width)
    tensor("blk.0.ssm_in.weight", 2 * inner, width)
    tensor("blk.0.ssm_conv1d.weight", inner, kernel)
    tensor("blk.0.ssm_conv1d.bias", inner)
    tensor("blk.0.ssm_x.weight", rank + 2 * state, inner)
    tensor("blk.0.ssm_dt.weight", inner, rank)
    tensor("blk.0.ssm_dt.bias", inner)
    writer.add_tensor("blk.0.ssm_a", -np.ones((inner, state), np.float32))
    tensor("blk.0.ssm_d", inner)
    tensor("blk.0.ssm_out.weight", width, inner)
    close(writer)
    return path


def write_gemma2(path: Path, seed: int, *, window: int = 16, bytes_too: bool = True) -> Path:
    """A small random Gemma 2: layers with a sliding window, a SentencePiece vocabulary with a token for each byte."""
    width, heads, size, layers = 32, 2, 16, 26  # llama.cpp knows a Gemma 2 by its layers
    letters = [chr(i) for i in range(33, 127)]
    words = ["▁", "▁the", "▁king", "th", "he", "the", "ki", "ng", "king"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>"] + [f"<0x{i:02X}>" for i in range(256) if bytes_too] + words + letters
    types = [TokenType.CONTROL] * 3 + [TokenType.UNKNOWN]
    types += [TokenType.BYTE] * (256 if bytes_too else 0) + [TokenType.NORMAL] * (len(words) + len(letters))
    writer = GGUFWriter(path, "gemma2")
    writer.add_block_count(layers)
    writer.add_context_length(1024)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(64)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_sliding_window(window)
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)
    writer.add_file_type(0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types(types)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    random = np.random.default_rng(seed)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32) / (4 if len(shape) > 1 else 1))

    tensor("token_embd.weight", len(tokens), width)
    tensor("output_norm.weight", width)
    for layer in range(layers):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            tensor(f"blk.{layer}.{name}.weight", width)
        tensor(f"blk.{layer}.attn_q.weight", heads * size, width)
        tensor(f"blk.{layer}.attn_k.weight", size, width)
        tensor(f"blk.{layer}.attn_v.weight", size, width)
        tensor(f"blk.{layer}.attn_output.weight", width, heads * size)
        tensor(f"blk.{layer}.ffn_gate.weight", 64, width)
        tensor(f"blk.{layer}.ffn_up.weight", 64, width)
        tensor(f"blk.{layer}.ffn_down.weight", width, 64)
    close(writer)
    return path
