"""Kolmogorov-Arnold networks of jaxKAN."""

from __future__ import annotations

from typing import Any

from jaxkan.models.KAN import KAN

from ..adapters import nnx
from ..models import Made, model, numbers


def add(name: str, kind: str, **sizes: Any) -> None:
    """Adds a network whose edges are functions of one kind."""

    @model(name)
    def made(dtype: Any, train: bool) -> Made:
        return nnx(KAN([3, 6, 6, 2], kind, required_parameters=sizes), numbers(8, 3))


add("KAN", "base", k=3, G=4)
add("Chebyshev KAN", "chebyshev", D=4)
add("RBF KAN", "rbf", D=5)
