"""gaussians.rasterize as it may be called: sizes, dtypes, names, and calls that make no sense."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from splat_oracle import IMPLEMENTATIONS, make_scene

from gaussians import rasterize as package
from gaussians.rasterize import Probe, available, chosen, cpu, rasterize
from gaussians.types import Camera, Splats

WIDTH, HEIGHT, N = 41, 27, 48  # neither side is a multiple of the tile
BACKGROUND = np.array([0.2, 0.5, 0.8], np.float32)
CAPACITY = 1024
SCENE = make_scene(N, sigma=(0.05, 0.2), logits=(-1.0, 4.0), degree=1, size=(WIDTH, HEIGHT))


@pytest.fixture
def splats() -> Splats:
    parameters = {name: jnp.asarray(value) for name, value in SCENE.parameters.items()}
    return Splats(**parameters, active=jnp.arange(N) % 11 != 10)


@pytest.fixture
def camera() -> Camera:
    return SCENE.camera


def test_runs_without_jit(splats, camera):
    eager = rasterize(splats, camera, BACKGROUND, capacity=CAPACITY)
    options = {"implementation": "tiled", "capacity": CAPACITY}
    jitted = jax.jit(lambda s: rasterize(s, camera, BACKGROUND, **options))(splats)
    np.testing.assert_allclose(eager.rgb, jitted.rgb, atol=1e-5)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (72, 9)])
def test_other_image_sizes(splats, camera, width, height):
    intrinsics = camera.intrinsics.copy()
    intrinsics[:2, 2] = width / 2, height / 2
    camera = Camera(camera.world_to_camera, intrinsics, width, height)
    images = [
        jax.jit(lambda s, c=camera, i=name: rasterize(s, c, BACKGROUND, implementation=i).rgb)(
            splats
        )
        for name in IMPLEMENTATIONS
    ]
    assert images[0].shape == (height, width, 3)
    assert np.abs(images[0] - BACKGROUND).max() > 0.1
    for image in images[1:]:
        np.testing.assert_allclose(image, images[0], atol=1e-5)


def test_splats_that_are_not_finite_are_counted(splats, camera):
    bad = splats.with_parameters({"means": splats.means.at[jnp.array([3, 10])].set(jnp.nan)})
    got = jax.jit(lambda s: rasterize(s, camera, BACKGROUND))(bad)
    assert got.invalid == 1  # slot 10 is not active
    assert np.isfinite(got.rgb).all() and got.radii[3] == 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_tile_size_changes_nothing(splats, camera, implementation):
    def image(tile_size):
        options = {"implementation": implementation, "tile_size": tile_size, "capacity": CAPACITY}
        return jax.jit(lambda s: rasterize(s, camera, BACKGROUND, **options).rgb)(splats)

    if implementation == "cpu":
        with pytest.raises(ValueError, match='"cpu" has tile_size=8; got 16'):
            image(16)
    else:
        np.testing.assert_allclose(image(16), image(None), atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_numbers_that_make_no_sense_draw_nothing(splats, camera, implementation):
    @jax.jit
    def draw(focal, centre, blur, near):
        intrinsics = jnp.array([[focal, 0, centre], [0, focal, 13.0], [0, 0, 1.0]])
        moved = Camera(camera.world_to_camera, intrinsics, WIDTH, HEIGHT)
        options = {"blur": blur, "near": near, "capacity": CAPACITY}
        return rasterize(splats, moved, BACKGROUND, implementation=implementation, **options)

    assert draw(40.0, 20.0, 0.3, 0.2).alpha.any()
    nan, blank = jnp.nan, np.broadcast_to(BACKGROUND, (HEIGHT, WIDTH, 3))
    for numbers in ((nan, 20.0, 0.3, 0.2), (40.0, nan, 0.3, 0.2), (40.0, 20.0, nan, 0.2)):
        np.testing.assert_array_equal(draw(*numbers).rgb, blank)
    assert np.isfinite(draw(40.0, 20.0, -1.0, 0.2).rgb).all()
    behind = draw(40.0, 20.0, 0.3, -10.0)  # is never drawn, however far away the near plane
    np.testing.assert_array_equal(behind.rgb, draw(40.0, 20.0, 0.3, 0.0).rgb)


def test_float32_works_where_float64_is_enabled(splats, camera):
    expected = jax.jit(lambda s: rasterize(s, camera, BACKGROUND, capacity=CAPACITY))(splats)
    with jax.enable_x64(True):

        def loss(parameters, probe):
            moved = splats.with_parameters(parameters)
            wide = Camera(np.float64(camera.world_to_camera), camera.intrinsics, WIDTH, HEIGHT)
            got = rasterize(moved, wide, np.float64(BACKGROUND), capacity=CAPACITY, probe=probe)
            return got.rgb.sum(), got

        step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (gradients, probe), got = step(splats.parameters, Probe.zeros(N, absolute=True))
        assert got.rgb.dtype == gradients["means"].dtype == jnp.float32
        np.testing.assert_allclose(got.rgb, expected.rgb, atol=1e-6)
        assert np.abs(probe.absolute).sum() > 0


def test_the_cpu_kernel_may_be_the_first_thing_called():
    script = """
