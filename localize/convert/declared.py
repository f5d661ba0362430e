"""What models say of their own inputs: Lightning, timm, torchvision and transformers each have a place for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from localize.convert.first_layer import BATCH

_LENGTH = 16  # tokens
_DECODER_LENGTH = 12  # another: the tokens of an encoder are not those that are predicted
_SECOND = 16000  # samples of sound
_GENERATOR_SEED = 0
_COMPANIONS: tuple[tuple[str, ...], ...] = ((), ("decoder_input_ids",), ("pixel_values",), ("input_ids",))
"""What a model of transformers may need beside its main input, the fewest first."""


@dataclass(frozen=True)
class Declared:
    """Example inputs and where they come from. ``certain``: the model's author gave them, not to be doubted."""

    inputs: Any
    origin: str
    certain: bool = False


def declared(model: nn.Module) -> Iterator[Declared]:
    """What ``model`` says of its inputs, the most reliable first; empty for a model that says nothing."""
    yield from _lightning(model)
    yield from _timm(model)
    yield from _torchvision(model)
    yield from _transformers(model)


def _lightning(model: nn.Module) -> Iterator[Declared]:
    array = getattr(model, "example_input_array", None)
    if array is not None:
        yield Declared(_batched(model, array), "example_input_array", certain=True)


def _batched(model: nn.Module, array: Any) -> Any:
    """``array`` with its one sample twice where the model normalises over the batch, which needs two."""
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    values = list(array.values()) if isinstance(array, Mapping) else array if isinstance(array, tuple) else [array]
    if not norms or not all(isinstance(v, Tensor) and v.dim() and v.shape[0] == 1 for v in values):
        return array
    if isinstance(array, Mapping):
        return {name: torch.cat([value] * BATCH) for name, value in array.items()}
    twice = tuple(torch.cat([value] * BATCH) for value in values)
    return twice if isinstance(array, tuple) else twice[0]


# ---------------------------------------------------------------- images


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(_GENERATOR_SEED))


def _timm(model: nn.Module) -> Iterator[Declared]:
    """The size it was configured for; a model may have been made for another one, or for other channels."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        if not isinstance(config, Mapping) or not config.get("input_size"):
            continue
        declared_size = config["input_size"]
        own = getattr(getattr(model, "patch_embed", None), "img_size", None)
        sizes = [tuple(own)] if isinstance(own, Sequence) else [own, own] if isinstance(own, int) else []
        for size in dict.fromkeys([*sizes, tuple(declared_size[1:])]):
            for channels in dict.fromkeys([_channels(model, config.get("first_conv")), declared_size[0]]):
                if channels:
                    yield Declared(_noise(BATCH, channels, *size), attribute)
        return


def _channels(model: nn.Module, first: Any) -> int | None:
    """Channels of the images that a model takes: those of its first convolution, named ``first`` if known."""
    names = [first] if isinstance(first, str) else list(first or ())
    modules = dict(model.named_modules())
    found = [modules[name] for name in names if name in modules] or modules.values()
    return next((m.in_channels for m in found if isinstance(m, nn.modules.conv._ConvNd)), None)


def _torchvision(model: nn.Module) -> Iterator[Declared]:
    """Sizes that the documentation of torchvision names; the clips those of its video models."""
    _, _, family = type(model).__module__.partition("torchvision.models.")
    if not family or family.startswith("detection."):
        return
    channels = _channels(model, None) or 3
    if family.startswith("optical_flow."):
        images = _noise(BATCH, channels, 128, 128)
        yield Declared((images, images.flip(0)), "torchvision's size for optical flow")
        return
    if family.startswith("video."):
        for size in (112, 224):
            yield Declared(_noise(BATCH, channels, 16, size, size), "torchvision's size for clips")
        return
    own = getattr(model, "image_size", None)
    size = own if isinstance(own, int) else 299 if family == "inception" else 224
    yield Declared(_noise(BATCH, channels, size, size), "torchvision's size for images")


# ---------------------------------------------------------------- transformers


def _transformers(model: nn.Module) -> Iterator[Declared]:
    """The fewest inputs that a model of transformers takes, from its configuration; its ``dummy_inputs`` last.

    Few, since every later call has to pass the same ones.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        return
    names = getattr(model, "main_input_name", None) or "input_ids"
    main = [names] if isinstance(names, str) else list(names)
    configs = _parts_of(config)
    for values in _by_name(main[0], configs):
        for extra in _COMPANIONS:
            found = {name: next(_by_name(name, configs), None) for name in extra if name != main[0]}
            if len(found) == len(extra) and all(value is not None for value in found.values()):
                yield Declared({main[0]: values} | found, f"the configuration ({config.model_type})")
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        yield Declared(dict(dummy), "dummy_inputs")


