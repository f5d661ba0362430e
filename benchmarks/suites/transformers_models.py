"""Tiny models of the ``transformers`` library: text, images, sound, several at once."""

from __future__ import annotations

import logging

import transformers

from benchmarks.suites import Case
from benchmarks.suites import transformers_decoders as decoders
from benchmarks.suites import transformers_encoders as encoders
from benchmarks.suites import transformers_senses as senses

logging.getLogger("transformers").setLevel(logging.ERROR)

_ROWS = (*encoders.VARIANTS, *decoders.VARIANTS, *senses.VARIANTS)
_VARIANTS = {row.name: row for row in _ROWS if hasattr(transformers, row.architecture)}  # of this version


def names() -> list[str]:
    """All variants: ``bert-classification``, ``gpt2-lm``, ``vit-classification``, …"""
    return list(_VARIANTS)


def families() -> list[str]:
    """The library's model types among them."""
    return sorted({variant.config_class.model_type for variant in _VARIANTS.values()})


def build(name: str) -> Case:
    """A freshly initialised model of the variant, in train mode, with its call.

    Raises:
        KeyError: no such variant.
    """
    return _VARIANTS[name].build()
