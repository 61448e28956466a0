"""Which optimizers let weights be left out of training: known ones, and ones made to deceive."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from fcjax import equivariance as module
from fcjax.equivariance import Follows, Shrinks, Stays, equivariance, experiment

RATE = 1e-2
BOTH = {"orthogonal", "sign"}


def decayed(*others, decay=1e-4):
    return optax.chain(optax.add_decayed_weights(decay), *others)


def clipped(*others, norm=1.0):
    return optax.chain(optax.clip_by_global_norm(norm), *others)


CLASSES = {
    "nesterov": (optax.sgd(RATE, 0.9, nesterov=True), BOTH),
    "decoupled decay": (optax.chain(optax.trace(0.9), decayed(optax.scale(-RATE))), BOTH),
    "clipping, then decay": (clipped(decayed(optax.sgd(RATE))), {"orthogonal"}),
    "weak decay, then clipping": (decayed(clipped(optax.sgd(RATE)), decay=1e-6), set()),
    "clipping, then Adam": (clipped(optax.adam(RATE)), set()),
    "adam": (optax.adam(RATE), {"sign"}),
    "adafactor": (optax.adafactor(RATE), {"sign"}),
    "dog": (contrib.dog(), set()),
    "the loss is wanted": (optax.polyak_sgd(), set()),
    "a line search": (optax.lbfgs(), set()),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_known_optimizers(name):
    optimizer, classes = CLASSES[name]
    assert equivariance(optimizer) == classes


@pytest.mark.parametrize("wide", [False, True])
def test_an_optimizer_that_treats_wide_matrices_differently(wide):
    def rule(x):
        return jnp.sign(x) if wide and min(x.shape, default=0) >= 128 else x

    assert equivariance(elementwise(rule)) == ({"sign"} if wide else BOTH)


def test_experiments_are_in_float64_whatever_jax_is_set_to():
    with jax.enable_x64(False):
        verdict = experiment(optax.sgd(RATE), *dense(), rho=False)
        assert equivariance(optax.sgd(RATE)) == BOTH
        assert jnp.ones(()).dtype == jnp.float32
    assert verdict.deviation < 1e-12


# The tree of most experiments below: a layer whose kernel, or more, is changed.


def dense(kernel=None, bias=None):
    """The structure and the changes of a dense layer, whose kernel shrinks unless told else."""
    structure = jax.tree.structure({"bias": 0, "kernel": 0})
    return structure, [bias or Stays((64,)), kernel or Shrinks((96, 64), (True, True), rest=True)]


def aligned(kernel):
    return Shrinks(kernel.shape, kernel.axes, kernel.rest, aligned=True)


def elementwise(rule):
    """Gradient descent after `rule` is applied to each leaf of the gradient."""
    return optax.chain(optax.stateless(lambda g, _: jax.tree.map(rule, g)), optax.sgd(RATE))


def by_layer(**optimizers):
    """Another optimizer for each entry of the tree, chosen by its path."""

    def labels(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)

    return optax.multi_transform(optimizers, labels)


EXACT = {
    "momentum": (optax.sgd(RATE, 0.9), "plain rho aligned aligned+rho"),
    "decay": (decayed(optax.sgd(RATE)), "rho aligned+rho"),
    "clipping": (clipped(optax.sgd(RATE)), "plain rho aligned aligned+rho"),
    "decay, then clipping": (decayed(clipped(optax.sgd(RATE))), "rho aligned+rho"),
    "lars": (optax.lars(RATE), "rho aligned+rho"),
    "dog": (contrib.dog(), "rho aligned+rho"),
    "dowg": (contrib.dowg(), "plain rho aligned aligned+rho"),
    "fromage": (optax.fromage(RATE), "rho aligned+rho"),
    "novograd": (optax.novograd(RATE), "plain rho aligned aligned+rho"),
    "adam": (optax.adam(RATE), "aligned aligned+rho"),
    "adamw": (optax.adamw(RATE), "aligned+rho"),
    "adam on decay": (decayed(optax.adam(RATE)), ""),
    "lion": (optax.lion(RATE, weight_decay=0.0), "aligned aligned+rho"),
    "rmsprop": (optax.rmsprop(RATE), "aligned aligned+rho"),
    "clipping by value": (optax.chain(optax.clip(1.0), optax.sgd(RATE)), "aligned aligned+rho"),
    "clipping by block": (optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(RATE)), ""),
    "adafactor": (optax.adafactor(RATE), ""),
    "lamb": (optax.lamb(RATE), "aligned+rho"),
    "adagrad": (optax.adagrad(RATE), "aligned aligned+rho"),
    "sign_sgd": (optax.sign_sgd(RATE), "aligned aligned+rho"),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_leaves_a_shrinking_kernel_exact(name):
    optimizer, expected = EXACT[name]
    structure, (bias, kernel) = dense()
    kernels = {"": kernel, "aligned": aligned(kernel)}
    found = {
        "+".join(filter(None, (basis, "rho" if rho else ""))) or "plain"
        for basis, change in kernels.items()
        for rho in (False, True)
        if experiment(optimizer, structure, [bias, change], rho=rho).exact
    }
    assert found == set(expected.split())


NEVER = {
    "muon, scaled by shape": contrib.muon(RATE),
    "clipping by units": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(RATE)),
    "noise": optax.noisy_sgd(RATE, key=0),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_is_not_exact_on_a_kernel_with_unused_rows(name):
    kernel = Shrinks((96, 64), (True, False), rest=True)
    for change, rho in ((kernel, False), (aligned(kernel), True)):
        verdict = experiment(NEVER[name], *dense(change), rho=rho)
        assert "the reduced weights drift" in verdict.reason


def test_muon_not_scaled_by_shape_serves_where_it_is_alone():
    optimizer = by_layer(
        bias=optax.sgd(RATE), kernel=optax.chain(contrib.scale_by_muon(), optax.scale(-RATE))
    )
    assert experiment(optimizer, *dense(), rho=False).exact


CHAINS = {
    "momentum": (optax.sgd(RATE, 0.9), True),
    "adamw": (optax.adamw(RATE), True),
    "lion": (optax.lion(RATE), True),
    "sign_sgd": (optax.sign_sgd(RATE), True),
    "rmsprop": (optax.rmsprop(RATE), True),
    "lars": (optax.lars(RATE), True),
    "lamb": (optax.lamb(RATE), True),
    "prodigy": (contrib.prodigy(), False),
    "dowg": (contrib.dowg(), False),
    "muon": (contrib.muon(RATE), True),
    "noise": (optax.noisy_sgd(RATE, key=0), False),
    "means over leaves": (optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(RATE)), True),
    "clipping above some scale": (clipped(optax.sgd(RATE), norm=1e4), False),
    "moments that start positive": (optax.yogi(RATE), False),
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_leaves_a_folded_chain_exact(name):
    optimizer, exact = CHAINS[name]
    structure = jax.tree.structure([0, 0, 0, 0])
    changes = [Stays((64,)), Follows(0), Stays((3, 64)), Follows(0)]
    assert experiment(optimizer, structure, changes, rho=False).exact == exact


# The user's own tree: paths, labels, masks.

LAYERS = jax.tree.structure({"head": {"kernel": 0}, "trunk": {"kernel": 0}})


@pytest.mark.parametrize("shrinking", ["head", "trunk"])
def test_only_the_optimizer_of_a_changed_leaf_counts(shrinking):
    changes = {name: Stays((64, 96)) for name in ("head", "trunk")}
    changes[shrinking] = Shrinks((64, 96), (True, True), rest=True)
    optimizer = by_layer(head=optax.adam(RATE), trunk=optax.sgd(RATE))
    verdict = experiment(optimizer, LAYERS, list(changes.values()), rho=False)
    assert verdict.exact == (shrinking == "trunk")


@pytest.mark.parametrize("decaying", ["head", "trunk"])
def test_decay_is_masked_by_the_users_paths(decaying):
    def mask(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == decaying, params)

    optimizer = optax.chain(optax.add_decayed_weights(1e-4, mask), optax.sgd(RATE))
    changes = [Stays((64, 96)), Shrinks((64, 96), (True, True), rest=True)]
    verdict = experiment(optimizer, LAYERS, changes, rho=False)
    assert verdict.exact == (decaying == "head")


@pytest.mark.parametrize("follows", [True, False])
def test_a_mask_that_is_a_tree_fits_the_reduced_tree_too(follows):
    mask = {"head": {"kernel": True}, "trunk": {"kernel": follows}}
    optimizer = optax.masked(optax.scale_by_adam(), mask)
    verdict = experiment(optimizer, LAYERS, [Stays((8,)), Follows(0)], rho=False)
    assert verdict.exact == follows


def test_a_leaf_that_no_rest_is_left_in_may_decay():
    kernel = Shrinks((12, 64), (False, True), rest=False)
    for rho in (False, True):
        assert experiment(decayed(optax.sgd(RATE)), *dense(kernel), rho=rho).exact


def test_an_axis_of_size_one_stays():
    kernel = Shrinks((1, 64), (True, True), rest=True)
    seen = []

    def rule(x):
        seen.append(x.shape)
        return x

    assert experiment(elementwise(rule), *dense(kernel), rho=False).exact
    assert {shape[0] for shape in seen if len(shape) == 2} == {1}


# Optimizers that read shapes.

RATIOS = {
    "rows": lambda rows, columns: rows,
    "columns": lambda rows, columns: columns,
    "tall": lambda rows, columns: max(1.0, rows / columns),
    "wide": lambda rows, columns: max(1.0, columns / rows),
}


@pytest.mark.parametrize("rho", [False, True])
@pytest.mark.parametrize("axes", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("ratio", ["tall", "wide"])
def test_a_rate_by_the_ratio_of_the_axes_is_seen_in_every_orientation(ratio, axes, rho):
    optimizer = elementwise(lambda x: RATIOS[ratio](*x.shape) * x if x.ndim == 2 else x)
    verdict = experiment(optimizer, *dense(Shrinks((96, 64), axes, rest=True)), rho=rho)
    assert "the reduced weights drift" in verdict.reason


def big(x):
    return x.size > 1000


BY_SIZE = {
    "another optimizer": optax.multi_transform(
        {True: optax.adam(RATE), False: optax.sgd(RATE)}, lambda p: jax.tree.map(big, p)
    ),
    "another rule": elementwise(lambda x: jnp.sign(x) if big(x) else x),
    "another rate": elementwise(lambda x: (0.5 if big(x) else 2.0) * x),
}


@pytest.mark.parametrize("name", BY_SIZE)
def test_what_depends_on_sizes_is_refused_where_the_real_ones_differ(name):
    small, large = (Shrinks((n, n), (True, True), rest=True) for n in (20, 40))
    assert experiment(BY_SIZE[name], *dense(small), rho=False).exact
    refused = experiment(BY_SIZE[name], *dense(large), rho=False)
    assert refused.reason == "it treats leaves differently at their real sizes"
    assert not refused.exact


def test_adafactor_is_refused_for_a_chain_where_it_would_factor():
    structure = jax.tree.structure([0, 0])
    reasons = [
        experiment(optax.adafactor(RATE), structure, [Stays((n, n)), Follows(0)], rho=False).reason
        for n in (64, 256)
    ]
    assert reasons[0] == "it moves both trees alike"
    assert reasons[1] == "it treats leaves differently at their real sizes"


# When it deviates: at some scale, late, or after a pause.


def test_a_deviation_above_some_scale_of_the_gradients():
    optimizer = optax.chain(optax.clip(1e3), optax.sgd(RATE))
    assert not experiment(optimizer, *dense(), rho=False).exact


def switching(step):
    """Adam's rule after so many updates, and gradient descent before."""
    return optax.chain(
        optax.conditionally_transform(optax.scale_by_adam(), lambda count: count >= step),
        optax.scale(-RATE),
    )


