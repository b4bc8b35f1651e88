"""gaussians.rasterize: the definition, gsplat's golden values, and edge cases."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from splat_oracle import IMPLEMENTATIONS

from gaussians.projection import project
from gaussians.rasterize import Probe, binning, rasterize
from gaussians.types import Camera, Splats

GOLDEN = pathlib.Path(__file__).parent / "golden" / "rasterizer_gsplat.npz"
WIDTH, HEIGHT, N = 41, 27, 48  # neither side is a multiple of the tile
BACKGROUND = np.array([0.2, 0.5, 0.8], np.float32)
CAPACITY = 1024


def as_scene(arrays) -> dict[str, np.ndarray]:
    """The float arrays a render depends on."""
    names = ("means", "log_scales", "quaternions", "opacity_logits", "sh", "world_to_camera")
    return {name: np.asarray(arrays[name]) for name in names} | {"background": BACKGROUND}


@functools.partial(jax.jit, static_argnames=("implementation", "alpha_max", "capacity"))
def render(
    scene, intrinsics, active, offset=None, *, implementation, alpha_max=0.99, capacity=CAPACITY
):
    parameters = {name: scene[name] for name in Splats.__dataclass_fields__ if name != "active"}
    return rasterize(
        Splats(**parameters, active=active),
        Camera(scene["world_to_camera"], intrinsics, WIDTH, HEIGHT),
        scene["background"],
        implementation=implementation,
        alpha_max=alpha_max,
        capacity=capacity,
        probe=None if offset is None else Probe(offset),
    )


@functools.partial(jax.jit, static_argnames=("implementation", "alpha_max"))
def gradients(scene, intrinsics, active, offset, cotangents, *, implementation, alpha_max=0.99):
    """Derivatives of one weighted sum of rgb, alpha and depth; and the sum."""

    def weighted(scene, offset, intrinsics):
        got = render(
            scene, intrinsics, active, offset, implementation=implementation, alpha_max=alpha_max
        )
        outputs = {"rgb": got.rgb, "alpha": got.alpha, "depth": got.depth}
        return sum(jnp.sum(outputs[name] * cotangents[name]) for name in outputs)

    value, grads = jax.value_and_grad(weighted, argnums=(0, 1, 2))(scene, offset, intrinsics)
    return value, {**grads[0], "offset": grads[1], "intrinsics": grads[2]}


def oracle(scene, intrinsics, active, alpha_max=0.99, blur=0.3):
    """rgb, alpha, depth by the definition, one pixel and one splat at a time, in float64."""
    s = {name: np.asarray(value, float) for name, value in scene.items()}
    rotation, translation = s["world_to_camera"][:3, :3], s["world_to_camera"][:3, 3]
    focal, centre = np.diag(intrinsics)[:2].astype(float), np.asarray(intrinsics, float)[:2, 2]
    size = np.array([WIDTH, HEIGHT])
    splats = []
    for k in np.flatnonzero(active):
        x, y, z = point = rotation @ s["means"][k] + translation
        if z <= 0.2:
            continue
        margin = 0.3 * size / (2 * focal)
        tx, ty = np.clip([x / z, y / z], -centre / focal - margin, (size - centre) / focal + margin)
        jacobian = np.array(
            [[focal[0] / z, 0, -focal[0] * tx / z], [0, focal[1] / z, -focal[1] * ty / z]]
        )
        w, *v = s["quaternions"][k] / np.linalg.norm(s["quaternions"][k])
        cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
        turn = np.eye(3) + 2 * w * cross + 2 * cross @ cross
        sigma = turn @ np.diag(np.exp(2 * s["log_scales"][k])) @ turn.T
        cov = jacobian @ rotation @ sigma @ rotation.T @ jacobian.T + blur * np.eye(2)
        direction = s["means"][k] + rotation.T @ translation
        dx, dy, dz = direction / np.linalg.norm(direction)
        basis = [0.28209479177387814] + [0.4886025119029199 * d for d in (-dy, dz, -dx)]
        colour = np.maximum(np.array(basis) @ s["sh"][k, :4] + 0.5, 0.0)
        opacity = 1 / (1 + np.exp(-s["opacity_logits"][k]))
        mean = focal * point[:2] / z + centre
        splats.append((z, mean, np.linalg.inv(cov), opacity, np.append(colour, z)))
    splats.sort(key=lambda splat: splat[0])
    image, alphas = np.zeros((HEIGHT, WIDTH, 4)), np.zeros((HEIGHT, WIDTH))
    for row in range(HEIGHT):
        for column in range(WIDTH):
            transmittance = 1.0
            for _, mean, inverse, opacity, feature in splats:
                d = np.array([column + 0.5, row + 0.5]) - mean
                alpha = min(alpha_max, opacity * np.exp(-0.5 * d @ inverse @ d))
                if alpha < 1 / 255:
                    continue
                if transmittance * (1 - alpha) < 1e-4:
                    break
                image[row, column] += alpha * transmittance * feature
                alphas[row, column] += alpha * transmittance
                transmittance *= 1 - alpha
    return image[..., :3] + (1 - alphas)[..., None] * s["background"], alphas, image[..., 3]


def relative(got, expected) -> float:
    got, expected = np.asarray(got, float), np.asarray(expected, float)
    return float(np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-12))


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.fixture(scope="module")
def base(golden):
    """scene, intrinsics, active, offset, cotangents; saturated pixels and unused slots included."""
    scene = as_scene(golden)
    scene["opacity_logits"] = scene["opacity_logits"] + 1.0
    stack = slice(12, 19)  # opaque splats behind one another: pixels stop early here
    scene["means"][stack] = np.linspace(0.3, -0.3, 7)[:, None] * np.array([0.2, -0.9, 0.3])
    scene["log_scales"][stack] = np.log(0.15)
    scene["opacity_logits"][stack] = 2.0
    scene["sh"] = scene["sh"] * (np.arange(16) < 4)[:, None]  # the oracle knows degree 1
    active = np.arange(N) % 11 != 10
    names = ("rgb", "alpha", "depth")
    cotangents = {name: golden[f"cotangent_{name}"] for name in names}
    return scene, golden["intrinsics"], active, np.zeros((N, 2), np.float32), cotangents


@pytest.fixture(scope="module")
def exact(base):
    """Gradients of the reference in float64."""
    with jax.enable_x64(True):
        scene, intrinsics, active, offset, cotangents = jax.tree.map(
            lambda a: np.asarray(a) if a.dtype == bool else np.asarray(a, np.float64), base
        )
        value, grads = gradients(
            scene, intrinsics, active, offset, cotangents, implementation="reference"
        )
        return jax.tree.map(np.asarray, (value, grads))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("alpha_max", [0.99, 0.999])
def test_image_is_the_definition(base, implementation, alpha_max):
    scene, intrinsics, active, *_ = base
    rgb, alpha, depth = oracle(scene, intrinsics, active, alpha_max)
    assert alpha.max() > 0.999  # some pixels did stop early
    got = render(scene, intrinsics, active, implementation=implementation, alpha_max=alpha_max)
    np.testing.assert_allclose(got.rgb, rgb, atol=1e-5)
    np.testing.assert_allclose(got.alpha, alpha, atol=1e-5)
    np.testing.assert_allclose(got.depth, depth, atol=2e-5)
    assert got.overflow == 0
    assert np.asarray(got.alpha).min() >= 0.0 and np.asarray(got.alpha).max() <= 1.0


@pytest.mark.parity
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_image_and_gradients_agree_with_gsplat(golden, implementation):
    scene = as_scene(golden) | {"background": np.zeros(3, np.float32)}
    active, offset = np.ones(N, bool), np.zeros((N, 2), np.float32)
    cotangents = {name: golden[f"cotangent_{name}"] for name in ("rgb", "alpha", "depth")}
    args = (scene, golden["intrinsics"], active)
    got = render(*args, implementation=implementation)
    np.testing.assert_allclose(got.rgb, golden["image"][..., :3], atol=1e-5)
    np.testing.assert_allclose(got.depth, golden["image"][..., 3], atol=2e-5)
    np.testing.assert_allclose(got.alpha, golden["alpha"], atol=1e-5)
    _, grads = gradients(*args, offset, cotangents, implementation=implementation)
    for name in set(scene) - {"background"}:
        assert relative(grads[name], golden[f"gradient_{name}"]) < 1e-4, name


def test_reference_gradients_are_finite_differences(base, exact):
    value, grads = exact
    with jax.enable_x64(True):
        scene, intrinsics, active, offset, cotangents = jax.tree.map(
            lambda a: np.asarray(a) if a.dtype == bool else np.asarray(a, np.float64), base
        )

        def weighted(inputs):
            inputs = dict(inputs)
            offset, intrinsics = inputs.pop("offset"), inputs.pop("intrinsics")
            got = render(inputs, intrinsics, active, offset, implementation="reference")
            total = (got.rgb * cotangents["rgb"]).sum() + (got.alpha * cotangents["alpha"]).sum()
            return float(total + (got.depth * cotangents["depth"]).sum())

        inputs = scene | {"offset": offset, "intrinsics": intrinsics}
        np.testing.assert_allclose(weighted(inputs), value, rtol=1e-12)
        rng = np.random.default_rng(3)
        for name, array in inputs.items():
            direction = rng.normal(size=array.shape)
            if name == "intrinsics":  # skew is not part of the model
                direction *= [[1, 0, 1], [0, 1, 1], [0, 0, 0]]
            step = 1e-7
            ahead = weighted(inputs | {name: array + step * direction})
            behind = weighted(inputs | {name: array - step * direction})
            slope = np.sum(grads[name] * direction)
            assert abs((ahead - behind) / (2 * step) - slope) < 1e-4 * max(abs(slope), 1.0), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_agree_with_float64(base, exact, implementation):
    _, grads = gradients(*base, implementation=implementation)
    for name, gradient in grads.items():
        assert relative(gradient, exact[1][name]) < 1e-4, name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_useless_splats_change_nothing_and_get_no_gradient(base, implementation):
    scene, intrinsics, active, offset, cotangents = base
    clean = render(scene, intrinsics, active, implementation=implementation)
    dirty = {name: np.array(value) for name, value in scene.items()}
    unused = np.flatnonzero(~active)  # 10, 21, 32, 43
    every = np.ones(N, bool)
    dirty["means"][unused[0]] = np.nan
    dirty["log_scales"][unused[1]] = np.inf
    dirty["opacity_logits"][unused[2]] = -9.0  # alpha below 1/255
    dirty["means"][unused[3]] = (0.5, -3.0, 0.6)  # behind the camera
    dirty["quaternions"][unused[3]] = 0.0
    got = render(dirty, intrinsics, every, implementation=implementation)
    np.testing.assert_array_equal(got.rgb, clean.rgb)
    np.testing.assert_array_equal(np.asarray(got.radii)[unused], 0.0)
    _, grads = gradients(
        dirty, intrinsics, every, offset, cotangents, implementation=implementation
    )
    for name, gradient in grads.items():
        assert np.isfinite(gradient).all(), name
        if np.shape(gradient)[:1] == (N,):
            np.testing.assert_array_equal(np.asarray(gradient)[unused], 0.0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_draw_shows_the_background(base, implementation):
    scene, intrinsics, _, offset, cotangents = base
    nobody = np.zeros(N, bool)
    got = render(scene, intrinsics, nobody, implementation=implementation)
    np.testing.assert_array_equal(got.rgb, np.broadcast_to(BACKGROUND, (HEIGHT, WIDTH, 3)))
    _, grads = gradients(
        scene, intrinsics, nobody, offset, cotangents, implementation=implementation
    )
    np.testing.assert_allclose(grads["background"], cotangents["rgb"].sum((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(grads["means"], 0.0)
    empty = {n: v[:0] if len(v) == N else v for n, v in scene.items()}
    got = render(empty, intrinsics, nobody[:0], implementation=implementation)
    np.testing.assert_array_equal(got.rgb, np.broadcast_to(BACKGROUND, (HEIGHT, WIDTH, 3)))
    assert got.radii.shape == (0,)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_clamped_alpha_has_no_gradient(base, implementation):
    scene, intrinsics, _, offset, cotangents = base
    scene = scene | {"log_scales": np.full_like(scene["log_scales"], 3.0)}  # flat over the image
    scene["opacity_logits"] = np.full_like(scene["opacity_logits"], 9.0)
    one = np.arange(N) == 20
    got = render(scene, intrinsics, one, implementation=implementation)
    np.testing.assert_allclose(got.alpha, 0.99, rtol=1e-6)
    _, grads = gradients(scene, intrinsics, one, offset, cotangents, implementation=implementation)
    np.testing.assert_array_equal(grads["opacity_logits"], 0.0)
    np.testing.assert_array_equal(grads["offset"], 0.0)
    assert np.abs(grads["sh"][20]).max() > 0.0


def covered_tiles(scene, intrinsics, active) -> int:
    """Pairs of 8 x 8 tiles and boxes, counted in numpy from the definition of the support."""
    p = project(
        scene["means"],
        scene["log_scales"],
        scene["quaternions"],
        Camera(scene["world_to_camera"], intrinsics, WIDTH, HEIGHT),
    )
    opacity = 1 / (1 + np.exp(-scene["opacity_logits"].astype(float)))
    extent = np.sqrt(2 * np.log(np.maximum(255 * opacity, 1))[:, None] * np.asarray(p.variances))
    extent = extent * (1 + binning.EXTENT_SLACK) + binning.EXTENT_SLACK
    low, high = np.asarray(p.means2d) - extent, np.asarray(p.means2d) + extent
    pairs = 0
    for k in np.flatnonzero(active & np.asarray(p.visible) & (opacity >= 1 / 255)):
        centres = [np.arange(size) + 0.5 for size in (WIDTH, HEIGHT)]
        inside = [(c >= low[k, i]) & (c <= high[k, i]) for i, c in enumerate(centres)]
        tiles = [len(np.unique(np.flatnonzero(hit) // 8)) for hit in inside]
        pairs += tiles[0] * tiles[1]
    return pairs


@pytest.mark.parametrize("implementation", ["tiled", "pallas"])
def test_overflow_is_counted_and_harmless(base, implementation):
    scene, intrinsics, active, *_ = base
    full = render(scene, intrinsics, active, implementation=implementation)
    pairs = covered_tiles(scene, intrinsics, active)
    assert 100 < pairs < CAPACITY
    assert full.overflow == 0
    short = render(scene, intrinsics, active, implementation=implementation, capacity=pairs - 7)
    assert short.overflow == 7
    assert np.isfinite(short.rgb).all() and np.asarray(short.alpha).max() <= 1.0
    assert np.abs(short.rgb - full.rgb).max() > 0.0
