"""Models of other libraries by name: torchvision, timm, transformers. Each is imported when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from localize.errors import ConfigError, did_you_mean

_EXTRAS = {"torchvision": "vision", "timm": "timm", "transformers": "text"}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} is not installed ({error}); `pip install 'localize-torch[{_EXTRAS[name]}]'`."
        ) from error


def _construct(name: str, build: Callable[[], Any], known: list[str]) -> nn.Module:
    """Calls ``build``; its errors become one ConfigError, with a proposal when the name is unknown."""
    if bare(name) not in known:
        library = name.partition(":")[0]
        raise ConfigError(
            f"Unknown model {name!r}.{did_you_mean(bare(name), known)} {library} has {len(known)} models; "
            "its documentation lists them."
        )
    try:
        model = build()
    except ConfigError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())  # on one line
        raise ConfigError(f"{name} cannot be built: {type(error).__name__}: {message}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} gave a {type(model).__name__}, not an nn.Module.")
    return model


def bare(name: str) -> str:
    """The model's name without its library."""
    return name.partition(":")[2]


def from_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    """``torchvision:resnet18?num_classes=10``; weights are random unless ``?weights=DEFAULT``."""
    models = importlib.import_module(f"{_library('torchvision').__name__}.models")
    return _construct(
        f"torchvision:{name}",
        lambda: models.get_model(name, **({"weights": None} | options)),
        models.list_models(),
    )


def from_timm(name: str, options: dict[str, Any]) -> nn.Module:
    """``timm:vit_tiny_patch16_224?num_classes=10``; weights are random unless ``?pretrained=true``."""
    timm = _library("timm")
    return _construct(f"timm:{name}", lambda: timm.create_model(name, **options), timm.list_models())


def from_transformers(name: str, options: dict[str, Any]) -> nn.Module:
    """``transformers:bert?num_hidden_layers=4``: a model type with random weights; options are its config's.

    ``?head=causal_lm`` (or ``sequence_classification``, ``image_classification``, ``masked_lm``, ``model``)
    says what the model is for. Default: the next token for decoders, a class for others, else the bare model.
    """
    library = _library("transformers")
    options = dict(options)
    wanted = options.pop("head", None)
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    known = list(importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES)
    factory = _auto_class(auto, name, wanted)

    def build() -> Any:
        default = library.AutoConfig.for_model(name)
        for option in options:
            if not hasattr(default, option):  # transformers would keep it, and nobody would read it
                known = [key for key in vars(default) if not key.startswith("_")]
                raise ConfigError(f"{name} has no option {option!r}.{did_you_mean(option, known)}")
        config = library.AutoConfig.for_model(name, **options)
        return getattr(library, factory).from_config(config)

    return _construct(f"transformers:{name}", build, known)


def _auto_class(auto: Any, model_type: str, wanted: str | None) -> str:
    heads = {
        "causal_lm": ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "sequence_classification": (
            "AutoModelForSequenceClassification",
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ),
        "image_classification": (
            "AutoModelForImageClassification",
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        ),
        "masked_lm": ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        "model": ("AutoModel", {}),
    }
    if wanted is not None:
        if wanted not in heads:
            raise ConfigError(
                f"Unknown head {wanted!r}.{did_you_mean(str(wanted), heads)} Heads: {', '.join(heads)}."
            )
        return heads[wanted][0]
    encoder = model_type in heads["masked_lm"][1]
    if model_type in heads["causal_lm"][1] and not encoder:
        return "AutoModelForCausalLM"
    for head in ("sequence_classification", "image_classification"):
        if model_type in heads[head][1]:
            return heads[head][0]
    return "AutoModel"


LIBRARIES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": from_torchvision,
    "timm": from_timm,
    "transformers": from_transformers,
}