import jax.numpy as jnp
from d4d_jax import cameras
from gaussians import initialize, rasterize
import jax
splats = initialize.random_cube(9, key=jax.random.key(0))
camera = cameras.orbit(2, width=8, height=8)[0]
try:
    rasterize.rasterize(splats, camera, jnp.ones(3), implementation="cpu")
except ValueError as error:
    assert "cpu" not in rasterize.available() and "was not built" in str(error), error
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_chosen(monkeypatch):
    assert chosen() == chosen(("cpu", "tiled")) == available()[-1]
    assert chosen(dtype=jnp.float64) == "tiled"
    assert chosen("reference") == "reference"
    assert chosen(("pallas", "reference", "tiled")) == "reference"  # there is no GPU in the tests
    without = package._IMPLEMENTATIONS["cpu"]._replace(obstacle=lambda dtype: "no compiler")
    monkeypatch.setitem(package._IMPLEMENTATIONS, "cpu", without)
    assert chosen() == "tiled" and "cpu" not in available()
    with pytest.raises(
        ValueError, match=r"None of .* runs here \(cpu: no compiler; pallas: JAX has"
    ):
        chosen(("cpu", "pallas"))


def test_bad_calls_are_answered_in_a_sentence(splats, camera, monkeypatch):
    with pytest.raises(ValueError, match="no rasterizer 'fast'; choose one of cpu, pallas, ref"):
        rasterize(splats, camera, BACKGROUND, implementation="fast")
    for wrong, sentence in [
        ({"capacity": 0}, "capacity 0 leaves no room"),
        ({"alpha_max": 1.5}, "alpha_max must lie between 0 and 1; got 1.5"),
        ({"tile_size": 7}, "tile_size must be an even number of pixels; got 7"),
        ({"sh_degree": 4}, "Degree 4 was asked for"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            rasterize(splats, camera, BACKGROUND, **wrong)
    three, two = (
        jax.tree.map(lambda leaf, n=n: jnp.tile(leaf, (n,) + (1,) * leaf.ndim), splats)
        for n in (3, 2)
    )
    poses, intrinsics = (
        np.tile(leaf, (2, 1, 1)) for leaf in (camera.world_to_camera, camera.intrinsics)
    )
    cameras = Camera(poses, intrinsics, WIDTH, HEIGHT)
    assert rasterize(two, cameras, BACKGROUND, capacity=CAPACITY).rgb.shape[0] == 2
    with pytest.raises(
        ValueError, match=r"do not broadcast: means \(3,\), .*world_to_camera \(2,\)"
    ):
        rasterize(three, cameras, BACKGROUND)
    monkeypatch.setattr(cpu, "obstacle", lambda dtype: "no compiler")
    with pytest.raises(ValueError, match='"cpu" cannot run: no compiler'):
        rasterize(splats, camera, BACKGROUND, implementation="cpu")


def test_float64_is_left_to_those_that_have_it(splats, camera):
    with jax.enable_x64(True):
        splats = jax.tree.map(
            lambda leaf: leaf if leaf.dtype == bool else jnp.asarray(leaf, jnp.float64), splats
        )
        assert rasterize(splats, camera, BACKGROUND, capacity=CAPACITY).rgb.dtype == jnp.float64
        if "cpu" in available():
            with pytest.raises(ValueError, match="blends float32, not float64"):
                rasterize(splats, camera, BACKGROUND, implementation="cpu")
