"""gaussians.densify.mcmc: relocation, growth, noise, penalties; opacity over time in the family."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special, stats

from d4d_jax.cameras import orbit
from gaussians.deformation import build as build_field
from gaussians.densify import AdaptiveDensity, DensityStrategy, MCMCDensity, build, move_moments
from gaussians.initialize import random_cube
from gaussians.rasterize import rasterize
from gaussians.types import Splats

KEY = jax.random.key(0)
STRATEGY = MCMCDensity(growth=1.0)
GROWING = MCMCDensity(growth=1.5)


def make_splats(opacities, *, num_active: int | None = None, seed: int = 0) -> Splats:
    """Splats of all shapes, one per opacity."""
    rng = np.random.default_rng(seed)
    n = len(opacities)
    normal = {"means": (n, 3), "quaternions": (n, 4), "sh": (n, 1, 3)}
    return Splats(
        **{name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in normal.items()},
        log_scales=jnp.asarray(rng.normal(-3, 0.5, size=(n, 3)), jnp.float32),
        opacity_logits=jnp.asarray(special.logit(opacities), jnp.float32),
        active=jnp.arange(n) < (n if num_active is None else num_active),
    )


def refine(strategy, splats: Splats, key=KEY, peak_opacities=None):
    return strategy.refine(key, splats, jnp.zeros(len(splats)), 600, peak_opacities)


def opacities_of(splats: Splats) -> np.ndarray:
    return np.asarray(jax.nn.sigmoid(splats.opacity_logits))


def equation_9(opacity: float, copies: int) -> tuple[float, float]:
    """The double sum as it is printed, in float64: the new opacity and the factor on the scales."""
    new = 1 - (1 - opacity) ** (1 / copies)
    total = sum(
        math.comb(i - 1, k) * (-1) ** k * new ** (k + 1) / math.sqrt(k + 1)
        for i in range(1, copies + 1)
        for k in range(i)
    )
    return new, opacity / total


@jax.jit
def picture(splats: Splats):
    camera = orbit(2, width=24, height=24)[0]
    return rasterize(splats, camera, jnp.ones(3), implementation="reference").rgb


@pytest.mark.parametrize("opacity", [0.01, 0.3, 0.9, 0.999])
def test_splats_in_one_place_follow_equation_9(opacity):
    strategy = MCMCDensity(growth=1.0, opacity_threshold=1e-6)
    template = make_splats([opacity] + [1e-8] * 50)
    for copies in range(2, 52):
        splats = dataclasses.replace(template, active=jnp.arange(51) < copies)
        refined = refine(strategy, splats)
        assert int(refined.report.relocated) == copies - 1
        new, factor = equation_9(special.expit(float(splats.opacity_logits[0])), copies)
        before = {k: np.asarray(v)[0] for k, v in splats.parameters.items()}
        after = {k: np.asarray(v)[:copies] for k, v in refined.splats.parameters.items()}
        np.testing.assert_allclose(special.expit(after["opacity_logits"]), new, rtol=2e-6)
        ratio = np.exp(after["log_scales"] - before["log_scales"])
        np.testing.assert_allclose(ratio, factor, rtol=2e-6)
        for name in ("means", "quaternions", "sh"):
            assert (after[name] == before[name]).all()


def test_copies_are_not_born_dead():
    refined = refine(STRATEGY, make_splats([0.02] + [0.001] * 7))
    np.testing.assert_allclose(opacities_of(refined.splats), 0.005, rtol=1e-5)


@pytest.mark.parametrize("opacity", [0.2, 0.95])
@pytest.mark.parametrize(("copies", "tolerance"), [(2, 0.15), (8, 0.25)])
def test_relocation_hardly_changes_the_picture(opacity, copies, tolerance):
    splats = make_splats([opacity] + [0.001] * 7, num_active=copies)
    splats = dataclasses.replace(
        splats,
        means=splats.means.at[0].set(0.0).at[1:].add(20.0),  # the dead are far outside the view
        log_scales=splats.log_scales.at[0].set(jnp.log(jnp.array([0.3, 0.2, 0.1]))),
        sh=jnp.full((8, 1, 3), -1.0),
    )
    before = picture(splats)

    def change(copied):
        return float(jnp.abs(picture(copied) - before).sum() / jnp.abs(1 - before).sum())

    relocated = refine(STRATEGY, splats).splats
    assert 0 < change(relocated) < tolerance
    for name in ("opacity_logits", "log_scales"):  # half of Eq. 9 is worse
        original = getattr(splats, name)
        half = relocated.with_parameters({name: jnp.broadcast_to(original[0], original.shape)})
        assert change(relocated) < change(half)


def test_places_are_drawn_in_proportion_to_opacity():
    rng = np.random.default_rng(1)
    levels = np.linspace(0.02, 0.98, 20)
    level = rng.integers(20, size=200_000)  # so many that sums of float32 lose digits
    dead = rng.random(200_000) < 0.5
    refined = refine(STRATEGY, make_splats(np.where(dead, 0.001, levels[level])))
    source = np.asarray(refined.rows.source)[dead]
    assert not dead[source].any()
    weights = levels * np.bincount(level[~dead])
    drawn = np.bincount(level[source], minlength=20)
    assert stats.chisquare(drawn, dead.sum() * weights / weights.sum()).pvalue > 0.01


def test_growth_fills_free_slots_up_to_the_capacity():
    splats = make_splats([0.5] * 60 + [0.1] * 5, num_active=60)
    for expected, added in [(63, 3), (65, 2), (65, 0)]:  # 1.05 * 60 = 63 and 1.05 * 63 = 66.15
        refined = refine(MCMCDensity(), splats)
        splats = refined.splats
        assert int(refined.report.added) == added
        assert int(refined.report.active) == int(splats.active.sum()) == expected
    assert "65 splats: 0 relocated, 0 added" in str(refined.report)


def test_quiet_splats_stay_and_free_slots_stay_free():
    splats = make_splats([0.5] * 5 + [0.9] * 3, num_active=5)
    refined = refine(STRATEGY, splats)
    jax.tree.map(np.testing.assert_array_equal, refined.splats, splats)
    np.testing.assert_array_equal(refined.rows.source, np.arange(8))
    assert not refined.rows.fresh.any()


def test_without_a_living_splat_nothing_happens():
    splats = make_splats([0.001] * 12, num_active=4)
    refined = refine(GROWING, splats)
    jax.tree.map(np.testing.assert_array_equal, refined.splats, splats)
    assert int(refined.report.active) == 4 and not refined.rows.fresh.any()


def test_a_splat_that_is_not_a_number_relocates():
    splats = make_splats([0.5] * 8)
    splats = jax.tree.map(
        lambda leaf: leaf if leaf.dtype == bool else leaf.at[1].set(jnp.nan), splats
    )
    refined = refine(STRATEGY, splats)
    assert int(refined.report.relocated) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(refined.splats))


@settings(max_examples=60, deadline=None)
@given(
    active=hnp.arrays(bool, 12),
    logits=hnp.arrays(np.float32, 12, elements=st.floats(-30, 30, width=32)),
    seed=st.integers(0, 2**31 - 1),
)
def test_whatever_the_splats_refinement_keeps_its_rules(active, logits, seed):
    splats = dataclasses.replace(
        make_splats([0.5] * 12), active=jnp.asarray(active), opacity_logits=jnp.asarray(logits)
    )
    refined = refine(GROWING, splats, jax.random.key(seed))
    alive = active & (opacities_of(splats) > 0.005)
    before, after = active.sum(), np.asarray(refined.splats.active)
    wanted = min(12, before * 3 // 2) if alive.any() else before
    assert after.sum() == int(refined.report.active) == wanted
    assert after[active].all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(refined.splats))

    source, fresh = np.asarray(refined.rows.source), np.asarray(refined.rows.fresh)
    moved = source != np.arange(12)
    assert alive[source[moved]].all()
    assert fresh[moved].all() and fresh[source[moved]].all()
    np.testing.assert_array_equal(moved, (after & ~alive) if alive.any() else np.zeros(12, bool))
    untouched = ~fresh
    for old, new in zip(jax.tree.leaves(splats), jax.tree.leaves(refined.splats), strict=True):
        np.testing.assert_array_equal(np.asarray(new)[untouched], np.asarray(old)[untouched])


def test_the_key_decides_and_the_step_may_be_traced():
    splats = make_splats([0.5] * 20 + [0.001] * 20)
    first, again = refine(STRATEGY, splats), refine(STRATEGY, splats)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = refine(STRATEGY, splats, jax.random.key(1))
    assert (np.asarray(other.rows.source) != np.asarray(first.rows.source)).any()
    traced = jax.jit(lambda step: STRATEGY.refine(KEY, splats, jnp.zeros(40), step))(600)
    np.testing.assert_array_equal(traced.rows.source, first.rows.source)


def test_a_splat_and_its_copies_start_anew_in_the_optimizer():
    splats = make_splats([0.001] + [0.5] * 11, num_active=4)
    params = {"splats": splats.parameters}
    state = optax.adam(1e-2).init(params)
    state = jax.tree.map(lambda m: 1 + np.arange(m.size, dtype=np.float32).reshape(m.shape), state)
    refined = refine(GROWING, splats)
    fresh = np.asarray(refined.rows.fresh)
    assert fresh[[0, 4, 5]].all() and 1 <= fresh[1:4].sum() <= 3
    moved = move_moments(
        state, params, lambda p: {"splats": refined.rows.gather_moments(p["splats"])}
    )
    for before, after in zip(
        jax.tree.leaves((state[0].mu, state[0].nu)),
        jax.tree.leaves((moved[0].mu, moved[0].nu)),
        strict=True,
    ):
        expected = np.array(before)
        expected[fresh] = 0
        np.testing.assert_array_equal(after, expected)
    np.testing.assert_array_equal(moved[0].count, state[0].count)


def test_noise_has_the_published_size_and_the_shape_of_the_splat():
    n, rate, opacity = 20_000, 1e-3, 0.02
    one = make_splats([opacity])
    splats = jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0), one)
    shaken = MCMCDensity().perturb(KEY, splats, rate)
    offsets = np.asarray(shaken.means - splats.means, np.float64)

    w, x, y, z = np.asarray(one.quaternions[0] / jnp.linalg.norm(one.quaternions[0]), np.float64)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    scales = np.exp(np.asarray(one.log_scales[0], np.float64))
    covariance = rotation @ np.diag(scales**2) @ rotation.T
    # The authors' gate: 1 / (1 + exp(-100 ((1 - o) - 0.995))).
    size = rate * 5e5 / (1 + np.exp(-100 * ((1 - opacity) - 0.995)))
    expected = size**2 * covariance @ covariance
    error = np.abs(np.cov(offsets.T) - expected).max() / np.abs(expected).max()
    assert error < 0.03
    assert np.abs(offsets.mean(axis=0)).max() < 0.03 * np.sqrt(expected.max())
    for name in ("log_scales", "quaternions", "opacity_logits", "sh", "active"):
        np.testing.assert_array_equal(getattr(shaken, name), getattr(splats, name))


def test_noise_spares_opaque_splats_and_free_slots():
    splats = make_splats([0.005, 0.9, 0.005, 0.005], num_active=3)
    strategy = MCMCDensity()
    peaks = jnp.array([0.005, 0.005, 0.9, 0.9])

    def moves(peak_opacities=None):
        shaken = strategy.perturb(KEY, splats, 5e-4, peak_opacities)
        return np.abs(np.asarray(shaken.means - splats.means)).max(axis=-1)

    assert (moves()[[0, 2]] > 1e-3).all() and moves()[1] < 1e-6 and moves()[3] == 0
    assert (moves(peaks)[[0, 1]] > 1e-3).all() and moves(peaks)[2] < 1e-6 and moves(peaks)[3] == 0
    assert (strategy.perturb(KEY, splats, 0.0).means == splats.means).all()
    assert AdaptiveDensity().perturb(KEY, splats, 5e-4) is splats


def test_penalties_are_weighted_means_over_active_splats():
    splats = make_splats([0.1, 0.5, 0.9, 0.9], num_active=3)
    splats = dataclasses.replace(splats, log_scales=splats.log_scales.at[3].set(jnp.inf))
    strategy = MCMCDensity(opacity_weight=0.02, scale_weight=0.5)
    penalties = strategy.regularization(splats)
    assert set(penalties) == {"opacity", "scale"}
    np.testing.assert_allclose(penalties["opacity"], 0.02 * (0.1 + 0.5 + 0.9) / 3, rtol=1e-5)
    np.testing.assert_allclose(
        penalties["scale"], 0.5 * np.exp(splats.log_scales[:3]).mean(), rtol=1e-5
    )

    def total(parameters):
        return sum(strategy.regularization(splats.with_parameters(parameters)).values())

    gradient = jax.grad(total)(splats.parameters)
    assert (gradient["opacity_logits"][:3] > 0).all() and gradient["opacity_logits"][3] == 0
    assert (gradient["log_scales"][:3] > 0).all() and not gradient["log_scales"][3].any()
    assert not MCMCDensity(opacity_weight=0.0, scale_weight=0.0).regularization(splats)
    assert not AdaptiveDensity().regularization(splats)


@pytest.fixture(scope="module")
def lives():
    """Six splats, all but the last one alive in some window; their peaks over 24 frames."""
    field = build_field({"name": "lifespan", "base": {"name": "identity"}, "knots": 5})
    splats = make_splats([0.5, 0.5, 0.001, 0.001, 0.5, 0.5])
    params = field.init(KEY, splats)
    curves = jnp.zeros((5, 6)).at[1:, 0].set(-9.0).at[2, 2:4].set(9.0).at[:, 5].set(-9.0)
    params = params | {"curves": curves}

    @jax.jit
    def peaks(splats, params):
        def at(t):
            return jax.nn.sigmoid(field.apply(params, splats, t).opacity_logits)

        return jax.vmap(at)(jnp.linspace(0, 1, 25)).max(axis=0)

    return field, splats, params, peaks


def test_a_splat_is_as_alive_as_at_its_peak(lives):
    _, splats, params, peaks = lives
    peak_opacities = peaks(splats, params)
    canonical = AdaptiveDensity().refine(KEY, splats, jnp.zeros(6), 600)
    np.testing.assert_array_equal(canonical.splats.active, [1, 1, 0, 0, 1, 1])
    adaptive = AdaptiveDensity().refine(KEY, splats, jnp.zeros(6), 600, peak_opacities)
    np.testing.assert_array_equal(adaptive.splats.active, [1, 1, 1, 1, 1, 0])
    mcmc = refine(STRATEGY, splats, peak_opacities=peak_opacities)
    assert int(mcmc.report.relocated) == 1 and int(mcmc.rows.source[5]) != 5


def test_equation_9_holds_at_the_peak(lives):
    field, splats, params, peaks = lives
    only_third = jnp.arange(6) == 2
    splats = dataclasses.replace(splats, active=only_third)
    before = float(peaks(splats, params)[2])
    refined = refine(MCMCDensity(growth=4.0), splats, peak_opacities=peaks(splats, params))
    assert int(refined.report.active) == 4
    after = peaks(refined.splats, field.gather(params, refined.rows.source))
    new, factor = equation_9(before, 4)
    np.testing.assert_allclose(after[refined.splats.active], new, rtol=1e-4)
    ratio = np.exp(refined.splats.log_scales - splats.log_scales[2])[refined.splats.active]
    np.testing.assert_allclose(ratio, factor, rtol=1e-4)


def fit(strategy, splats, cameras, images, *, steps=200, rate=2e-3):
    """A small optimization that does all that a strategy asks for; returns splats and PSNR."""
    rates = {name: 10 * rate for name in splats.parameters} | {"means": rate}
    adam = optax.scale_by_adam(eps=1e-15)

    def errors(parameters, splats, index):
        splats = splats.with_parameters(parameters)
        difference = rasterize(splats, cameras[index], jnp.ones(3)).rgb - images[index]
        penalties = sum(strategy.regularization(splats).values())
        return jnp.abs(difference).mean() + penalties, jnp.mean(difference**2)

    @jax.jit
    def step(splats, state, index, key):
        gradients, mse = jax.grad(errors, has_aux=True)(splats.parameters, splats, index)
        updates, state = adam.update(gradients, state)
        moved = {k: value - rates[k] * updates[k] for k, value in splats.parameters.items()}
        return strategy.perturb(key, splats.with_parameters(moved), rate), state, mse

    state, trace = adam.init(splats.parameters), []
    for number in range(1, steps + 1):
        key = jax.random.fold_in(KEY, number)
        splats, state, mse = step(splats, state, number % len(images), key)
        trace.append(float(mse))
        if strategy.refines_at(number):
            refined = refine(strategy, splats, key)
            splats = refined.splats
            state = move_moments(state, splats.parameters, refined.rows.gather_moments)
    return splats, -10 * np.log10(np.mean(trace[-3:]))


def test_a_fit_gains_from_the_slots_that_mcmc_puts_to_use():
    cameras = jax.tree.map(jnp.asarray, orbit(4, width=32, height=32))[:3]
    rng = np.random.default_rng(0)
    points = rng.normal(size=(400, 3)).astype(np.float32)
    points *= 0.4 / np.linalg.norm(points, axis=1, keepdims=True)
    ball = Splats.from_points(points, 0.5 + 0.5 * np.sin(12 * points), scale=0.04, opacity=0.9)
    images = rasterize(ball, cameras, jnp.ones(3)).rgb
    splats = random_cube(150, key=KEY, capacity=300)
    splats = dataclasses.replace(splats, opacity_logits=splats.opacity_logits.at[:50].set(-7.0))

    _, without = fit(AdaptiveDensity(stop=0, reset_every=0), splats, cameras, images)
    mcmc = MCMCDensity(start=20, stop=150, every=10, growth=1.2, noise_scale=1e4)
    fitted, gained = fit(mcmc, splats, cameras, images)
    assert int(fitted.active.sum()) == 300
    assert (opacities_of(fitted)[:50] > 0.005).mean() > 0.9
    assert gained > without + 2.0


def test_strategies_are_built_by_name():
    strategy = build({"name": "mcmc", "stop": 801, "every": 100})
    assert [step for step in range(2000) if strategy.refines_at(step)] == [600, 700, 800]
    assert not any(strategy.resets_opacity_at(step) for step in range(5000))
    assert build({"name": "adaptive", "absolute": True}).absolute and not strategy.absolute
    for name in ("adaptive", "mcmc"):
        assert isinstance(build({"name": name}), DensityStrategy)
    with pytest.raises(ValueError, match="known: adaptive, mcmc"):
        build({"name": "fractal"})


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"every": 0}, "every=0 must be at least 1"),
        ({"opacity_threshold": 1.0}, "opacity_threshold=1.0 is an opacity"),
        ({"growth": 0.95}, "growth=0.95 must be a factor of at least 1"),
        ({"noise_scale": -1.0}, "noise_scale=-1.0 must be 0"),
        ({"scale_weight": math.nan}, "scale_weight=nan must be 0"),
    ],
)
def test_impossible_thresholds_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        MCMCDensity(**wrong)
