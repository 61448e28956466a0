"""Front contribution: train over-parameterised networks at the plain network's price, exactly."""

from fcjax.errors import FrontContributionError as FrontContributionError
from fcjax.errors import NotFoldableError as NotFoldableError
from fcjax.laws.conservation import ConservationLaws as ConservationLaws
from fcjax.laws.conservation import conservation_laws as conservation_laws
from fcjax.merging.merge import Merged as Merged
from fcjax.merging.merge import merge as merge
from fcjax.report import Row as Row
from fcjax.rules.drift import DriftState as DriftState
from fcjax.rules.drift import track_drift as track_drift
from fcjax.rules.equivariance import equivariance as equivariance
from fcjax.transform import FrontContribution as FrontContribution
from fcjax.transform import front_contribute as front_contribute
from fcjax.verify import Verification as Verification
from fcjax.verify import verify as verify

__all__ = [
    "ConservationLaws",
    "DriftState",
    "FrontContribution",
    "FrontContributionError",
    "Merged",
    "NotFoldableError",
    "Row",
    "Verification",
    "conservation_laws",
    "equivariance",
    "front_contribute",
    "merge",
    "track_drift",
    "verify",
]
