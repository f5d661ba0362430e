"""Models of images, videos and sound, and of several of them at once."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.suites.transformers_variants import (
    CLASSES,
    SIZES,
    SPECIAL,
    Inputs,
    Variant,
    both_sides,
    features,
    image,
    sound,
    together,
    tokens,
    unmasked,
    video,
)

_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
_PATCHES = {**_BLOCKS, "image_size": 32, "patch_size": 8, "num_labels": CLASSES}
_STAGES = {"num_labels": CLASSES, "depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
_SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
         "num_labels": CLASSES}  # fmt: skip
_SEGFORMER = {"num_labels": CLASSES, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32],
              "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16}  # fmt: skip
_CVT = {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3],
        "drop_path_rate": [0.0, 0.0, 0.1], "num_labels": CLASSES}  # fmt: skip
_MOBILEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 32],
              "num_attention_heads": 4, "num_labels": CLASSES}  # fmt: skip
_LEVIT = {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
          "key_dim": [8, 8, 8], "num_labels": CLASSES}  # fmt: skip
_PVT = {"image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4],
        "num_labels": CLASSES}  # fmt: skip
_IMAGE = image()
_VIDEO = {**_PATCHES, "num_frames": 4}


def _seeing(architecture: str, tag: str = "", call: Inputs = _IMAGE, **options: Any) -> Variant:
    return Variant(architecture, call, options, tag)


IMAGES = [
    _seeing("ViTForImageClassification", **_PATCHES),
    _seeing("ViTModel", "eager", attn_implementation="eager", **_PATCHES),
    _seeing("DeiTForImageClassification", **_PATCHES),
    _seeing("DeiTForImageClassificationWithTeacher", "teacher", **_PATCHES),
    _seeing("BeitForImageClassification", **_PATCHES),
    _seeing("Data2VecVisionForImageClassification", use_relative_position_bias=True, **_PATCHES),
    _seeing("SwinForImageClassification", **_SWIN),
    _seeing("Swinv2ForImageClassification", **_SWIN),
    _seeing("ConvNextForImageClassification", **_STAGES),
    _seeing("ConvNextV2ForImageClassification", **_STAGES),
    _seeing("ResNetForImageClassification", embedding_size=8, **_STAGES),
    _seeing("RegNetForImageClassification", embedding_size=8, groups_width=8, **_STAGES),
    _seeing("BitForImageClassification", "", image(64), embedding_size=8, num_groups=4, **_STAGES),
    _seeing("SegformerForImageClassification", "", image(64), **_SEGFORMER),
    _seeing("SegformerForSemanticSegmentation", "", image(64), **_SEGFORMER),
    _seeing("Dinov2ForImageClassification", **_PATCHES),
    _seeing("Dinov2WithRegistersForImageClassification", **_PATCHES),
    _seeing("PoolFormerForImageClassification", "", image(64), **_STAGES),
    _seeing("MobileViTForImageClassification", "", image(64), **_MOBILEVIT),
    _seeing("MobileViTV2ForImageClassification", "", image(64), image_size=64, num_labels=CLASSES),
    _seeing("MobileNetV1ForImageClassification", depth_multiplier=0.25, min_depth=4, num_labels=CLASSES),
    _seeing("MobileNetV2ForImageClassification", depth_multiplier=0.25, min_depth=4, num_labels=CLASSES),
    _seeing(
        "EfficientNetForImageClassification",
        "",
        image(64),
        width_coefficient=0.25,
        depth_coefficient=0.3,
        hidden_dim=320,
        num_labels=CLASSES,
    ),
    _seeing("LevitForImageClassification", "", image(64), **_LEVIT),
    _seeing("CvtForImageClassification", "", image(64), **_CVT),
    _seeing("PvtForImageClassification", "", image(64), **_PVT),
    _seeing(
        "FocalNetForImageClassification", embed_dim=8, depths=[1, 1, 2, 1], num_labels=CLASSES, image_size=32
    ),
    _seeing(
        "SwiftFormerForImageClassification",
        "",
        image(64),
        depths=[1, 1, 1, 1],
        embed_dims=[8, 16, 24, 32],
        num_labels=CLASSES,
    ),
    _seeing("ViTMSNForImageClassification", **_PATCHES),
    _seeing("ViTMAEModel", **_PATCHES),
    _seeing("VideoMAEForVideoClassification", "", video(4, 32), **_VIDEO),
    _seeing("TimesformerForVideoClassification", "", video(4, 32), **_VIDEO),
    _seeing("YolosModel", num_detection_tokens=4, **{**_PATCHES, "image_size": [32, 32]}),
]

_WAVE = {
    **_BLOCKS, "vocab_size": 32, "conv_dim": [16, 16, 32], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_labels": CLASSES,
    "classifier_proj_size": 16,
}  # fmt: skip
_STILL = {"layerdrop": 0.0, "apply_spec_augment": False}
_WHISPER = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 16,
    "max_source_positions": 20, "max_target_positions": 64, "decoder_start_token_id": 1, "classifier_proj_size": 16,
    "suppress_tokens": [], "begin_suppress_tokens": [], **SPECIAL,
}  # fmt: skip
_MEL = together(
    features("input_features", 16, 40), lambda n: {"decoder_input_ids": both_sides(n)["decoder_input_ids"]}
)
_S2T = {
    "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "input_feat_per_channel": 16,
    "conv_channels": 32, "max_source_positions": 64, "max_target_positions": 64, **SPECIAL,
}  # fmt: skip
_SPEECH = together(
    features("input_features", 40, 16), lambda n: {"decoder_input_ids": both_sides(n)["decoder_input_ids"]}
)

SOUNDS = [
    _seeing("Wav2Vec2ForSequenceClassification", "", sound(mask=True), **_WAVE, **_STILL),
    _seeing("Wav2Vec2ForSequenceClassification", "spec_augment", sound(), **_WAVE),
    _seeing(
        "Wav2Vec2Model",
        "stable",
        sound(),
        **{**_WAVE, **_STILL},
        do_stable_layer_norm=True,
        feat_extract_norm="layer",
    ),
    _seeing("HubertForSequenceClassification", "", sound(), **_WAVE, **_STILL),
    _seeing("HubertForCTC", "layerdrop", sound(), **_WAVE),
    _seeing("WavLMForSequenceClassification", "", sound(mask=True), **_WAVE, **_STILL),
    _seeing("UniSpeechForSequenceClassification", "", sound(), **_WAVE, **_STILL),
    _seeing("SEWForSequenceClassification", "", sound(), squeeze_factor=2, **_WAVE, **_STILL),
    _seeing("Data2VecAudioForSequenceClassification", "", sound(), **_WAVE, **_STILL),
    _seeing("WhisperForConditionalGeneration", "", _MEL, **_WHISPER),
    _seeing("WhisperForAudioClassification", "", features("input_features", 16, 40), **_WHISPER),
    _seeing(
        "ASTForAudioClassification",
        "",
        features("input_values", 32, 16),
        patch_size=4,
        max_length=32,
        num_mel_bins=16,
        frequency_stride=4,
        time_stride=4,
        **_BLOCKS,
        num_labels=CLASSES,
    ),
    _seeing("Speech2TextForConditionalGeneration", "", _SPEECH, **_S2T),
    _seeing(
        "EncodecModel",
        "",
        features("input_values", 1, 640),
        num_filters=4,
        hidden_size=16,
        codebook_size=16,
        codebook_dim=16,
        upsampling_ratios=[4, 2],
    ),
]

_TEXT = {**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EYES = {**_BLOCKS, "image_size": 32, "patch_size": 8}
_PAIR = {"text_config": {**_TEXT, "projection_dim": 16}, "vision_config": {**_EYES, "projection_dim": 16}}
_LLAVA = {"text_config": "LlamaConfig", "vision_config": "CLIPVisionConfig"}


def _image_tokens(batch: int) -> dict[str, Any]:
    """Text in which the image's 16 patches take the place of a marker."""
    ids = torch.randint(3, 90, (batch, 24))
    ids[:, 2:18] = 98
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **image()(batch)}


