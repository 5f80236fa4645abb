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
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
"""What else a kind needs to be built tiny."""
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
AROUND: dict[str, dict[str, Any]] = {"gemma3": {"vision_config": VISION, "mm_tokens_per_image": 4}, "git": {"vision_config": VISION}}
"""What is beside the text's config."""


def has(config: Any, name: str) -> bool:
    """Whether a config knows a field, also one that its layers have of their own."""
    try:
        return hasattr(config, name)
    except Exception:
        return True


def config_of(kind: str, **fields: Any) -> Any:
    """A tiny config; fields that a kind refuses are left as they are."""
    make = CONFIG_MAPPING[kind]
    whole = make()
    text = whole.get_text_config()
    wanted = {name: value for name, value in FIELDS.items() if has(text, name)} | SPECIAL.get(kind, {}) | fields
    inner = next((name for name, value in vars(whole).items() if value is text), None)
    around = AROUND.get(kind, {})
    while True:
        try:
            return make(**wanted, **around) if text is whole or inner is None else make(**{inner: wanted}, **around)
        except Exception as error:
            refused = [name for name in re.findall(r"'(\w+)'", str(error)) if name in wanted]
            if not refused:
                raise
            del wanted[refused[0]]


def build(kind: str, **fields: Any) -> Any:
    """A model, the same every time. Raises whatever transformers raises where a tiny one cannot be made, and MemoryError where it is not tiny."""
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
