import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.data import synthetic
from gaussians import preparation, tracking
from gaussians.captures import of_clip
from gaussians.deformation import build, rigidity
from gaussians.reconstruct import ReconstructConfig, reconstruct
from gaussians.snapshot import FileKeeper, Interrupted
from gaussians.stages import Stage
from gaussians.tracking import Tracking

FRAMES = 12
NODES = {"name": "control_points", "num_nodes": 40, "time_resolution": FRAMES}


@pytest.fixture(scope="module")
def capture():
    return of_clip(synthetic.make_clip(0, num_frames=FRAMES, size=48), 0.0)


def with_last_frame(capture, rgb):
    frames = np.array(capture.moving.rgb)
    frames[-1] = rgb
    return dataclasses.replace(capture, moving=dataclasses.replace(capture.moving, rgb=frames))


def test_a_clip_returns_when_its_last_frame_is_nearer_to_rest_than_its_farthest(capture):
    assert tracking.returns(capture)
    away = np.roll(capture.moving.rgb[-1], 12, axis=0)
    assert not tracking.returns(with_last_frame(capture, away))
    assert not tracking.returns(dataclasses.replace(capture, still=None))
    assert not tracking.returns(dataclasses.replace(capture, still=capture.moving))
    fewer = dataclasses.replace(capture, still=capture.still[:4])
    assert not tracking.returns(fewer)
    turned = dataclasses.replace(capture.still, camera=capture.still.camera[::-1])
    assert not tracking.returns(dataclasses.replace(capture, still=turned))


def test_what_can_be_tracked_has_a_table_of_poses_at_the_bottom(capture):
    stack = {"name": "lifespan", "base": {"name": "keyframes", "base": NODES}}
    assert tracking.can_track(build(stack), capture)
    assert not tracking.can_track(build(NODES | {"motion": "mlp"}), capture)
    assert not tracking.can_track(build({"name": "identity"}), capture)


def test_the_arm_is_followed_from_one_side_at_a_time(capture):
    """An orbit of a figure whose arm swings by 0.32 and back: known in space, at every instant."""
    scene, key = synthetic.make_scene(0), jax.random.key(0)
    at_rest = ReconstructConfig(
        num_splats=400,
        capacity=400,
        deformation={"name": "identity"},
        warmup=Stage(150, static_fraction=1.0),
        coarse=Stage(0),
        fine=Stage(0),
    )
    splats = reconstruct(capture, at_rest, key).splats
    field, told = build(NODES), []
    settings = Tracking(steps=1520, pixels=48)
    tracked = tracking.track(
        field, splats, capture, settings, key, callback=lambda *facts: told.append(facts)
    )
    assert [steps for steps, *_ in told] == [*range(50, 1501, 50), 1520]
    assert np.mean([mse for *_, mse, _ in told[-3:]]) < np.mean([mse for *_, mse, _ in told[:3]])
    assert not any(np.any(table[0]) for table in tracked["poses"].values())  # at rest
    means = np.asarray(splats.means)
    inside = (means - scene.centres[:, None]) / scene.half_axes[:, None]
    part = np.linalg.norm(inside, axis=-1).argmin(axis=0)
    arm, trunk = part == 2, (part == 0) | (part == 3)
    for time in (4 / 11, 6 / 11):
        truth = scene.centres_at(time)[2] - scene.centres[2]
        moved = np.asarray(field.apply(tracked, splats, time).means) - means
        assert np.linalg.norm(moved[arm].mean(axis=0) - truth) < 0.3 * np.linalg.norm(truth)
        assert np.linalg.norm(moved[trunk], axis=-1).mean() < 0.1 * np.linalg.norm(truth)


