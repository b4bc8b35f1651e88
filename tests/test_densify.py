import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from d4d_jax import registry
from d4d_jax.cameras import orbit
from gaussians.densify import AdaptiveDensity, GradientStatistics, Rows, move_moments
from gaussians.initialize import random_cube
from gaussians.rasterize import Probe, rasterize
from gaussians.types import Splats

STRATEGY = AdaptiveDensity(extent=1.0)  # clones up to a standard deviation of 0.01
LATE = STRATEGY.prune_scale_after
KEY = jax.random.key(0)


def make_splats(
    num_active: int, capacity: int, *, scale: float = 0.005, opacity: float = 0.5
) -> Splats:
    """Splats that can be told apart by every field."""
    number = jnp.arange(1.0, capacity + 1)
    logit = float(np.log(opacity / (1 - opacity)))
    return Splats(
        means=number[:, None] * jnp.array([1.0, 10.0, 100.0]),
        log_scales=jnp.full((capacity, 3), np.log(scale)) - 1e-3 * number[:, None],
        quaternions=jnp.tile(jnp.array([1.0, 0.0, 0.0, 0.0]), (capacity, 1)),
        opacity_logits=jnp.full((capacity,), logit) + 1e-3 * number,
        sh=jnp.tile(number[:, None, None], (1, 1, 3)),
        active=jnp.arange(capacity) < num_active,
    )


def gradients(capacity: int, **large: float) -> jax.Array:
    """Zero but for slots given as s3=0.5."""
    values = np.zeros(capacity, np.float32)
    for slot, value in large.items():
        values[int(slot[1:])] = value
    return jnp.asarray(values)


def counts(report) -> dict[str, int]:
    return {field.name: int(getattr(report, field.name)) for field in dataclasses.fields(report)}


def test_quiet_splats_stay_bitwise():
    splats = make_splats(5, 8)
    refined = STRATEGY.refine(KEY, splats, gradients(8), 600)
    jax.tree.map(np.testing.assert_array_equal, refined.splats, splats)
    assert counts(refined.report) == dict(cloned=0, split=0, pruned=0, refused=0, active=5)
    np.testing.assert_array_equal(refined.rows.source, np.arange(8))
    assert not refined.rows.fresh.any()


def test_small_splats_are_cloned_exactly():
    splats = make_splats(5, 8)
    refined = STRATEGY.refine(KEY, splats, gradients(8, s2=1.0), 600)
    assert counts(refined.report) == dict(cloned=1, split=0, pruned=0, refused=0, active=6)
    assert refined.splats.active[5] and refined.rows.source[5] == 2
    for before, after in zip(jax.tree.leaves(splats), jax.tree.leaves(refined.splats), strict=True):
        np.testing.assert_array_equal(after[:5], before[:5])
        if before.dtype != bool:
            np.testing.assert_array_equal(after[5], before[2])
    np.testing.assert_array_equal(np.flatnonzero(refined.rows.fresh), [5])


def test_large_splats_are_split_into_two_new_children():
    splats = make_splats(5, 8, scale=0.05)
    refined = STRATEGY.refine(KEY, splats, gradients(8, s2=1.0), 600)
    assert counts(refined.report) == dict(cloned=0, split=1, pruned=0, refused=0, active=6)
    np.testing.assert_array_equal(np.flatnonzero(refined.rows.fresh), [2, 5])
    children = jax.tree.map(lambda leaf: leaf[np.array([2, 5])], refined.splats)
    np.testing.assert_allclose(
        children.log_scales, splats.log_scales[2] - np.log(1.6) + np.zeros((2, 3)), rtol=1e-6
    )
    np.testing.assert_array_equal(children.sh, splats.sh[np.array([2, 2])])
    moved = np.linalg.norm(children.means - splats.means[2], axis=-1)
    assert (moved > 0).all() and (moved < 0.3).all()
    assert not np.allclose(children.means[0], children.means[1])


def test_split_children_follow_the_distribution_of_their_parent():
    capacity, half = 8000, 4000
    turn = np.pi / 2  # about z: the long axis x becomes y
    splats = Splats(
        means=jnp.tile(jnp.array([1.0, 2.0, 3.0]), (capacity, 1)),
        log_scales=jnp.tile(jnp.log(jnp.array([0.4, 0.1, 0.02])), (capacity, 1)),
        quaternions=jnp.tile(
            2 * jnp.array([np.cos(turn / 2), 0, 0, np.sin(turn / 2)], jnp.float32), (capacity, 1)
        ),
        opacity_logits=jnp.zeros(capacity),
        sh=jnp.zeros((capacity, 1, 3)),
        active=jnp.arange(capacity) < half,
    )
    refined = STRATEGY.refine(KEY, splats, jnp.ones(capacity), 600)
    assert int(refined.report.split) == half and int(refined.report.active) == capacity
    means = np.asarray(refined.splats.means)
    np.testing.assert_allclose(means.mean(axis=0), [1, 2, 3], atol=0.02)
    np.testing.assert_allclose(means.std(axis=0), [0.1, 0.4, 0.02], rtol=0.05)
    assert abs(np.corrcoef(means[:half, 1], means[half:, 1])[0, 1]) < 0.05


