"""Every error that fcjax raises on purpose."""


class FrontContributionError(Exception):
    """The network, the arguments or the request cannot be served; the message names the remedy."""


class RefutedError(FrontContributionError):
    """A rewrite computes something else than the network: a fault of this library."""


class NotFoldableError(FrontContributionError):
    """``strict=True`` was asked of a network whose non-final weights are not all folded away."""
