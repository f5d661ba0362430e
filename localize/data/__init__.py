"""Data sets by a short name, ready to train on: ``load_data("digits").loaders(batch_size=64)``."""

from localize.data.base import Data, Loaders
from localize.data.specs import DATA_FORMS, load_data

__all__ = ["DATA_FORMS", "Data", "Loaders", "load_data"]