def test_prune_frees_slots_which_are_filled_at_once():
    splats = make_splats(8, 8)
    faint = splats.opacity_logits.at[jnp.array([1, 6])].set(-9.0)
    splats = dataclasses.replace(splats, opacity_logits=faint)
    refined = STRATEGY.refine(KEY, splats, gradients(8, s1=9.0, s3=1.0), 600)
    assert counts(refined.report) == dict(cloned=1, split=0, pruned=2, refused=0, active=7)
    np.testing.assert_array_equal(refined.splats.active, [1, 1, 1, 1, 1, 1, 0, 1])
    assert refined.rows.source[1] == 3


def test_oversized_splats_are_pruned_only_late_and_only_when_quiet():
    splats = make_splats(4, 8, scale=0.2)
    quiet_late = STRATEGY.refine(KEY, splats, gradients(8, s0=1.0), LATE)
    assert counts(quiet_late.report) == dict(cloned=0, split=1, pruned=3, refused=0, active=2)
    early = STRATEGY.refine(KEY, splats, gradients(8), LATE - 1)
    assert int(early.report.pruned) == 0


def test_full_capacity_serves_the_largest_gradients_and_reports_the_rest():
    splats = make_splats(6, 8)
    pull = gradients(8, s0=1.0, s1=4.0, s2=2.0, s3=3.0)
    refined = STRATEGY.refine(KEY, splats, pull, 600)
    assert counts(refined.report) == dict(cloned=2, split=0, pruned=0, refused=2, active=8)
    np.testing.assert_array_equal(refined.rows.source[6:], [1, 3])
    assert "2 found no free slot" in str(refined.report)

    full = STRATEGY.refine(KEY, make_splats(8, 8), pull, 600)
    assert counts(full.report) == dict(cloned=0, split=0, pruned=0, refused=4, active=8)
    jax.tree.map(np.testing.assert_array_equal, full.splats, make_splats(8, 8))


def test_inactive_slots_never_multiply():
    refined = STRATEGY.refine(KEY, make_splats(3, 8), gradients(8, s5=1.0), 600)
    assert counts(refined.report) == dict(cloned=0, split=0, pruned=0, refused=0, active=3)


