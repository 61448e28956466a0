"""All operations: importing the modules registers them."""

from __future__ import annotations

from . import (  # noqa: F401
    ops_control,
    ops_conv,
    ops_dense,
    ops_inputs,
    ops_sequence,
    ops_shapes,
    ops_types,
)
from .registry import OPS

__all__ = ["OPS"]
