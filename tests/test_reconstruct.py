import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax import cameras, clips, metrics
from d4d_jax.data import synthetic
from d4d_jax.metrics import load_stlpips
from gaussians import preparation
from gaussians.asset import pair_capacity
from gaussians.captures import of_clip
from gaussians.deformation import build
from gaussians.densify import AdaptiveDensity, MCMCDensity
from gaussians.losses import LossWeights
from gaussians.optimization import LearningRates, StepSettings, create_state, refine, step
from gaussians.reconstruct import ReconstructConfig
from gaussians.reconstruct import reconstruct as run
from gaussians.stages import Stage, view_order

FRAMES = 8
TOO_FEW_PAIRS = 256
FIELD = {
    "name": "lifespan",
    "knots": 5,
    "base": {
        "name": "hexplane",
        "spatial_resolution": 8,
        "time_resolution": FRAMES,
        "channels": 4,
        "width": 16,
    },
}
CONFIG = ReconstructConfig(
    num_splats=200,
    capacity=300,
    deformation=FIELD,
    warmup=Stage(30, static_fraction=1.0),
    coarse=Stage(80, static_fraction=0.25, curriculum=0.5, end_rate=0.5),
    tracking={"steps": 0},  # tests/test_tracking.py
    fine=Stage(160, static_fraction=0.25),
    density=AdaptiveDensity(start=110, stop=200, every=40, reset_every=0),
    rates=LearningRates(planes=2e-2, network=5e-3),  # a short run takes long steps
)
SHORT = dataclasses.replace(
    CONFIG, warmup=Stage(2, static_fraction=1.0), coarse=Stage(2), fine=Stage(2)
)


@pytest.fixture(scope="module")
def clip():
    """A figure that rises by a quarter of its height and comes down again."""
    figure = synthetic.make_scene(0)
    scene = dataclasses.replace(figure, travel=np.tile([0.0, 0.0, 0.25], (len(figure.centres), 1)))
    camera = cameras.orbit(FRAMES, width=32, height=32)
    times = np.linspace(0, 1, FRAMES, dtype=np.float32)
    dynamic, dynamic_alpha = synthetic.render(scene, camera, times)
    static, static_alpha = synthetic.render(scene, camera, np.zeros_like(times))
    front, front_alpha = synthetic.render(scene, cameras.stack([camera[0]] * FRAMES), times)
    return clips.OrbitClip(
        camera, times, dynamic, static, front, dynamic_alpha, static_alpha, front_alpha
    )


@pytest.fixture(scope="module")
def asset(clip):
    return run(clip, CONFIG, jax.random.key(0))


def dynamic_psnr(asset, clip):
    video = asset.render_video(clip.camera, clip.timestamps)
    return float(jnp.mean(metrics.psnr(video, clip.dynamic)))


def assert_same(one, other):
    for a, b in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


def leaves(asset):
    return jax.tree.leaves((asset.splats, asset.params))


def test_a_moving_asset_beats_a_static_one_clearly(asset, clip):
    still = dataclasses.replace(CONFIG, deformation={"name": "identity"})
    assert dynamic_psnr(asset, clip) > dynamic_psnr(run(clip, still, jax.random.key(0)), clip) + 4


def test_the_canonical_pose_is_the_static_orbit(asset, clip):
    times = np.full(FRAMES, asset.meta["static_time"])
    video = asset.render_video(clip.camera, times)
    assert float(jnp.mean(metrics.psnr(video, clip.static))) > 24


def test_front_frames_play_no_part_and_the_seed_decides(asset, clip):
    rng = np.random.default_rng(0)
    noise = rng.random(np.shape(clip.front)).astype(np.float32)
    changed = dataclasses.replace(clip, front=noise, front_alpha=None)
    assert_same(run(changed, CONFIG, jax.random.key(0)), asset)
    other = run(clip, SHORT, jax.random.key(1))
    assert not np.array_equal(other.splats.means, run(clip, SHORT, jax.random.key(0)).splats.means)


