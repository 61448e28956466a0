"""The data of the demo: what is learned, by which loss, and how well it was learned."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits, load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

Data = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something to learn.

    Attributes:
      train: inputs of shape `(n, features)`, and targets, rows first.
      test: the same, for the score.
      loss: `loss(apply, params, batch)`, the mean over a batch of inputs and targets.
      score: `score(outputs, targets)`, in words.
      score_name: what the score is.
    """

    train: Data
    test: Data
    loss: Callable[[Any, Any, Any], jax.Array]
    score: Callable[[np.ndarray, np.ndarray], str]
    score_name: str


def cross_entropy(apply: Any, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean cross-entropy of the logits `apply(params, inputs)`."""
    inputs, labels = batch
    logits = apply(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(apply: Any, params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean squared error of `apply(params, inputs)`."""
    inputs, targets = batch
    return jnp.mean((apply(params, inputs) - targets) ** 2)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> str:
    """Share of the rows whose largest logit is at their label."""
    return f"{np.mean(np.argmax(logits, axis=-1) == labels):.1%}"


def mean_square(outputs: np.ndarray, targets: np.ndarray) -> str:
    """Mean squared error."""
    return f"{np.mean((outputs - targets) ** 2):.0e}"


@functools.cache
def digits() -> Problem:
    """Images of 8 x 8 pixels in [0, 1] and their digits."""
    images, labels = load_digits(return_X_y=True)
    return _classification(*_split(images / 16.0, labels, test_size=360))


def wines() -> Problem:
    """559 features for 118 wines: all products of up to three of 13 measurements."""
    measurements, cultivars = load_wine(return_X_y=True)
    products = PolynomialFeatures(3, include_bias=False).fit_transform(
        StandardScaler().fit_transform(measurements)
    )
    train, test = _split(products, cultivars, test_size=60)
    scaler = StandardScaler().fit(train[0])
    return _classification(*[(scaler.transform(x), labels) for x, labels in (train, test)])


def linear_map() -> Problem:
    """3 outputs, each a linear function of 12 features."""
    return _regression(np.random.default_rng(2).normal(size=(12, 3)) / 12**0.5, samples=1000)


def sparse_sum() -> Problem:
    """One output that depends on 5 of 200 features, to be found from 100 samples."""
    weights = np.zeros(200)
    weights[:5] = (2.0, 1.5, 1.0, 1.0, 0.5)
    return _regression(weights, samples=100)


def _regression(weights: np.ndarray, samples: int) -> Problem:
    inputs = np.random.default_rng(1).normal(size=(2 * samples, len(weights)))
    train, test = [(x, x @ weights) for x in np.split(inputs, 2)]
    return Problem(train, test, squared_error, mean_square, "error")


def _classification(train: Data, test: Data) -> Problem:
    return Problem(train, test, cross_entropy, accuracy, "accuracy")


def _split(inputs: np.ndarray, labels: np.ndarray, test_size: int) -> tuple[Data, Data]:
    train_inputs, test_inputs, train_labels, test_labels = train_test_split(
        inputs, labels.astype(np.int32), test_size=test_size, random_state=0, stratify=labels
    )
    return (train_inputs, train_labels), (test_inputs, test_labels)
