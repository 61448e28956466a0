"""`fcjax demo`: backpropagation and front contribution side by side, on small problems."""

from fcjax.demo.runner import Effort, run

__all__ = ["Effort", "run"]