@pytest.mark.parametrize(
    "optimizer",
    [optax.radam(RATE), switching(15), optax.MultiSteps(switching(5), 8)],
    ids=["radam", "after 15 updates", "after 5 updates of 8 steps"],
)
def test_a_late_deviation(optimizer):
    assert "the reduced weights drift" in experiment(optimizer, *dense(), rho=False).reason


@pytest.mark.parametrize("every", [4, 32])
def test_accumulation_in_float32_passes(every):
    verdict = experiment(optax.MultiSteps(optax.sgd(RATE, 0.9), every), *dense(), rho=False)
    assert verdict.exact
    assert verdict.deviation > 1e-9  # or it would not be float32


def warmup(zero_steps):
    return optax.join_schedules([lambda _: 0.0, optax.linear_schedule(0, 1, 1000)], [zero_steps])


@pytest.mark.parametrize("base", [optax.sgd, optax.adam])
@pytest.mark.parametrize("zero_steps", [1, 100])
def test_a_warmup_does_not_hide_the_rule(base, zero_steps):
    verdict = experiment(base(warmup(zero_steps)), *dense(), rho=False)
    assert verdict.exact == (base is optax.sgd)


@pytest.mark.parametrize("rate", [0.0, lambda count: 0.0, warmup(500)])
def test_an_optimizer_that_does_not_move_is_not_judged(rate):
    verdict = experiment(optax.sgd(rate), *dense(), rho=False)
    assert not verdict.exact
    assert "it moves kernel in" in verdict.reason
    assert "of 512 steps, too few to judge it" in verdict.reason


