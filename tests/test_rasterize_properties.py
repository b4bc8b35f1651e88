"""gaussians.rasterize: what must hold for any splats, searched for counter-examples."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as numbers
from splat_oracle import IMPLEMENTATIONS

from d4d_jax.cameras import look_at
from gaussians.projection import rotation_matrices
from gaussians.rasterize import rasterize
from gaussians.types import Camera, Splats

N, WIDTH, HEIGHT = 9, 22, 17
BACKGROUND = np.array([0.1, 0.9, 0.4], np.float32)
INTRINSICS = np.array([[30, 0, 10.3], [0, 28, 9.1], [0, 0, 1]], np.float32)
POSE = look_at(np.array([1.5, -1.0, 0.8]))
FAST = pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "reference"])
search = hypothesis.settings(max_examples=40, deadline=None, derandomize=True)


def floats(low: float, high: float, shape: tuple[int, ...]):
    return numbers.arrays(np.float32, shape, elements=st.floats(low, high, width=32))


@st.composite
def scenes(draw) -> dict[str, np.ndarray]:
    """Splats around the origin, some of them huge, tiny, thin or transparent."""
    apart = 0.013 * np.arange(N)[:, None] * POSE[2, :3]  # no two at one depth
    return {
        "means": draw(floats(-1.0, 1.0, (N, 3))) + apart.astype(np.float32),
        "log_scales": draw(floats(-6.0, 0.5, (N, 3))),
        "quaternions": draw(floats(-0.875, 0.875, (N, 4))) + np.eye(1, 4, dtype=np.float32),
        "opacity_logits": draw(floats(-8.0, 8.0, (N,))),
        "sh": draw(floats(-1.0, 2.0, (N, 1, 3))),
    }


def render(parameters, pose, intrinsics, name, width, height):
    splats = Splats(**parameters, active=jnp.ones(N, bool))
    camera = Camera(pose, intrinsics, width, height)
    return rasterize(splats, camera, BACKGROUND, implementation=name, capacity=512)


RENDER = jax.jit(render, static_argnums=(3, 4, 5))


def image(parameters, pose=POSE, intrinsics=INTRINSICS, *, name, width=WIDTH, height=HEIGHT):
    got = RENDER(parameters, pose, intrinsics, name, width, height)
    return np.asarray(got.rgb), got


def close(a: np.ndarray, b: np.ndarray, tolerance: float) -> bool:
    """Up to pixels in which rounding moves a splat over the threshold of 1/255."""
    error = np.abs(a - b).max(axis=-1)
    return bool(np.mean(error > tolerance) <= 0.01 and error.max() < 0.02)


@FAST
@search
@hypothesis.given(scene=scenes(), seed=st.integers(0, 2**16))
def test_order_of_the_splats_does_not_matter(name, scene, seed):
    hypothesis.assume(np.diff(np.sort(scene["means"] @ POSE[2, :3])).min() > 1e-5)
    order = np.random.default_rng(seed).permutation(N)
    shuffled = {key: value[order] for key, value in scene.items()}
    first, got = image(scene, name=name)
    second, again = image(shuffled, name=name)
    np.testing.assert_allclose(first, second, atol=1e-6)
    np.testing.assert_allclose(np.asarray(got.radii)[order], again.radii, rtol=1e-6)


@FAST
@search
@hypothesis.given(scene=scenes(), turn=floats(0.125, 1.0, (4,)), shift=floats(-2.0, 2.0, (3,)))
def test_moving_splats_and_camera_together_does_not_matter(name, scene, turn, shift):
    hypothesis.assume(np.diff(np.sort(scene["means"] @ POSE[2, :3])).min() > 1e-4)
    turn = turn / np.linalg.norm(turn)
    rotation = np.asarray(rotation_matrices(turn[None])[0], float)
    w, v = scene["quaternions"][:, :1], scene["quaternions"][:, 1:]
    moved = scene | {
        "means": (scene["means"] @ rotation.T + shift).astype(np.float32),
        "quaternions": np.concatenate(
            [turn[0] * w - v @ turn[1:, None], turn[0] * v + w * turn[1:] + np.cross(turn[1:], v)],
            axis=-1,
        ).astype(np.float32),
    }
    motion = np.eye(4)
    motion[:3, :3], motion[:3, 3] = rotation, shift
    pose = (POSE @ np.linalg.inv(motion)).astype(np.float32)
    assert close(image(scene, name=name)[0], image(moved, pose, name=name)[0], 2e-3)


@FAST
@search
@hypothesis.given(scene=scenes())
def test_an_image_is_put_together_from_crops_with_their_own_principal_points(name, scene):
    # Far beside an image the linearisation is clamped: the splats lie near the middle.
    scene["means"] *= 0.04
    whole, _ = image(scene, name=name)
    x, y = WIDTH // 2, HEIGHT // 2 + 1
    rows = []
    for top, height in ((0, y), (y, HEIGHT - y)):
        row = []
        for left, width in ((0, x), (x, WIDTH - x)):
            moved = INTRINSICS - np.array([[0, 0, left], [0, 0, top], [0, 0, 0]], np.float32)
            crop, _ = image(scene, intrinsics=moved, name=name, width=width, height=height)
            row.append(crop)
        rows.append(np.concatenate(row, axis=1))
    assert close(np.concatenate(rows), whole, 1e-5)


@FAST
@search
@hypothesis.given(scene=scenes())
def test_alpha_is_a_share_and_colours_lie_between(name, scene):
    rgb, got = image(scene, name=name)
    alpha, depth = np.asarray(got.alpha), np.asarray(got.expected_depth)
    assert alpha.min() >= 0.0 and alpha.max() <= 1.0
    colours = np.maximum(0.28209479 * scene["sh"][:, 0] + 0.5, 0.0)
    low = np.minimum(colours.min(0), BACKGROUND)
    high = np.maximum(colours.max(0), BACKGROUND)
    assert np.all(rgb >= low - 1e-5) and np.all(rgb <= high + 1e-5)
    z = scene["means"] @ POSE[2, :3] + POSE[2, 3]
    assert np.all(depth[alpha > 1e-3] >= z.min() * 0.999)
    assert np.all(depth[alpha > 1e-3] <= z.max() * 1.001)


@FAST
@search
@hypothesis.given(scene=scenes())
def test_what_is_not_visible_has_no_gradient(name, scene):
    gradients, radii = GRADIENTS(scene, name)
    hidden = np.asarray(radii) == 0
    for key, gradient in gradients.items():
        assert np.isfinite(gradient).all(), key
        assert not np.asarray(gradient)[hidden].any(), key


def _gradients(parameters, name):
    def loss(parameters):
        splats = Splats(**parameters, active=jnp.ones(N, bool))
        camera = Camera(POSE, INTRINSICS, WIDTH, HEIGHT)
        got = rasterize(splats, camera, BACKGROUND, implementation=name, capacity=512)
        return jnp.sum(jnp.cos(5 * got.rgb)), got.radii

    return jax.grad(loss, has_aux=True)(parameters)


GRADIENTS = jax.jit(_gradients, static_argnums=1)
