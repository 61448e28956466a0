"""Which optimizers let weights be left out of training: known ones, and ones made to deceive."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from fcjax.rules.equivariance import equivariance, experiment
from fcjax.rules.stand_ins import Follows, Shrinks, Stays

RATE = 1e-2
BOTH = {"orthogonal", "sign"}


def decayed(*others, decay=1e-4):
    return optax.chain(optax.add_decayed_weights(decay), *others)


def clipped(*others, norm=1.0):
    return optax.chain(optax.clip_by_global_norm(norm), *others)


CLASSES = {
    "nesterov": (optax.sgd(RATE, 0.9, nesterov=True), BOTH),
    "decoupled decay": (optax.chain(optax.trace(0.9), decayed(optax.scale(-RATE))), BOTH),
    "clipping": (clipped(optax.sgd(RATE)), {"orthogonal"}),
    "adam": (optax.adam(RATE), {"sign"}),
    "prodigy": (contrib.prodigy(), set()),
    "the loss is wanted": (optax.polyak_sgd(), set()),
    "a line search": (optax.lbfgs(), set()),
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_known_optimizers(name):
    optimizer, classes = CLASSES[name]
    assert equivariance(optimizer) == classes


def test_an_optimizer_that_treats_wide_matrices_differently():
    optimizer = elementwise(lambda x: jnp.sign(x) if min(x.shape, default=0) >= 128 else x)
    assert equivariance(optimizer) == {"sign"}


def test_experiments_are_in_float64_whatever_jax_is_set_to():
    with jax.enable_x64(False):
        verdict = experiment(optax.sgd(RATE), *dense(), rho=False)
        assert jnp.ones(()).dtype == jnp.float32
    assert verdict.deviation < 1e-12


# The tree of most experiments below: a layer whose kernel changes.

SHRINKS = Shrinks((96, 64), (True, True), rest=True)


def dense(kernel=SHRINKS):
    """The structure of a dense layer, and what becomes of its bias and of its kernel."""
    return jax.tree.structure({"bias": 0, "kernel": 0}), [Stays((64,)), kernel]


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


KERNELS = {
    "plain": (SHRINKS, False),
    "rho": (SHRINKS, True),
    "aligned": (aligned(SHRINKS), False),
    "aligned+rho": (aligned(SHRINKS), True),
}
COMPRESSING = {
    "momentum": (optax.sgd(RATE, 0.9), {"plain": True}),
    "novograd": (optax.novograd(RATE), {"plain": True}),
    "dowg": (contrib.dowg(), {"plain": True}),
    "coupled decay": (decayed(optax.sgd(RATE, 0.9)), {"plain": False, "rho": True}),
    "clipping, then decay": (clipped(decayed(optax.sgd(RATE))), {"plain": False, "rho": True}),
    "decay, then clipping": (decayed(clipped(optax.sgd(RATE))), {"plain": False, "rho": True}),
    "lars": (optax.lars(RATE), {"plain": False, "rho": True}),
    "dog": (contrib.dog(), {"plain": False, "rho": True}),
    "fromage": (optax.fromage(RATE), {"plain": False, "rho": True}),
    "adam": (optax.adam(RATE), {"rho": False, "aligned": True}),
    "adamw": (optax.adamw(RATE), {"aligned": False, "aligned+rho": True}),
    "adam on decay": (decayed(optax.adam(RATE)), {"aligned+rho": False}),
    "lion": (optax.lion(RATE, weight_decay=0.0), {"rho": False, "aligned": True}),
    "lamb": (optax.lamb(RATE), {"rho": False, "aligned+rho": True}),
    "rmsprop": (optax.rmsprop(RATE), {"aligned": True}),
    "clipping by value": (
        optax.chain(optax.clip(1.0), optax.sgd(RATE)),
        {"rho": False, "aligned": True},
    ),
}


@pytest.mark.parametrize("name", COMPRESSING)
def test_what_leaves_a_shrinking_kernel_exact(name):
    optimizer, expected = COMPRESSING[name]
    for kind, exact in expected.items():
        kernel, rho = KERNELS[kind]
        assert experiment(optimizer, *dense(kernel), rho=rho).exact == exact, kind


def test_weak_decay_is_seen_in_the_norm_that_clips():
    optimizer = decayed(clipped(optax.sgd(RATE)), decay=1e-6)
    drift = experiment(optimizer, *dense(), rho=False).reason
    assert "the reduced weights drift" in drift


NEVER = {
    "clipping by block": optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(RATE)),
    "adafactor": optax.adafactor(RATE),
    "muon, scaled by shape": contrib.muon(RATE),
    "clipping by units": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(RATE)),
    "noise": optax.noisy_sgd(RATE, key=0),
}


@pytest.mark.parametrize("name", NEVER)
def test_what_is_not_exact_on_a_kernel_with_unused_rows(name):
    kernel = Shrinks((96, 64), (True, False), rest=True, aligned=True)
    verdict = experiment(NEVER[name], *dense(kernel), rho=True)
    assert "the reduced weights drift" in verdict.reason


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (64, 64)])
def test_muon_that_is_not_scaled_by_shape_serves_for_matrices(shape):
    optimizer = optax.chain(contrib.scale_by_muon(), optax.scale(-RATE))
    changes = [Shrinks(shape, (True, True), rest=True)]
    assert experiment(optimizer, jax.tree.structure(0), changes, rho=False).exact


CHAINS = {
    "adamw": (optax.adamw(RATE), True),
    "lion": (optax.lion(RATE), True),
    "sign_sgd": (optax.sign_sgd(RATE), True),
    "rmsprop": (optax.rmsprop(RATE), True),
    "lars": (optax.lars(RATE), True),
    "lamb": (optax.lamb(RATE), True),
    "clipping, then Adam": (clipped(optax.adam(RATE)), False),
    "dog": (contrib.dog(), False),
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


def test_coordinates_beside_the_norm_of_the_rest_must_not_move():
    def moves_zeros(gradient, weights):
        return jax.tree.map(lambda g, w: -RATE * (g + (w == 0)), gradient, weights)

    kernel = Shrinks((96, 64), (True, False), rest=True, aligned=True)
    assert experiment(optax.stateless(moves_zeros), *dense(kernel), rho=False).exact
    assert not experiment(optax.stateless(moves_zeros), *dense(kernel), rho=True).exact


def test_short_axes_stay():
    structure, changes = dense(Shrinks((1, 64), (True, True), rest=True))
    changes[0] = Stays((2, 64))
    seen = []

    def rule(x):
        seen.append(x.shape)
        return x

    assert experiment(elementwise(rule), structure, changes, rho=False).exact
    assert {rows for rows, _ in seen} == {1, 2}


# Optimizers that read shapes.

RATIOS = {
    "tall": lambda rows, columns: max(1.0, rows / columns),
    "wide": lambda rows, columns: max(1.0, columns / rows),
}


@pytest.mark.parametrize("axes", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("ratio", "shape"), [("tall", (96, 64)), ("wide", (64, 96))])
def test_a_rate_by_the_ratio_of_the_axes(ratio, shape, axes):
    optimizer = elementwise(lambda x: RATIOS[ratio](*x.shape) * x if x.ndim == 2 else x)
    verdict = experiment(optimizer, *dense(Shrinks(shape, axes, rest=True)), rho=True)
    assert "the reduced weights drift" in verdict.reason
    turned = Shrinks(shape[::-1], axes, rest=True)
    # If only the shorter axis shrinks, the ratio stays below 1.
    stays = axes == ((True, False) if ratio == "tall" else (False, True))
    assert experiment(optimizer, *dense(turned), rho=True).exact == stays


def big(x):
    return x.size > 1000


BY_SIZE = {
    "another optimizer": optax.multi_transform(
        {True: optax.adam(RATE), False: optax.sgd(RATE)}, lambda p: jax.tree.map(big, p)
    ),
    "another rule": elementwise(jax.jit(lambda x: jnp.sign(x) if big(x) else x)),
    "another rate": elementwise(lambda x: (0.5 if big(x) else 2.0) * x),
}


@pytest.mark.parametrize("name", BY_SIZE)
def test_what_depends_on_sizes_is_refused_where_the_real_ones_differ(name):
    small, large = (Shrinks((n, n), (True, True), rest=True) for n in (20, 40))
    assert experiment(BY_SIZE[name], *dense(small), rho=False).exact
    refused = experiment(BY_SIZE[name], *dense(large), rho=False)
    assert refused.reason == "it treats leaves differently at their real sizes"
    assert not refused.exact


def test_another_rule_for_large_leaves_of_a_chain():
    optimizer = elementwise(lambda x: jnp.cos(x) if big(x) else jnp.sin(x))
    structure = jax.tree.structure([0, 0])
    for size, exact in ((20, True), (40, False)):
        changes = [Stays((size, size)), Follows(0)]
        assert experiment(optimizer, structure, changes, rho=False).exact == exact


@pytest.mark.parametrize("others", [(64, 64), (256, 512)])
def test_adafactor_serves_a_chain_whether_or_not_it_factors_others(others):
    changes = [Stays((64,)), Follows(0), Stays(others)]
    assert experiment(optax.adafactor(RATE), jax.tree.structure([0] * 3), changes, rho=False).exact


def test_leaves_past_a_threshold_are_only_tried_if_they_are_few():
    changes = [Stays((64,)), Follows(0), *[Stays((9, 9, 256, 256))] * 2]
    verdict = experiment(optax.adafactor(RATE), jax.tree.structure([0] * 4), changes, rho=False)
    assert verdict.reason == "it treats leaves differently at their real sizes"


def test_a_rule_for_large_leaves_is_seen_where_there_are_some():
    optimizer = elementwise(lambda x: jnp.sign(x) if min(x.shape) >= 128 else x)
    kernel = Shrinks((256, 512), (True, True), rest=True)
    assert "the reduced weights drift" in experiment(optimizer, *dense(kernel), rho=False).reason


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


def test_rounding_of_updates_that_cancel_is_no_deviation():
    def update(gradient, step, params=None):
        def rounded(g):  # to float32, and every fourth time all but a thousandth is taken back
            return jnp.where(step % 4 == 3, 0.999, 0.0) * g - g.astype(jnp.float32)

        return jax.tree.map(rounded, gradient), step + 1

    optimizer = optax.GradientTransformation(lambda _: jnp.zeros((), int), update)
    assert experiment(optimizer, *dense(), rho=False).exact


def test_a_state_that_changes_its_dtype():
    def update(gradient, state, params=None):
        state = 0.9 * state + optax.tree.norm(gradient)
        return jax.tree.map(lambda g: -RATE * g / state, gradient), state

    optimizer = optax.GradientTransformation(lambda _: jnp.zeros((), jnp.float32), update)
    assert experiment(optimizer, *dense(), rho=False).exact


def test_a_state_that_changes_its_type_with_every_step_is_not_judged():
    def update(gradient, state, params=None):
        return gradient, state.astype(jnp.float32 if state.dtype == jnp.float64 else jnp.float64)

    optimizer = optax.GradientTransformation(lambda _: jnp.zeros(()), update)
    verdict = experiment(optimizer, *dense(), rho=False)
    assert "TypeError: its state has other types after every step" in verdict.reason


# What it costs.


def test_experiments_compile_nothing(caplog):
    with jax.log_compiles():
        assert experiment(optax.adam(RATE), *dense(aligned(SHRINKS)), rho=False).exact
        assert not experiment(contrib.muon(RATE), *dense(), rho=False).exact
        assert "Compiling" not in caplog.text
        jax.jit(lambda x: x + 1)(1.0)
        assert "Compiling" in caplog.text


def counted(calls):
    """Gradient descent that notes when it is asked for its updates."""
    return elementwise(lambda x: calls.append(x.shape) or x)


def test_verdicts_are_remembered():
    calls = []
    optimizer = counted(calls)
    first = experiment(optimizer, *dense(), rho=False)
    made = len(calls)
    assert experiment(optimizer, *dense(), rho=False) == first
    assert len(calls) == made


@pytest.mark.parametrize("other", ["optimizer", "structure", "changes", "rho"])
def test_a_verdict_is_remembered_for_nothing_else(other):
    calls, structure, changes, rho = [], *dense(), False
    optimizer = counted(calls)
    experiment(optimizer, structure, changes, rho=rho)
    made = len(calls)
    match other:
        case "optimizer":
            optimizer = counted(calls)
        case "structure":
            structure = jax.tree.structure([0, 0])
        case "changes":
            changes = [Stays((63,)), changes[1]]
        case "rho":
            rho = True
    experiment(optimizer, structure, changes, rho=rho)
    assert len(calls) > made


def test_an_optimizer_without_a_hash_is_tried_every_time():
    @dataclasses.dataclass  # which compares its attributes, and so has no hash
    class Update:
        calls: list

        def __call__(self, gradient, state, params=None):
            self.calls.append(True)
            return gradient, state

    update = Update([])
    optimizer = optax.GradientTransformation(lambda _: (), update)
    for _ in range(2):
        update.calls.clear()
        assert experiment(optimizer, *dense(), rho=False).exact
        assert update.calls


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
        dense(aligned(SHRINKS))[1],
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
    verdict = experiment(optax.lars(RATE), *dense(), rho=False)
    assert verdict.reason.endswith(f"by {verdict.deviation:.2g}")
    assert 0.5 < verdict.deviation < 2


def test_where_jax_may_not_use_the_cpu(monkeypatch):
    def refuse(**_):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "local_devices", refuse)
    assert experiment(optax.sgd(RATE), *dense(), rho=False).exact