def test_a_leaf_that_does_not_move_is_named_and_only_counts_if_it_changes():
    optimizer = by_layer(head=optax.set_to_zero(), trunk=optax.sgd(RATE))
    shrinks, stays = Shrinks((64, 96), (True, True), rest=True), Stays((64, 96))
    refused = experiment(optimizer, LAYERS, [shrinks, stays], rho=False)
    assert "it moves head/kernel in 0 of 512 steps" in refused.reason
    assert experiment(optimizer, LAYERS, [stays, shrinks], rho=False).exact


def test_a_tiny_rate_hides_nothing():
    assert not experiment(optax.adam(1e-10), *dense(), rho=False).exact
    assert experiment(optax.sgd(1e-10), *dense(), rho=False).exact


def test_rounding_of_new_weights_minus_old_ones_is_no_deviation():
    def difference(gradient, weights):
        return jax.tree.map(lambda g, w: (w - 1e-9 * g) - w, gradient, weights)

    assert experiment(optax.stateless(difference), *dense(), rho=False).exact


def test_a_state_that_changes_its_dtype():
    def update(gradient, state, params=None):
        state = 0.9 * state + optax.tree.norm(gradient)
        return jax.tree.map(lambda g: -RATE * g / state, gradient), state

    optimizer = optax.GradientTransformation(lambda _: jnp.zeros((), jnp.float32), update)
    assert experiment(optimizer, *dense(), rho=False).exact


