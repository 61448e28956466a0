"""Front contribution: train over-parameterised networks at the plain network's price, exactly."""

from fcjax.equivariance import equivariance as equivariance
from fcjax.errors import FrontContributionError as FrontContributionError
from fcjax.errors import NotFoldableError as NotFoldableError
from fcjax.merge import Merged as Merged
from fcjax.merge import merge as merge
from fcjax.report import Row as Row
from fcjax.transform import FrontContribution as FrontContribution
from fcjax.transform import front_contribute as front_contribute
from fcjax.verify import Verification as Verification
from fcjax.verify import verify as verify

__all__ = [
    "FrontContribution",
    "FrontContributionError",
    "Merged",
    "NotFoldableError",
    "Row",
    "Verification",
    "equivariance",
    "front_contribute",
    "merge",
    "verify",
]