def test_equal_keys_give_equal_poses(capture):
    splats = preparation.first_splats(capture, 60, 60, 0, jax.random.key(0))
    field = build(NODES | {"num_nodes": 6, "graph_neighbours": 3})  # fewer than links are asked for
    settings = Tracking(steps=60, pixels=24)
    one, other, different = (
        tracking.track(field, splats, capture, settings, jax.random.key(seed))["poses"]
        for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert np.any(one["translations"] != different["translations"])


def test_of_several_starts_the_one_with_the_least_loss_is_kept(capture):
    splats = preparation.first_splats(capture, 60, 60, 0, jax.random.key(0))
    field, told = build(NODES), []
    settings = Tracking(steps=70, starts=4, pixels=24)
    key = jax.random.key(1)  # neither the first nor the last of its starts is the best
    kept = tracking.track(
        field, splats, capture, settings, key, callback=lambda *facts: told.append(facts)
    )["poses"]
    assert [steps for steps, *_ in told] == [50, 70, 120, 140, 190, 210, 260, 280]
    ends = {loss: params["poses"] for _, loss, _, params in told[1::2]}
    assert len(ends) == 4
    jax.tree.map(np.testing.assert_array_equal, kept, ends[min(ends)])
    alone = tracking.track(field, splats, capture, Tracking(steps=70, pixels=24), key)["poses"]
    jax.tree.map(np.testing.assert_array_equal, alone, told[1][3]["poses"])


def test_frames_without_alpha_are_tracked_by_their_colours(capture):
    bare = dataclasses.replace(capture.moving, alpha=None)
    splats = preparation.first_splats(capture, 60, 60, 0, jax.random.key(0))
    field = build(NODES)
    poses = tracking.track(
        field,
        splats,
        dataclasses.replace(capture, moving=bare),
        Tracking(steps=50, pixels=24),
        jax.random.key(0),
    )["poses"]
    assert np.any(poses["translations"]) and np.all(np.isfinite(poses["translations"]))


def test_frames_that_are_not_finite_end_it(capture):
    frames = np.full_like(capture.moving.rgb, np.nan)
    broken = dataclasses.replace(capture, moving=dataclasses.replace(capture.moving, rgb=frames))
    splats = preparation.first_splats(capture, 60, 60, 0, jax.random.key(0))
    field = build(NODES)
    with pytest.raises(FloatingPointError, match="became nan at step 0 of tracking"):
        tracking.track(field, splats, broken, Tracking(steps=50), jax.random.key(0))


def test_a_step_is_spread_but_not_weakened():
    """What pushes all nodes alike moves them alike; what pushes one moves its neighbours less."""
    points = jax.random.normal(jax.random.key(0), (30, 3))
    graph = rigidity.neighbour_graph(points, 5)
    smooth = tracking._Smoothing(graph, 9, Tracking(spread=(20.0, 1.0)))
    for done in (0.0, 1.0):
        for matrix in (smooth.space(done), smooth.time(done)):
            np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-4)
            assert np.all(np.asarray(matrix) > 0)
            assert np.all(np.diag(matrix) > matrix.mean(axis=1))
    assert np.trace(smooth.space(0.0)) < np.trace(smooth.space(1.0))  # ever more local


def test_new_instants_start_from_their_neighbours():
    table = np.zeros((8, 1, 1), np.float32)
    table[[0, 1, 6, 7], 0, 0] = [0, 2, 5, 4]
    before, now = np.array([0, 1, 6, 7]), np.array([0, 1, 2, 3, 4, 5, 6, 7])
    opened = tracking._open({"translations": jnp.asarray(table)}, before, now, 0.5)
    expected = [0, 2, 3, 3.5, 5.75, 5.5, 5, 4]
    np.testing.assert_allclose(opened["translations"][:, 0, 0], expected)
    same = tracking._open({"translations": jnp.asarray(table)}, np.zeros(0, int), now, 0.5)
    np.testing.assert_array_equal(same["translations"], table)


def test_views_are_those_of_open_instants_and_half_of_them_the_newest():
    rng, times = np.random.default_rng(0), np.linspace(0, 1, 24)
    drawn = tracking._draw_views(rng, times, 6.5 / 23, 3 / 23, 1000)
    inwards = np.minimum(drawn, 23 - drawn)
    assert set(inwards) == set(range(7))
    assert 0.6 < np.mean(inwards > 3) < 0.8  # half, and their share of the other half
    every = tracking._draw_views(rng, times, 0.6, 3 / 23, 48)
    np.testing.assert_array_equal(np.bincount(every), 2)
    late = tracking._draw_views(rng, np.array([0.4, 0.5]), 0.1, 0.1, 10)  # none is open yet
    assert set(late) == {0, 1} or set(late) == {0}