def test_callback_sees_every_step_and_splats_grow_within_the_capacity(clip):
    seen = []
    config = dataclasses.replace(
        SHORT,
        fine=Stage(4),
        density=AdaptiveDensity(
            start=4,
            stop=100,
            every=2,
            gradient_threshold=1e-7,
            reset_every=0,
            opacity_threshold=0.0,
        ),
    )
    asset = run(clip, config, jax.random.key(0), seen.append)
    assert [progress.step for progress in seen] == list(range(1, 9))
    assert [p.stage for p in seen] == ["warmup"] * 2 + ["coarse"] * 2 + ["fine"] * 4
    assert seen[-1].total == 8 and seen[-1].eta == 0
    assert seen[0].splats == 200 and seen[-1].splats == 300 == asset.meta["splats"]
    assert all(np.isfinite([p.loss, p.psnr, p.eta]).all() for p in seen)


def test_too_small_a_pair_list_is_enlarged_without_a_trace_in_the_result(clip):
    roomy = dataclasses.replace(SHORT, coarse=Stage(0), fine=Stage(0), implementation="tiled")
    tight = dataclasses.replace(roomy, pairs_per_splat=0.5)
    assert pair_capacity(tight.pairs_per_splat * tight.capacity) == TOO_FEW_PAIRS
    assert_same(run(clip, tight, jax.random.key(0)), run(clip, roomy, jax.random.key(0)))


def make_state(clip, pairs):
    """A state, views and settings like the warm-up of the test above, to share its compilation."""
    capture = of_clip(clip, 0.0)
    views = preparation.views_of(capture)
    splats = preparation.first_splats(capture, 200, 300, 0, jax.random.key(0))
    field = build(FIELD)
    settings = StepSettings(
        None,
        CONFIG.weights,
        CONFIG.rates,
        CONFIG.density,
        background=clip.background,
        pairs=pairs,
        implementation="tiled",
    )
    params = jax.jit(field.init)(jax.random.key(1), splats)
    return create_state(splats, params, CONFIG.rates), views, settings


def test_a_step_that_overflows_changes_nothing_and_says_so(clip):
    state, views, settings = make_state(clip, TOO_FEW_PAIRS)
    before = jax.tree.map(np.array, state)
    after, report = step(
        state, views, jnp.asarray([0]), jnp.asarray(1.0), jax.random.key(0), settings=settings
    )
    assert int(report.overflow) > 0
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, after))


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_first_step_moves_every_group_at_its_rate(clip, rate):
    state, views, settings = make_state(clip, pair_capacity(8 * CONFIG.capacity))
    before = jax.tree.map(np.array, state.params["splats"])
    state, _ = step(
        state, views, jnp.asarray([0]), jnp.asarray(rate), jax.random.key(0), settings=settings
    )
    for name, value in state.params["splats"].items():
        largest = np.abs(np.asarray(value) - before[name]).max()
        assert largest == pytest.approx(rate * getattr(settings.rates, name), rel=1e-2)


def test_frames_that_are_not_finite_stop_the_run_with_the_step(clip):
    broken = dataclasses.replace(clip, dynamic=np.full_like(clip.dynamic, np.nan))
    with pytest.raises(FloatingPointError, match="became nan at step 0 of the coarse stage"):
        run(broken, SHORT, jax.random.key(0))


def test_a_clip_without_static_orbit_or_alpha_works(clip):
    bare = dataclasses.replace(
        clip, static=None, static_alpha=None, dynamic_alpha=None, front=None, front_alpha=None
    )
    seen = []
    asset = run(bare, SHORT, jax.random.key(0), seen.append)
    assert {progress.stage for progress in seen} == {"coarse", "fine"}
    assert asset.at(0.5).means.shape == (300, 3)
    with pytest.raises(ValueError, match="no dynamic orbit"):
        run(dataclasses.replace(clip, dynamic=None), SHORT, jax.random.key(0))


