"""The short names under which written programs know types."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

DTYPES = {
    "bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "c64": "complex64",
    "c128": "complex128", "i64": "int64", "i32": "int32", "i8": "int8", "u8": "uint8",
    "boolean": "bool",
}  # fmt: skip
_ALIASES = {name: alias for alias, name in DTYPES.items()}


def alias(dtype: Any) -> str:
    """The short name of a type."""
    return _ALIASES[jnp.dtype(dtype).name]