SEVERAL = [
    _seeing("CLIPModel", "", together(tokens, image()), projection_dim=16, **_PAIR),
    _seeing("CLIPForImageClassification", "", image(), num_labels=CLASSES, **_PAIR),
    _seeing("CLIPTextModel", "text", tokens, **_TEXT),
    _seeing("SiglipModel", "", together(unmasked, image()), **_PAIR),
    _seeing("SiglipForImageClassification", "", image(), num_labels=CLASSES, **_PAIR),
    _seeing(
        "AltCLIPModel",
        "",
        together(tokens, image()),
        projection_dim=16,
        **{**_PAIR, "text_config": {**_PAIR["text_config"], "project_dim": 16}},
    ),
    _seeing("ChineseCLIPModel", "", together(tokens, image()), projection_dim=16, **_PAIR),
    _seeing(
        "BlipForConditionalGeneration",
        "",
        together(image(), tokens),
        projection_dim=16,
        **{**_PAIR, "text_config": {**_TEXT, "encoder_hidden_size": 32}},
    ),
    _seeing("BlipModel", "", together(tokens, image()), projection_dim=16, **_PAIR),
    _seeing("ViltModel", "", together(tokens, image()), **_TEXT, image_size=32, patch_size=8),
    _seeing("GitForCausalLM", "", tokens, **_TEXT, vision_config=_EYES),
    _seeing(
        "VisualBertModel",
        "",
        together(tokens, features("visual_embeds", 4, 16)),
        visual_embedding_dim=16,
        **_TEXT,
    ),
    Variant(
        "LlavaForConditionalGeneration",
        _image_tokens,
        {
            "text_config": {**_TEXT},
            "vision_config": _EYES,
            "image_token_index": 98,
            "image_seq_length": 16,
            "vision_feature_layer": -1,
        },
        parts_of_config=_LLAVA,
    ),
]

VARIANTS = [*IMAGES, *SOUNDS, *SEVERAL]