def _parts_of(config: Any) -> list[Any]:
    """The configuration and those nested in it, for text first."""
    nested = [v for k, v in sorted(vars(config).items(), reverse=True) if hasattr(v, "model_type")]
    return [config, *nested]


def _setting(configs: Sequence[Any], *names: str) -> Any:
    """The first of these settings that one of the configurations has."""
    for name in names:
        for config in configs:
            value = getattr(config, name, None)
            if value is not None:
                return value
    return None


def _by_name(name: str, configs: Sequence[Any]) -> Iterator[Tensor]:
    """Values for a forward's argument of this name, as transformers calls them."""
    match name:
        case "input_ids":
            yield _ids(configs, _LENGTH)
        case "decoder_input_ids":
            yield _ids(configs, _DECODER_LENGTH)
        case "pixel_values":
            yield from _pixels(configs)
        case "pixel_values_videos":
            yield from _clips(configs)
        case "input_values":
            bins = _setting(configs, "num_mel_bins")
            if bins:
                yield _noise(BATCH, _setting(configs, "max_length") or 1024, bins)
            yield _noise(BATCH, _SECOND)
        case "input_features":
            yield from _sounds(configs)
        case "past_values":
            length, channels = _setting(configs, "context_length"), _setting(configs, "num_input_channels")
            if length:
                yield _noise(BATCH, length, channels or 1)
        case "inputs" if _setting(configs, "d_model"):
            yield _noise(BATCH, _LENGTH, _setting(configs, "d_model"))


def _ids(configs: Sequence[Any], wanted: int) -> Tensor:
    """Token ids (N, T): all different where the vocabulary is large enough, none of them the padding, and the end
    of the text at the end."""
    vocabulary = int(_setting(configs, "vocab_size") or 100)
    longest = _setting(configs, "max_position_embeddings", "n_positions")
    length = min(wanted, longest) if isinstance(longest, int) and longest > 2 else wanted
    special = {_setting(configs, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    plain = [i for i in range(min(vocabulary, 4 * _LENGTH)) if i not in special] or [0]
    ids = torch.tensor([plain[i % len(plain)] for i in range(BATCH * length)]).view(BATCH, length)
    end = _setting(configs, "eos_token_id")
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[:, -1] = end
    return ids


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2 and all(isinstance(s, int) for s in size):
        return size[0], size[1]
    return None


def _pixels(configs: Sequence[Any]) -> Iterator[Tensor]:
    """Images (N, C, H, W), or clips (N, T, C, H, W) where the configuration has frames."""
    if _setting(configs, "num_frames"):
        yield from _clips(configs)
    channels = _setting(configs, "num_channels", "in_channels", "in_chans") or 3
    own = _pair(_setting(configs, "image_size", "img_size", "input_size"))
    for size in dict.fromkeys([own, (224, 224)]):
        if size is not None and isinstance(channels, int):
            yield _noise(BATCH, channels, *size)


def _clips(configs: Sequence[Any]) -> Iterator[Tensor]:
    frames = _setting(configs, "num_frames", "frames_per_clip", "tubelet_size")
    size = _pair(_setting(configs, "image_size", "img_size", "crop_size")) or (224, 224)
    if isinstance(frames, int):
        yield _noise(BATCH, frames, _setting(configs, "num_channels", "in_chans") or 3, *size)


def _sounds(configs: Sequence[Any]) -> Iterator[Tensor]:
    """Spectra: (N, bins, T) as Whisper takes them, of its one length, and (N, T, bins)."""
    bins = _setting(configs, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim")
    if not isinstance(bins, int):
        return
    positions = _setting(configs, "max_source_positions")
    if isinstance(positions, int):
        yield _noise(BATCH, bins, 2 * positions)
    yield _noise(BATCH, 128, bins)
