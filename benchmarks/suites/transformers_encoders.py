"""Encoders of text."""

from __future__ import annotations

from typing import Any

from benchmarks.suites.transformers_variants import (
    SIZES,
    SPECIAL,
    Inputs,
    Variant,
    long_tokens,
    tokens,
    unmasked,
)


def _encoder(architecture: str, tag: str = "", call: Inputs = tokens, **options: Any) -> Variant:
    return Variant(architecture, call, {**SIZES, **SPECIAL, **options}, tag)


_DISTILBERT = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "hidden_size": None}
_FUNNEL = {
    "block_sizes": [2, 2],
    "d_model": 32,
    "n_head": 4,
    "d_head": 8,
    "d_inner": 64,
    "num_hidden_layers": None,
}
_XLNET = {"d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 64, "max_position_embeddings": None}
_XLM = {"emb_dim": 32, "n_layers": 4, "n_heads": 4}
_PERCEIVER = {
    "num_latents": 8, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 3,
    "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "max_position_embeddings": 32,
}  # fmt: skip


def _without_none(variant: Variant) -> Variant:
    options = {name: value for name, value in variant.options.items() if value is not None}
    return Variant(variant.architecture, variant.inputs, options, variant.tag)


VARIANTS = [
    _encoder("BertForSequenceClassification"),
    _encoder("BertForMaskedLM"),
    _encoder("BertForMaskedLM", "untied", tie_word_embeddings=False),
    _encoder("BertModel", "eager", attn_implementation="eager"),
    _encoder("BertLMHeadModel", "decoder", is_decoder=True),
    _encoder("RobertaForSequenceClassification"),
    _encoder("RobertaForMaskedLM", "eager", attn_implementation="eager"),
    _encoder("RobertaPreLayerNormForSequenceClassification"),
    _encoder("XLMRobertaForSequenceClassification"),
    _encoder("CamembertForMaskedLM"),
    _encoder("AlbertForSequenceClassification", embedding_size=16),
    _encoder("AlbertForMaskedLM", embedding_size=16, num_hidden_groups=2),
    _without_none(_encoder("DistilBertForSequenceClassification", **_DISTILBERT)),
    _without_none(_encoder("DistilBertForMaskedLM", **_DISTILBERT)),
    _encoder("ElectraForSequenceClassification", embedding_size=16),
    _encoder("ElectraForMaskedLM", embedding_size=16),
    _encoder("DebertaForSequenceClassification", relative_attention=True, pos_att_type="c2p|p2c"),
    _encoder("DebertaV2ForSequenceClassification"),
    _encoder(
        "DebertaV2ForMaskedLM",
        "relative",
        relative_attention=True,
        pos_att_type="c2p|p2c",
        share_att_key=True,
    ),
    _encoder("MPNetForSequenceClassification"),
    _encoder("MPNetForMaskedLM"),
    _encoder("ModernBertForSequenceClassification", cls_token_id=1, sep_token_id=2),
    _encoder("ModernBertForMaskedLM", cls_token_id=1, sep_token_id=2, local_attention=8),
    _without_none(_encoder("FunnelForSequenceClassification", **_FUNNEL)),
    _encoder("LongformerForSequenceClassification", call=long_tokens, attention_window=8),
    _encoder("LongformerForMaskedLM", attention_window=8),
    _encoder("BigBirdForSequenceClassification", block_size=4, num_random_blocks=1),
    _encoder("BigBirdForMaskedLM", "full", attention_type="original_full"),
    _encoder("SqueezeBertForSequenceClassification", embedding_size=32),
    _encoder("ConvBertForSequenceClassification", embedding_size=16, conv_kernel_size=3),
    _encoder("MobileBertForSequenceClassification", embedding_size=16, intra_bottleneck_size=16),
    _encoder("FNetForSequenceClassification", call=unmasked),
    _encoder("NystromformerForSequenceClassification", num_landmarks=10, segment_means_seq_len=10),
    _encoder("RoFormerForSequenceClassification", embedding_size=16),
    _encoder("ErnieForSequenceClassification"),
    _encoder("RemBertForSequenceClassification", input_embedding_size=16, output_embedding_size=16),
    _encoder("MegatronBertForSequenceClassification"),
    _encoder("Data2VecTextForSequenceClassification"),
    _encoder("EsmForSequenceClassification", position_embedding_type="rotary", mask_token_id=3),
    _encoder("LayoutLMForSequenceClassification", max_2d_position_embeddings=64),
    _encoder("IBertForSequenceClassification"),
    _encoder("XmodForSequenceClassification", languages=["en"], default_language="en"),
    _encoder("XLMForSequenceClassification", **_XLM),
    _without_none(_encoder("XLNetForSequenceClassification", **_XLNET)),
    _encoder(
        "CanineForSequenceClassification", call=long_tokens, local_transformer_stride=8, num_hash_buckets=64
    ),
    _encoder("PerceiverForSequenceClassification", **_PERCEIVER),
    _encoder(
        "LiltForSequenceClassification", hidden_size=48, channel_shrink_ratio=2, max_2d_position_embeddings=64
    ),
]
