"""A tiny model of every causal LM that transformers can build, with sharp random weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

VOCABULARY, POSITIONS, WINDOW = 96, 128, 8
MOST = 10**7  # parameters of a tiny model
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "max_position_embeddings": POSITIONS, "n_positions": POSITIONS,
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "word_embed_proj_dim": 64, "intermediate_size": 96, "ffn_dim": 96,
    "num_hidden_layers": 4, "n_layer": 4, "num_layers": 4, "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "kv_channels": 16, "rotary_dim": 8, "partial_rotary_factor": 0.5, "sliding_window": WINDOW, "attention_chunk_size": WINDOW,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False, "is_decoder": True,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "qk_head_dim": 24,
    "v_head_dim": 16, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "index_topk": 8, "mamba_d_state": 8,
    "mamba_chunk_size": 16, "chunk_size": 16, "ssm_state_size": 8,
    "decoder_layers": 2, "encoder_layers": 2, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
LATENT = {"head_dim": 8, "num_key_value_heads": 4}  # MLA: the rotary part is a head's
GEMMA_4 = {"global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
ASSISTANT = GEMMA_4 | {"num_kv_shared_layers": 4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
LEAVE = object()  # a field of FIELDS that a kind must be left to fill itself
ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
DOTS = {
    "num_key_value_heads": 4, "index_n_heads": 4, "index_head_dim": 16, "head_dim": 24, "shared_experts_intermediate_size": 32,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 24, "swa_kv_lora_rank": 24, "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16,
}
QWEN_4 = {
    "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
}
PADDED = {"pad_token_id": 1, "max_position_embeddings": POSITIONS + 2}  # positions begin behind the padding token's
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), GEMMA_4),
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"), PADDED),
    "emu3": {"pad_token_id": 0},
    "modernbert-decoder": {"pad_token_id": 0},
    **dict.fromkeys(("gemma4", "gemma4_unified"), GEMMA_4 | {"pad_token_id": 0}),
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"axial_pos_embds": False},
    **dict.fromkeys(("dots3_note", "dots3_note_text"), DOTS),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), ASSISTANT),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), QWEN_4),
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "rope_parameters": ROPES},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 96, "moe_top_k": 2}},
    "phi4_multimodal": {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1},
    "prophetnet": {"num_hidden_layers": LEAVE, "num_encoder_layers": 2, "num_decoder_layers": 2, "is_decoder": True},
    "roc_bert": {"pronunciation_vocab_size": 16, "shape_vocab_size": 16, "pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "xlnet": {"max_position_embeddings": LEAVE, "d_inner": 96},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "n_mamba_heads": 8, "adapter_rank": 8},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
"""What else a kind needs to be built tiny."""
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
AUDIO = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
BYTES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
AROUND: dict[str, dict[str, Any]] = {
    "gemma3": {"vision_config": VISION, "mm_tokens_per_image": 4},
    "git": {"vision_config": VISION},
    "blt": {
        **dict.fromkeys(("encoder_config", "decoder_config"), BYTES | {"hidden_size_global": 64}), "global_config": BYTES, "patcher_config": BYTES,
        "encoder_hash_byte_group_vocab": 50,
    },
    "dots3_note": {
        "vision_config": VISION | {"adapter_in_dim": 32, "adapter_out_dim": 64, "mlp_layer_types": ["dense"], "moe_intermediate_size": 32},
        "audio_config": AUDIO | {"adapter_input_size": 32, "adapter_out_dim": 64, "downsample_hidden_size": 8},
    },
    "gemma4_assistant": {"text_config": ASSISTANT | {"num_hidden_layers": 4}},
    "got_ocr2": {"vision_config": VISION | {"output_channels": 8, "mlp_dim": 32}},
    "moss_transcribe_diarize": {"audio_config": AUDIO},
    "phi4_multimodal": {
        "vision_config": VISION,
        "audio_config": {
            "hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2, "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32, "nemo_conv_channels": 32,
        },
    },
}  # fmt: skip
"""What is beside the text's config."""
DEFAULTLESS = ("gemma4_assistant",)  # their config without any field is refused by their own check
UNBUILDABLE = {
    "gemma3n": "requires the timm library|has .* parameters",  # its vision tower, of timm's own size; gemma3n_text is its text
    "gemma4_assistant": "different than the set of layer types using them",  # shares the keys of another model in all its layers
    "gemma4_unified_assistant": "different than the set of layer types using them",
    "musicgen": "Multiple valid text configs",  # codebooks of sound, below a text encoder
    "musicgen_melody": "Multiple valid text configs",
}
"""What transformers itself cannot build tiny or alone, and what it says."""


def has(config: Any, name: str) -> bool:
    """Whether a config knows a field, also one that its layers have of their own."""
    try:
        return hasattr(config, name)
    except Exception:
        return True


def config_of(kind: str, **fields: Any) -> Any:
    """A tiny config; fields that a kind refuses are left as they are."""
    make = CONFIG_MAPPING[kind]
    around = AROUND.get(kind, {})
    whole = make(**around) if kind in DEFAULTLESS else make()
    text = whole.get_text_config()
    wanted = {name: value for name, value in FIELDS.items() if has(text, name)} | SPECIAL.get(kind, {}) | fields
    for name in [name for name, value in wanted.items() if value is LEAVE]:
        del wanted[name]
    inner = next((name for name, value in vars(whole).items() if value is text), None)
    while True:
        try:
            return make(**around, **wanted) if text is whole or inner is None else make(**around | {inner: wanted})
        except Exception as error:
            refused = [name for name in re.findall(r"'(\w+)'", str(error)) if name in wanted]
            if not refused:
                raise
            del wanted[refused[0]]


def build(kind: str, **fields: Any) -> Any:
    """A model, the same every time. Raises whatever transformers raises where one cannot be made, and MemoryError where it is not tiny."""
    logging.set_verbosity_error()
    config = config_of(kind, **fields)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST:
        raise MemoryError(f"{kind} has {size:.1e} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model
