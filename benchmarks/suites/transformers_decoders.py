"""Decoders of text: attention, mixtures of experts and state spaces; and encoder–decoders."""

from __future__ import annotations

from typing import Any

from benchmarks.suites.transformers_variants import (
    SIZES,
    SPECIAL,
    Inputs,
    Variant,
    both_sides,
    tokens,
    unmasked,
    without_cache,
)

_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "n_inner": 64}
_OPENAI = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
_GPT_NEO = {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 4, "num_heads": 4}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
_MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4}
_JAMBA = {**_EXPERTS, "num_experts": 4, "num_key_value_heads": 2, "mamba_d_state": 8, "mamba_dt_rank": 4,
          "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}  # fmt: skip
_BAMBA = {"num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4,
          "attn_layer_indices": [1, 3], "mamba_n_groups": 1}  # fmt: skip
_BLOCKS = {"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8}


def _decoder(architecture: str, tag: str = "", call: Inputs = tokens, **options: Any) -> Variant:
    return Variant(architecture, call, {**SIZES, **SPECIAL, **options}, tag)


DECODERS = [
    _decoder("GPT2LMHeadModel", **_GPT2),
    _decoder("GPT2LMHeadModel", "untied", tie_word_embeddings=False, **_GPT2),
    _decoder("GPT2ForSequenceClassification", **_GPT2),
    _decoder("GPT2Model", "eager", without_cache(tokens), attn_implementation="eager", **_GPT2),
    _decoder("OpenAIGPTLMHeadModel", **_OPENAI),
    _decoder("GPTNeoForCausalLM", **_GPT_NEO),
    _decoder("GPTNeoXForCausalLM"),
    _decoder("GPTJForCausalLM", rotary_dim=4, **_GPT2),
    _decoder("GPTBigCodeForCausalLM", **_GPT2),
    _decoder("CodeGenForCausalLM", call=without_cache(tokens), rotary_dim=4, **_OPENAI),
    _decoder("CTRLLMHeadModel", dff=64, **_OPENAI),
    _decoder("OPTForCausalLM", ffn_dim=64, word_embed_proj_dim=32),
    _decoder("OPTForSequenceClassification", ffn_dim=64, word_embed_proj_dim=32),
    _decoder("BloomForCausalLM", n_layer=4, n_head=4),
    _decoder("BloomForSequenceClassification", n_layer=4, n_head=4),
    _decoder("MptForCausalLM", d_model=32, n_layers=4, n_heads=4, max_seq_len=64),
    _decoder("BioGptForCausalLM"),
    _decoder("XGLMForCausalLM", d_model=32, num_layers=4, attention_heads=4, ffn_dim=64),
    _decoder("LlamaForCausalLM", num_key_value_heads=2),
    _decoder("LlamaForSequenceClassification", num_key_value_heads=2),
    _decoder("LlamaModel", "eager", without_cache(tokens), attn_implementation="eager"),
    _decoder("MistralForCausalLM", sliding_window=4, **_GROUPED),
    _decoder("MistralForSequenceClassification", **_GROUPED),
    _decoder("Qwen2ForCausalLM", num_key_value_heads=2),
    _decoder("Qwen2ForSequenceClassification", num_key_value_heads=2),
    _decoder("Qwen3ForCausalLM", **_GROUPED),
    _decoder("PhiForCausalLM", num_key_value_heads=2),
    _decoder("Phi3ForCausalLM", num_key_value_heads=2),
    _decoder("GemmaForCausalLM", **_GROUPED),
    _decoder("Gemma2ForCausalLM", sliding_window=4, **_GROUPED),
    _decoder("Gemma2ForSequenceClassification", "eager", attn_implementation="eager", **_GROUPED),
    _decoder("Gemma3ForCausalLM", sliding_window=4, **_GROUPED),
    _decoder("FalconForCausalLM"),
    _decoder("FalconForSequenceClassification", "alibi", alibi=True),
    _decoder("StableLmForCausalLM", num_key_value_heads=2),
    _decoder("Starcoder2ForCausalLM", num_key_value_heads=2),
    _decoder("PersimmonForCausalLM"),
    _decoder("NemotronForCausalLM", num_key_value_heads=2),
    _decoder("OlmoForCausalLM", num_key_value_heads=2),
    _decoder("Olmo2ForCausalLM", num_key_value_heads=2),
    _decoder("CohereForCausalLM", num_key_value_heads=2),
    _decoder("GraniteForCausalLM", num_key_value_heads=2),
    _decoder("HeliumForCausalLM", **_GROUPED),
    _decoder("SmolLM3ForCausalLM", num_key_value_heads=2),
]

EXPERTS = [
    _decoder("MixtralForCausalLM", num_key_value_heads=2, **_EXPERTS),
    _decoder("MixtralForSequenceClassification", num_key_value_heads=2, **_EXPERTS),
    _decoder("Qwen2MoeForCausalLM", num_key_value_heads=2, shared_expert_intermediate_size=32, **_MOE),
    _decoder("Qwen3MoeForCausalLM", **_GROUPED, **_MOE),
    _decoder("OlmoeForCausalLM", num_key_value_heads=2, num_experts=4, num_experts_per_tok=2),
    _decoder("GraniteMoeForCausalLM", num_key_value_heads=2, **_EXPERTS),
    _decoder("PhimoeForCausalLM", num_key_value_heads=2, **_EXPERTS),
    _decoder("GptOssForCausalLM", sliding_window=4, **_GROUPED, **_EXPERTS),
    _decoder("DeepseekV2ForCausalLM", **_DEEPSEEK),
    _decoder("DeepseekV3ForCausalLM", **_DEEPSEEK),
]

STATE_SPACES = [
    _decoder("MambaForCausalLM", call=unmasked, state_size=8),
    _decoder("MambaModel", state_size=8, use_cache=False),
    _decoder("Mamba2ForCausalLM", **_MAMBA2),
    _decoder("FalconMambaForCausalLM", call=unmasked, state_size=8),
    _decoder("RwkvForCausalLM", call=unmasked, attention_hidden_size=32, context_length=64, rescale_every=0),
    _decoder("RwkvForCausalLM", "rescaled", unmasked, attention_hidden_size=32, context_length=64),
    _decoder("JambaForCausalLM", **_JAMBA),
    _decoder("BambaForCausalLM", **_BAMBA),
    _decoder("RecurrentGemmaForCausalLM", **_BLOCKS),
]

_BART = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "decoder_start_token_id": 2, "forced_eos_token_id": 2, **SPECIAL,
}  # fmt: skip
_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
       "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "num_labels": 5}  # fmt: skip
_PROPHETNET = {"vocab_size": 99, "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "ngram": 2,
               "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64,
               "decoder_ffn_dim": 64, "max_position_embeddings": 64, **SPECIAL}  # fmt: skip


def _both(architecture: str, tag: str = "", call: Inputs = both_sides, **options: Any) -> Variant:
    return Variant(architecture, call, options, tag)


def _end_of_sentence(batch: int) -> dict[str, Any]:
    """BART classifies what stands at the one end-of-sentence token."""
    call = tokens(batch)
    call["input_ids"][:, 5] = 2
    return call


ENCODER_DECODERS = [
    _both("T5ForConditionalGeneration", **_T5),
    _both(
        "T5ForConditionalGeneration",
        "gated",
        without_cache(both_sides),
        feed_forward_proj="gated-gelu",
        **_T5,
    ),
    _both("MT5ForConditionalGeneration", **_T5),
    _both("UMT5ForConditionalGeneration", **_T5),
    _both("LongT5ForConditionalGeneration", local_radius=4, **_T5),
    _both("SwitchTransformersForConditionalGeneration", num_experts=4, expert_capacity=8, **_T5),
    _both("BartForConditionalGeneration", **_BART),
    _both("BartForConditionalGeneration", "untied", tie_word_embeddings=False, **_BART),
    _both("BartForSequenceClassification", call=_end_of_sentence, **_BART),
    _both("BartForCausalLM", "decoder", tokens, **_BART),
    _both("MBartForConditionalGeneration", **_BART),
    _both("PegasusForConditionalGeneration", **_BART),
    _both("PegasusXForConditionalGeneration", block_size=4, num_global_tokens=2, **_BART),
    _both("MarianMTModel", **_BART),
    _both("BlenderbotForConditionalGeneration", **_BART),
    _both("BlenderbotSmallForConditionalGeneration", **_BART),
    _both("PLBartForConditionalGeneration", **_BART),
    _both("M2M100ForConditionalGeneration", encoder_layerdrop=0.0, decoder_layerdrop=0.0, **_BART),
    _both("M2M100ForConditionalGeneration", "layerdrop", **_BART),
    _both(
        "LEDForConditionalGeneration",
        attention_window=4,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
        **_BART,
    ),
    _both("ProphetNetForConditionalGeneration", **_PROPHETNET),
    _both(
        "NllbMoeForConditionalGeneration",
        num_experts=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        **_BART,
    ),
]

VARIANTS = [*DECODERS, *EXPERTS, *STATE_SPACES, *ENCODER_DECODERS]
