"""Poses that tracking lost are found, and get bodies that show them."""

import dataclasses

import jax
import numpy as np
import pytest

from d4d_jax import cameras, clips, metrics
from d4d_jax.data import synthetic
from gaussians import bodies, preparation
from gaussians.asset import Asset
from gaussians.captures import of_clip
from gaussians.deformation import build
from gaussians.evaluation import render_views

FRAMES = 12
NODES = {"name": "control_points", "num_nodes": 8, "neighbours": 3, "graph_neighbours": 4}
FIELD = {"name": "lifespan", "base": {"name": "keyframes", "base": NODES, "bodies": 3}}


def jumping(places):
    """The orbit of a figure that stands still, but somewhere else in every frame with a place."""
    figure = synthetic.make_scene(0)
    camera = cameras.orbit(FRAMES, width=48, height=48)
    still, still_alpha = synthetic.render(figure, camera, np.zeros(FRAMES))
    dynamic, alpha = np.array(still), np.array(still_alpha)
    for i, place in places.items():
        there = dataclasses.replace(figure, centres=figure.centres + np.array(place, np.float32))
        rgb, mask = synthetic.render(there, camera[i : i + 1], np.zeros(1))
        dynamic[i], alpha[i] = rgb[0], mask[0]
    clip = clips.standard_clip(
        FRAMES, 48, 48, dynamic=dynamic, dynamic_alpha=alpha, static=still, static_alpha=still_alpha
    )
    return of_clip(clip, 0.0)


def at_rest(capture, capacity=700):
    splats = preparation.first_splats(capture, 300, capacity, 0, jax.random.key(0))
    field = build(FIELD)
    params = field.init(jax.random.key(1), splats)
    return Asset(splats, field, params, capture.background, {})


@pytest.fixture(scope="module")
def jump():
    return jumping({i: (0.0, 0.0, 0.55) for i in range(7, 12)})


def test_the_lost_run_is_found_and_shown(jump):
    asset = at_rest(jump)
    overlap = bodies.coverage_of(asset, jump)
    assert overlap[:7].min() > 0.75 and overlap[7:].max() < 0.5
    turn = bodies.find_turn(overlap, jump)
    assert (turn.first, turn.last) == (7, 11)
    assert jump.instants[6] < turn.start < jump.instants[7] and turn.stop > 1

    splats, params = bodies.add_bodies(asset, jump, count=2, num_splats=200, key=jax.random.key(2))
    assert int(splats.active.sum()) == 500
    found = dataclasses.replace(asset, splats=splats, params=params)
    after = bodies.coverage_of(found, jump)
    assert after[7:].min() > 0.6
    np.testing.assert_allclose(after[:7], overlap[:7], atol=1e-6)  # the first body is untouched
    shown = render_views(found, jump.moving)
    before = render_views(asset, jump.moving)
    gain = metrics.psnr(shown.rgb, jump.moving.rgb) - metrics.psnr(before.rgb, jump.moving.rgb)
    assert float(np.asarray(gain)[7:].min()) > 3


def test_a_pose_in_the_middle_ends_where_the_first_body_is_right_again():
    capture = jumping({i: (0.0, 0.0, 0.55) for i in range(4, 8)})
    turn = bodies.find_turn(bodies.coverage_of(at_rest(capture), capture), capture)
    assert (turn.first, turn.last) == (4, 7)
    assert capture.instants[3] < turn.start < capture.instants[4]
    assert capture.instants[7] < turn.stop < capture.instants[8]


def test_frames_between_two_poses_are_shared_out_evenly():
    overlap = np.array([0.9] * 5 + [0.7, 0.7] + [0.2] * 5)  # 5 and 6: neither found nor lost
    capture = jumping({i: (0.0, 0.0, 0.55) for i in range(7, 12)})
    turn = bodies.find_turn(overlap, capture)
    assert capture.instants[5] < turn.start < capture.instants[6]


def test_no_body_where_nothing_is_lost_or_no_shape_agrees(jump):
    assert bodies.find_turn(np.full(FRAMES, 0.8), jump) is None
    rng = np.random.default_rng(0)
    erratic = jumping({i: rng.uniform(-0.4, 0.4, 3) for i in range(6, 12)})
    overlap = bodies.coverage_of(at_rest(erratic), erratic)
    assert overlap.min() < 0.6 and bodies.find_turn(overlap, erratic) is None


def test_bodies_fill_the_slots_there_are(jump):
    asset = at_rest(jump, capacity=350)
    splats, _ = bodies.add_bodies(asset, jump, count=1, num_splats=200, key=jax.random.key(2))
    assert bool(splats.active.all())


def test_no_body_without_slots_for_it(jump, caplog):
    asset = at_rest(jump, capacity=349)
    splats, params = bodies.add_bodies(asset, jump, count=1, num_splats=200, key=jax.random.key(2))
    assert int(splats.active.sum()) == 300 and "only 49 slots are free" in caplog.text
    assert asset.deformation.base.turns_of(params["base"]) == [(0.0, 0)]
