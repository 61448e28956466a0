"""`fcjax demo`: backpropagation and front contribution on scikit-learn's digits, side by side."""

from fcjax.demo.runner import Effort, run

__all__ = ["Effort", "run"]