def test_an_asset_draws_any_view_at_any_time(asset, clip):
    render = asset.render(clip.camera[3].resized(20, 24), 0.4, background=(0.0, 0.0, 0.0))
    assert render.rgb.shape == (24, 20, 3) and render.alpha.shape == (24, 20)
    assert float(render.rgb[0, 0].max()) == 0
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]; got 1.5"):
        asset.at(1.5)


def test_static_time_is_found_by_comparison(clip):
    assert preparation.find_static_time(clip) == 0
    elsewhere = np.roll(clip.static[0], 3, axis=1)
    late = dataclasses.replace(clip, static=np.stack([elsewhere, *clip.dynamic[1:]]))
    assert preparation.find_static_time(late) == pytest.approx(1 / (FRAMES - 1))
    assert preparation.find_static_time(dataclasses.replace(clip, static=None)) == 0


def test_views_are_drawn_as_the_stage_says():
    stage = Stage(400, static_fraction=0.25, curriculum=0.5)
    order, opened = view_order(jax.random.key(0), stage, np.arange(12), num_still=12)
    order = order[:, 0]
    dynamic = order < 12
    assert np.all(order[dynamic] <= opened[dynamic]) and np.all(np.diff(opened) >= 0)
    assert opened[0] == 1 and opened[199] == 10 and np.all(opened[200:] == 11)
    assert 0.17 < np.mean(~dynamic) < 0.33 and order.max() < 24
    alone, _ = view_order(jax.random.key(0), stage, np.arange(12), num_still=0)
    assert alone.max() < 12
    pairs, _ = view_order(jax.random.key(0), Stage(60, views=2), np.arange(12), num_still=12)
    counts = np.bincount(pairs.ravel())
    assert pairs.shape == (60, 2)
    assert np.all(counts == 10)  # every view as often as any other
    twice = np.repeat(np.arange(6), 2)  # two cameras see each instant
    order, opened = view_order(jax.random.key(0), stage, twice, num_still=0)
    assert np.all(twice[order[:, 0]] <= opened) and opened[0] == 1 and opened[-1] == 5
    assert set(order.ravel()) == set(range(12))
    one, opened = view_order(jax.random.key(0), stage, np.zeros(3, int), num_still=0)
    assert set(one.ravel()) == {0, 1, 2} and not opened.any()


def test_views_hold_dynamic_then_static_frames_at_the_static_time(clip):
    views = preparation.views_of(of_clip(clip, 0.25), scale=0.5)
    assert views.rgb.shape == (2 * FRAMES, 16, 16, 3) and views.alpha.shape == (16, 16, 16)
    np.testing.assert_allclose(views.timestamps[FRAMES:], 0.25)
    np.testing.assert_allclose(
        views.rgb[3], clip.dynamic[3].reshape(16, 2, 16, 2, 3).mean((1, 3)), atol=1e-5
    )


def test_bad_settings_are_explained():
    with pytest.raises(ValueError, match="capacity of 100 cannot hold num_splats=110"):
        ReconstructConfig(num_splats=110, capacity=100)
    with pytest.raises(ValueError, match=r"static_fraction must lie in \[0, 1\]; got 1.5"):
        Stage(10, static_fraction=1.5)
    with pytest.raises(ValueError, match="cannot be negative"):
        Stage(-1)