@pytest.mark.parametrize(
    "spec",
    [
        NODES,
        {"name": "lifespan", "base": NODES},
        {"name": "lifespan", "base": {"name": "keyframes", "base": NODES, "bodies": 2}},
    ],
)
def test_the_bottom_of_a_stack_is_found_and_replaced(capture, spec):
    splats = preparation.first_splats(capture, 60, 60, 0, jax.random.key(0))
    field = build(spec)
    params = field.init(jax.random.key(0), splats)
    base, own = tracking.bottom(field, params)
    new = jax.tree.map(lambda leaf: leaf + 0.1, own)
    changed = tracking.with_bottom(field, params, new)
    jax.tree.map(np.testing.assert_array_equal, tracking.bottom(field, changed)[1], new)
    assert jax.tree.structure(changed) == jax.tree.structure(params)
    for t in (0.0, 0.4):
        expected = base.apply(new, splats, t).means
        np.testing.assert_allclose(field.apply(changed, splats, t).means, expected, atol=1e-6)


CONFIG = ReconstructConfig(
    num_splats=60,
    capacity=100,
    deformation={"name": "lifespan", "knots": 3, "base": NODES},
    warmup=Stage(4, static_fraction=1.0),
    coarse=Stage(6),
    fine=Stage(6, static_fraction=0.3),
    tracking={"steps": 150, "pixels": 24},
)


def test_tracking_is_the_coarse_stage_of_a_clip_that_returns(capture):
    seen = []
    asset = reconstruct(capture, CONFIG, jax.random.key(0), seen.append)
    assert [(p.stage, p.step) for p in seen if p.stage == "coarse"] == [
        ("coarse", 6),
        ("coarse", 8),
        ("coarse", 10),
    ]
    assert seen[-1].step == seen[-1].total == 16
    assert np.any(tracking.bottom(asset.deformation, asset.params)[1]["poses"]["translations"])
    away = with_last_frame(capture, np.roll(capture.moving.rgb[-1], 12, axis=0))
    for source, config in (
        (away, CONFIG),
        (capture, dataclasses.replace(CONFIG, tracking=Tracking(steps=0))),
        (capture, dataclasses.replace(CONFIG, nodes=Stage(2))),
    ):
        seen.clear()
        reconstruct(source, config, jax.random.key(0), seen.append)
        assert [p.step for p in seen] == list(range(1, 17 + config.nodes.steps))


@pytest.mark.parametrize("stop", [5, 7, 9])  # in tracking, at its end, after it
def test_an_interrupted_run_goes_on_bit_for_bit(capture, tmp_path, stop):
    expected = reconstruct(capture, CONFIG, jax.random.key(0))
    calls = iter(range(1, 100))
    keeper = FileKeeper(tmp_path / "snapshot.npz", stops=lambda: next(calls) == stop)
    with pytest.raises(Interrupted, match="Stopped after step"):
        reconstruct(capture, CONFIG, jax.random.key(0), keeper=keeper)
    resumed = reconstruct(capture, CONFIG, jax.random.key(0), keeper=FileKeeper(keeper.path))
    jax.tree.map(
        np.testing.assert_array_equal,
        (resumed.splats, resumed.params),
        (expected.splats, expected.params),
    )


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"steps": -1}, "steps of at least 0"),
        ({"pixels": 0}, "starts, pixels and neighbours of at least 1"),
        ({"starts": 0}, "starts, pixels and neighbours of at least 1"),
        ({"opening": 0.0}, r"opening must lie in \(0, 1\]; got 0.0"),
        ({"spread": (20.0, 0.0)}, "must be positive"),
    ],
)
def test_mistakes(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tracking(**settings)
    with pytest.raises(ValueError, match=sentence):
        ReconstructConfig(tracking=settings)