# What is said.


def spoiled(value):
    return elementwise(lambda x: x.at[..., 0].set(value))


NOT_ONE = [Stays((64,)), Follows(0)]
REASONS = [
    (optax.sgd(RATE), NOT_ONE, False, "it moves both trees alike"),
    (clipped(optax.sgd(RATE)), NOT_ONE, False, "the reduced weights drift from backpropagation's"),
    (optax.yogi(RATE), NOT_ONE, False, "it parts folded weights from the ones that they follow"),
    (decayed(optax.sgd(RATE)), dense()[1], False, "it moves weights whose gradient is zero"),
    (spoiled(np.nan), NOT_ONE, False, "its updates are not finite"),
    (spoiled(np.inf), NOT_ONE, False, "its updates are not finite"),
    (optax.sgd(1e308), NOT_ONE, False, "its updates are not finite"),
    (42, NOT_ONE, False, "it could not be run on this tree: AttributeError: 'int' object has"),
    (optax.polyak_sgd(), NOT_ONE, False, "it could not be run on this tree: TypeError: scale_by"),
    (
        decayed(optax.adam(RATE)),
        [Stays((64,)), aligned(dense()[1][1])],
        True,
        "it does not move untouched weights in proportion to their norm",
    ),
]


@pytest.mark.parametrize(("optimizer", "changes", "rho", "reason"), REASONS)
def test_every_verdict_gives_its_reason(optimizer, changes, rho, reason):
    verdict = experiment(optimizer, dense()[0], changes, rho=rho)
    assert verdict.reason.startswith(reason)
    assert verdict.exact == (reason == "it moves both trees alike")
    assert np.isinf(verdict.deviation) == ("run" in reason or "finite" in reason)
    assert verdict.exact or verdict.deviation > 1e-6


def test_the_drift_is_given_as_a_number():
    # All weights but the kernel's rest stay small, so that the norm is the rest's.
    verdict = experiment(optax.lars(RATE), *dense(), rho=False)
    assert verdict.reason.endswith(f"by {verdict.deviation:.2g}")
    assert 0.5 < verdict.deviation < 2


def test_where_jax_may_not_use_the_cpu(monkeypatch):
    def refuse(**_):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(module.jax, "local_devices", refuse)
    assert experiment(optax.sgd(RATE), *dense(), rho=False).exact