def test_opacities_are_reset_when_the_density_says_so(clip):
    density = AdaptiveDensity(start=100, stop=200, every=100, reset_every=6)
    reset = run(clip, dataclasses.replace(SHORT, density=density), jax.random.key(0))
    opacities = jax.nn.sigmoid(reset.splats.opacity_logits[reset.splats.active])
    assert 0.001 < float(opacities.max()) <= density.reset_opacity_to + 1e-6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"static_time": 2.0}, r"static_time must lie in \[0, 1\]; got 2.0"),
        ({"sh_degree": 5}, "sh_degree must be 0, 1, 2 or 3; got 5"),
        ({"implementation": "fastest"}, "There is no rasterizer 'fastest'"),
        ({"deformation": {"name": "jelly"}}, "Unknown deformation 'jelly'"),
        ({"num_splats": 0}, "num_splats=0 must be at least 1"),
        ({"body_splats": 3}, "body_splats=3 at least 4"),
    ],
)
def test_settings_are_checked_before_anything_runs(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=r"start_rate=0.0 and end_rate=0.1 must be above 0"):
        Stage(3, start_rate=0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"deformation": {"name": "control_points", "num_nodes": 16, "time_resolution": FRAMES}},
        {"density": {"name": "mcmc", "start": 40, "stop": 200, "every": 20, "noise_scale": 1e5}},
        {"fine": Stage(80, views=2, static_fraction=0.25)},
    ],
    ids=["control_points", "mcmc", "two_views"],
)
def test_parts_are_swapped_by_name_and_still_move_the_object(clip, changes):
    swapped = run(clip, dataclasses.replace(CONFIG, **changes), jax.random.key(0))
    still = dataclasses.replace(swapped, deformation=build({"name": "identity"}), params={})
    assert dynamic_psnr(swapped, clip) > dynamic_psnr(still, clip) + 2


def test_mcmc_shakes_splats_from_step_to_step(clip):
    state, views, settings = make_state(clip, pair_capacity(8 * CONFIG.capacity))
    noisy = dataclasses.replace(settings, density=MCMCDensity(noise_scale=1e6, noise_opacity=1.0))
    index, rate = jnp.asarray([0]), jnp.asarray(1.0)
    copies = [jax.tree.map(jnp.array, state) for _ in range(3)]
    calm, one, other = (
        step(copy, views, index, rate, jax.random.key(seed), settings=choice)[0]
        for copy, seed, choice in zip(copies, (0, 0, 1), (settings, noisy, noisy), strict=True)
    )
    means = [np.asarray(s.params["splats"]["means"]) for s in (calm, one, other)]
    assert np.abs(means[1] - means[0]).max() > 1e-3 and np.abs(means[2] - means[1]).max() > 1e-3


def test_the_peak_over_time_saves_short_lived_splats_from_pruning(clip):
    splats = preparation.first_splats(of_clip(clip, 0.0), 50, 80, 0, jax.random.key(0))
    faint = dataclasses.replace(splats, opacity_logits=jnp.full(80, -7.0))
    field = build({"name": "lifespan", "knots": 3, "base": {"name": "identity"}})
    params = field.init(jax.random.key(1), faint)
    lit = params | {"curves": params["curves"].at[1, :10].set(7.0)}
    np.testing.assert_allclose(field.peak_opacities(lit, faint)[:10], 0.5, atol=1e-6)
    state = create_state(faint, lit, CONFIG.rates)
    refined, report = refine(state, jax.random.key(2), 120, density=CONFIG.density, field=field)
    assert int(report.pruned) == 40 and np.asarray(refined.active)[:10].all()


def test_a_perceptual_loss_takes_part_when_it_has_a_weight(clip):
    weighted = dataclasses.replace(
        SHORT, warmup=Stage(0), coarse=Stage(0), weights=LossWeights(lpips=0.5)
    )
    with pytest.raises(ValueError, match="loss lpips has a weight but no network"):
        run(clip, weighted, jax.random.key(0))
    losses, distance = [], load_stlpips()
    for config in (weighted, dataclasses.replace(weighted, weights=LossWeights())):
        seen = []
        run(clip, config, jax.random.key(0), seen.append, perceptual=distance)
        losses.append(seen[0].loss)
    assert losses[1] + 0.05 < losses[0] < losses[1] + 0.5
