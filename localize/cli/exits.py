"""The table of exits: how well each sub-model does, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localize import LocalModel
from localize.cli.output import Output
