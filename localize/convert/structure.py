"""Moved to localize/signature.py (temporary)."""
from localize.signature import CallSignature, OutputStructure, as_call  # noqa: F401
