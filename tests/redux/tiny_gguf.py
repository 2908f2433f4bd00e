"""A GGUF file of a tiny LLaMA with weights of 4 bits, a tokenizer of a few words and a chat template."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KEY_HEADS = 4, 2
TOKENS = ["<unk>", "<s>", "</s>", "<|endoftext|>", "y", "e", "s", "n", "o", "Ġ", "?", "ye", "yes", "no"]
MERGES = ["y e", "ye s", "n o"]
CONTROL, NORMAL = 3, 1  # Types of tokens
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""Names of tensors in llama.cpp, by those of transformers; its layers are blk.0, blk.1, …"""


def write_tiny_gguf(path: Path) -> None:
    """Write the file; its embeddings are tied."""
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
        intermediate_size=96, vocab_size=len(TOKENS), max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    writer = GGUFWriter(path, "llama")
    _add_metadata(writer, config)
    for name, weight in LlamaForCausalLM(config).named_parameters():
        *layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        if name.startswith("model.layers."):
            stored_name = f"blk.{layer[0]}.{NAMES[part]}.weight"
        else:
            stored_name = f"{NAMES[name.removesuffix('.weight')]}.weight"
        array = _permute(weight.detach().numpy(), {"q_proj": HEADS, "k_proj": KEY_HEADS}.get(part.split(".")[-1]))
        if array.ndim == 1:
            writer.add_tensor(stored_name, array)
        else:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(stored_name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: GGUFWriter, config: LlamaConfig) -> None:
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([CONTROL] * 4 + [NORMAL] * (len(TOKENS) - 4))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for turn in messages %}{{ turn['content'] }}{% endfor %}")


def _permute(weight: np.ndarray, heads: int | None) -> np.ndarray:
    """Order the rows of queries or keys as llama.cpp's rotary embedding does."""
    if heads is None:
        return weight
    pairs = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))
