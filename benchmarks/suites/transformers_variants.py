"""What the tables of transformers models are made of: an architecture, a tiny config and a call.

Shape legend: ``N`` batch, ``T`` tokens or time steps, ``C H W`` channels and space.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.suites import Case

BATCH, LENGTH, VOCABULARY, CLASSES = 2, 10, 99, 5
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": CLASSES}
_HEADS = {
    "Classification": "classification",
    "CausalLM": "lm",
    "LMHeadModel": "lm",
    "MaskedLM": "lm",
    "PreTraining": "lm",
    "ConditionalGeneration": "lm",
    "MTModel": "lm",
    "CTC": "ctc",
    "SemanticSegmentation": "segmentation",
}

Inputs = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class Variant:
    """One row: a class of ``transformers`` on a tiny config, with what it is called on."""

    architecture: str
    inputs: Inputs  # batch size → keyword arguments of the forward
    options: dict[str, Any] = field(default_factory=dict)  # of the config
    tag: str = ""  # tells variants of one family and head apart
    family: str = ""  # "": the config's own model type
    parts_of_config: dict[str, str] = field(default_factory=dict)  # option → config class that takes its dict
    refused: str | None = None

    @property
    def config_class(self) -> Any:
        return getattr(transformers, self.architecture).config_class

    @property
    def head(self) -> str:
        """``classification``, ``lm``, ``ctc`` or ``base``."""
        return next((head for end, head in _HEADS.items() if self.architecture.endswith(end)), "base")

    @property
    def name(self) -> str:
        family = self.family or self.config_class.model_type
        return "-".join(filter(None, (family, self.head, self.tag)))

    def build(self) -> Case:
        """The case: weights, inputs and target of one seed."""
        torch.manual_seed(0)
        options = dict(self.options)
        for option, kind in self.parts_of_config.items():
            options[option] = getattr(transformers, kind)(**options[option])
        attention = options.pop("attn_implementation", None)
        config = self.config_class(**options)
        if attention is not None:
            config._attn_implementation = attention
        model: nn.Module = getattr(transformers, self.architecture)(config)
        inputs = self.inputs(BATCH)
        if self.head == "classification":
            target, task = torch.randint(0, CLASSES, (BATCH,)), "classification"
        elif self.head == "lm":
            tokens = inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["input_ids"]
            target, task = torch.randint(0, VOCABULARY, tuple(tokens.shape)), "causal_lm"
        else:
            return Case(model.train(), inputs, loss=mean_square, refused=self.refused)
        return Case(model.train(), inputs, target, task, refused=self.refused)


def mean_square(output: Any, target: Any = None) -> Tensor:
    """A loss for outputs that have no task: the mean square of their first tensor."""
    first = (
        output if isinstance(output, Tensor) else next(v for v in output.values() if isinstance(v, Tensor))
    )
    return first.float().pow(2).mean()


# -- calls


def tokens(batch: int, length: int = LENGTH) -> dict[str, Any]:
    """Token ids (N, T) with a mask; the last row ends in padding."""
    ids = torch.randint(3, VOCABULARY, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.int64)
    ids[-1, -3:], mask[-1, -3:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def unmasked(batch: int) -> dict[str, Any]:
    """Token ids alone, none of them padding."""
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, LENGTH))}


def long_tokens(batch: int) -> dict[str, Any]:
    """Tokens for attention in windows and blocks."""
    return tokens(batch, 32)


def without_cache(call: Inputs) -> Inputs:
    """The same call with ``use_cache=False``."""
    return lambda batch: {**call(batch), "use_cache": False}


def both_sides(batch: int) -> dict[str, Any]:
    """An encoder's tokens and a decoder's, of another length."""
    decoder = {"decoder_input_ids": torch.randint(3, VOCABULARY, (batch, 7))}
    return {**tokens(batch), **decoder}


def image(size: int = 32, channels: int = 3) -> Inputs:
    """An image (N, C, H, W)."""
    return lambda batch: {"pixel_values": torch.randn(batch, channels, size, size)}


def video(frames: int, size: int) -> Inputs:
    """A video (N, frames, C, H, W)."""
    return lambda batch: {"pixel_values": torch.randn(batch, frames, 3, size, size)}


def sound(samples: int = 800, mask: bool = False) -> Inputs:
    """A wave (N, samples), the last row of which is padded where there is a mask."""

    def call(batch: int) -> dict[str, Any]:
        inputs = {"input_values": torch.randn(batch, samples)}
        if mask:
            inputs["attention_mask"] = torch.ones(batch, samples, dtype=torch.int64)
            inputs["attention_mask"][-1, samples * 3 // 4 :] = 0
        return inputs

    return call


def features(name: str, *shape: int) -> Inputs:
    """A float tensor (N, *shape) under a name."""
    return lambda batch: {name: torch.randn(batch, *shape)}


def together(*calls: Inputs) -> Inputs:
    """Several calls' arguments in one."""

    def call(batch: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for each in calls:
            merged.update(each(batch))
        return merged

    return call