OPTIMIZERS = {
    "adam": optax.chain(optax.clip_by_global_norm(1e9), optax.adam(1e-2)),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "rate per leaf": optax.multi_transform(
        {"fast": optax.adam(1e-1), "slow": optax.adam(1e-3)},
        {"splats": {name: "fast" if name == "means" else "slow" for name in
                    ("means", "log_scales", "quaternions", "opacity_logits", "sh")},
         "field": "slow"},
    ),
    "masked": optax.masked(optax.adam(1e-2), {"splats": True, "field": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_follows_its_splat(name):
    optimizer = OPTIMIZERS[name]
    splats = dataclasses.replace(
        make_splats(6, 8), log_scales=jnp.log(jnp.full((8, 3), 0.005)).at[4].set(np.log(0.05))
    )
    # A leaf of the field has as many rows as there are slots: it must stay all the same.
    params = {"splats": splats.parameters, "field": jnp.arange(8.0)}
    state = optimizer.init(params)
    state = jax.tree.map(lambda m: 1 + np.arange(m.size).reshape(m.shape), state)  # tells slots
    refined = STRATEGY.refine(KEY, splats, gradients(8, s1=1.0, s4=2.0), 600)
    assert counts(refined.report) == dict(cloned=1, split=1, pruned=0, refused=0, active=8)

    rows = refined.rows
    moved = move_moments(state, params, lambda p: p | {"splats": rows.gather_moments(p["splats"])})
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    checked = 0
    for (path, before), (_, after) in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree_util.tree_leaves_with_path(moved),
        strict=True,
    ):
        if "splats" not in jax.tree_util.keystr(path):
            np.testing.assert_array_equal(after, before)
            continue
        checked += 1
        expected = np.array(before)
        expected[[4, 6, 7]] = 0  # both children of the split, and the clone
        np.testing.assert_array_equal(after, expected)
    assert checked >= (5 if name == "momentum" else 10)


def test_gather_moments_moves_history_along_a_permutation():
    rows = Rows(jnp.array([2, 0, 1]), jnp.array([False, True, False]))
    moments = {"a": jnp.arange(3.0), "b": jnp.arange(6.0).reshape(3, 2)}
    moved = rows.gather_moments(moments)
    np.testing.assert_array_equal(moved["a"], [2, 0, 1])
    np.testing.assert_array_equal(moved["b"], [[4, 5], [0, 0], [2, 3]])
    np.testing.assert_array_equal(rows.gather(moments)["b"], [[4, 5], [0, 1], [2, 3]])


def test_a_foreign_optimizer_state_is_refused():
    state = optax.adam(1e-2).init({"other": jnp.zeros((4, 3))})
    with pytest.raises(ValueError, match="Nothing in the optimizer state"):
        move_moments(state, {"means": jnp.zeros((4, 3))}, lambda part: part)
    stateless = optax.sgd(1e-2).init({"means": jnp.zeros((4, 3))})
    move_moments(stateless, {"means": jnp.zeros((4, 3))}, lambda part: part)


def test_statistics_average_over_the_views_that_saw_a_splat():
    statistics = GradientStatistics.create(3)
    gradient = jnp.array([[[3.0, 0.0], [0.0, 1.0], [9.0, 9.0]], [[0.0, 2.0], [5.0, 0.0], [0, 0]]])
    visible = jnp.array([[True, True, False], [True, False, False]])
    statistics = statistics.add(gradient, visible)
    np.testing.assert_allclose(statistics.mean, [(3 + 2) / 2, 1, 0])
    statistics = statistics.add(gradient[0], visible[0])
    np.testing.assert_allclose(statistics.mean, [(3 + 2 + 3) / 3, 1, 0], rtol=1e-6)
    np.testing.assert_array_equal(statistics.visits, [3, 2, 0])


def test_opacity_reset_is_a_ceiling():
    splats = make_splats(4, 4)
    splats = dataclasses.replace(splats, opacity_logits=jnp.array([3.0, 0.0, -4.0, -8.0]))
    opacities = jax.nn.sigmoid(STRATEGY.reset_opacity(splats).opacity_logits)
    np.testing.assert_allclose(opacities[:2], 0.01, rtol=1e-5)
    np.testing.assert_allclose(opacities[3], jax.nn.sigmoid(-8.0), rtol=1e-5)
    assert opacities[2] <= 0.01 + 1e-6


def test_the_schedule_is_the_published_one():
    strategy = registry.build("densify", {"name": "adaptive", "stop": 6001})
    refinements = [step for step in range(1, 7000) if strategy.refines_at(step)]
    assert refinements == list(range(600, 6001, 100))
    assert [step for step in range(7000) if strategy.resets_opacity_at(step)] == [3000, 6000]
    assert not AdaptiveDensity(reset_every=0).resets_opacity_at(3000)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"every": 0}, "every=0 must be at least 1"),
        ({"reset_opacity_to": 1.0}, "opacities between 0 and 1"),
        ({"opacity_threshold": 0.02}, "a reset prunes every splat"),
    ],
)
def test_impossible_thresholds_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdaptiveDensity(**wrong)


@pytest.fixture(scope="module")
def render():
    """From splats: the gradient of an image loss by screen position, the image, visibility."""
    camera = orbit(2, width=16, height=16)[0]

    def loss(probe, splats):
        picture = rasterize(splats, camera, jnp.ones(3), implementation="reference", probe=probe)
        return jnp.mean((picture.rgb - 0.2) ** 2), (picture.rgb, picture.radii > 0)

    compiled = jax.jit(jax.grad(loss, has_aux=True))

    def call(splats):
        gradient, (rgb, visible) = compiled(Probe.zeros(len(splats)), splats)
        return gradient.mean2d, rgb, visible

    return call


def test_rendering_does_not_depend_on_the_slots(render):
    splats = random_cube(40, key=KEY, capacity=64, opacity=0.6)
    order = jax.random.permutation(jax.random.key(1), 64)
    rows = Rows(order, jnp.zeros(64, bool))
    np.testing.assert_allclose(render(rows.gather(splats))[1], render(splats)[1], atol=1e-5)


def test_refinement_from_a_real_gradient_keeps_the_image_close(render):
    """The whole chain: gradient of the probe, statistics, refinement, rendering."""
    splats = random_cube(40, key=KEY, capacity=64, opacity=0.05)
    gradient, image, visible = render(splats)
    statistics = GradientStatistics.create(64).add(gradient, visible)
    assert (statistics.mean[:40] > 0).sum() > 20 and not statistics.mean[40:].any()
    strategy = AdaptiveDensity(gradient_threshold=float(jnp.sort(statistics.mean)[-11]))
    refined = strategy.refine(KEY, splats, statistics.mean, 600)
    assert int(refined.report.active) == 50 and int(refined.report.split) == 10
    change = np.abs(render(refined.splats)[1] - image)
    assert 0 < change.mean() < 0.02
