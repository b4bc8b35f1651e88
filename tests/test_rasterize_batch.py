"""gaussians.rasterize under leading axes and JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from splat_oracle import IMPLEMENTATIONS, make_scene

from d4d_jax.cameras import orbit
from gaussians.rasterize import Probe, rasterize
from gaussians.types import Camera, Splats

BACKGROUND = jnp.array([0.2, 0.5, 0.8])
CAMERAS = orbit(3, width=25, height=18)


def splats(seed: int = 0) -> Splats:
    parameters = make_scene(40, seed=seed, sigma=(0.05, 0.2), degree=1).parameters
    return Splats(
        **{name: jnp.asarray(value) for name, value in parameters.items()},
        active=jnp.arange(40) % 7 != 0,
    )


def loss(parameters, camera: Camera, implementation: str):
    render = rasterize(
        splats().with_parameters(parameters), camera, BACKGROUND, implementation=implementation
    )
    return jnp.sum(jnp.sin(3 * render.rgb)) + jnp.sum(render.expected_depth), render


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def one_by_one(request):
    """Name, and the gradients and renders of the cameras on their own."""
    step = jax.jit(functools.partial(jax.grad(loss, has_aux=True), implementation=request.param))
    return request.param, [step(splats().parameters, CAMERAS[i]) for i in range(3)]


def assert_same(got, expected, tolerance: float = 1e-6):
    """Equal up to the order of sums."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        scale = max(1.0, np.abs(b).max(initial=0.0))
        np.testing.assert_allclose(a, b, atol=10 * tolerance * scale, err_msg=str(path))


def stacked(results):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *results)


def test_vmap_over_cameras_is_the_loop(one_by_one):
    name, results = one_by_one
    step = jax.grad(functools.partial(loss, implementation=name), has_aux=True)
    got = jax.jit(jax.vmap(step, in_axes=(None, 0)))(splats().parameters, CAMERAS)
    assert_same(got, stacked(results))


def test_gradient_through_leading_axes_is_the_sum(one_by_one):
    name, results = one_by_one
    step = jax.jit(functools.partial(jax.grad(loss, has_aux=True), implementation=name))
    gradient, renders = step(splats().parameters, CAMERAS)
    expected, expected_renders = stacked(results)
    assert_same(renders, expected_renders)
    assert_same(gradient, jax.tree.map(lambda leaf: leaf.sum(0), expected))


def test_checkpoint_and_scan_change_nothing(one_by_one):
    name, results = one_by_one

    @jax.jit
    def total(parameters):
        def add(carry, camera):
            value, render = jax.checkpoint(functools.partial(loss, implementation=name))(
                parameters, Camera(*camera, CAMERAS.width, CAMERAS.height)
            )
            return carry + value, render

        poses = (jnp.asarray(CAMERAS.world_to_camera), jnp.asarray(CAMERAS.intrinsics))
        return jax.lax.scan(add, 0.0, poses)

    gradient, renders = jax.grad(total, has_aux=True)(splats().parameters)
    expected, expected_renders = stacked(results)
    assert_same(renders, expected_renders)
    assert_same(gradient, jax.tree.map(lambda leaf: leaf.sum(0), expected))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sets_of_splats_broadcast_against_cameras(implementation):
    sets = [splats(seed) for seed in (0, 1)]
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves)[:, None], *sets)  # (2, 1)
    backgrounds = jnp.eye(3)
    draw = jax.jit(functools.partial(rasterize, implementation=implementation))
    got = draw(both, CAMERAS, backgrounds)
    assert got.rgb.shape == (2, 3, 18, 25, 3) and got.radii.shape == (2, 3, 40)
    assert got.overflow.shape == got.invalid.shape == (2, 3)
    for i, camera in ((0, 2), (1, 0)):
        expected = draw(sets[i], CAMERAS[camera], backgrounds[camera])
        assert_same(jax.tree.map(lambda leaf: leaf[i, camera], got), expected)  # noqa: B023


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_give_the_same_bytes(implementation):
    scene = make_scene(1000, sigma=(0.01, 0.1), size=(70, 50))
    many = Splats(**scene.parameters, active=np.ones(1000, bool))
    probe = Probe.zeros(1000, absolute=True)

    @jax.jit
    def step(parameters, probe):
        def total(parameters, probe):
            moved = many.with_parameters(parameters)
            options = {"implementation": implementation, "probe": probe, "capacity": 2**16}
            render = rasterize(moved, scene.camera, BACKGROUND, **options)
            return jnp.sum(render.rgb**2), render

        return jax.grad(total, argnums=(0, 1), has_aux=True)(parameters, probe)

    first = jax.tree.leaves(step(many.parameters, probe))
    for _ in range(4):
        again = jax.tree.leaves(step(many.parameters, probe))
        assert [a.tobytes() for a in map(np.asarray, again)] == [
            a.tobytes() for a in map(np.asarray, first)
        ]


def test_the_probe_reads_in_half_images():
    """Moving everything by one normalised device coordinate is moving it by half the width."""
    camera = CAMERAS[0]
    red = splats().with_parameters({"sh": jnp.ones((40, 4, 3)) * (jnp.arange(4) < 1)[:, None]})

    @jax.jit
    def image_sum(probe, x, y):
        intrinsics = jnp.asarray(camera.intrinsics).at[:2, 2].add(jnp.stack([x, y]))
        moved = Camera(camera.world_to_camera, intrinsics, camera.width, camera.height)
        ramp = jnp.arange(camera.width)[:, None] + jnp.arange(camera.height)[:, None, None]
        return jnp.sum(ramp * rasterize(red, moved, BACKGROUND, probe=probe).rgb)

    probe, x, y = jax.grad(image_sum, argnums=(0, 1, 2))(Probe.zeros(40), 0.0, 0.0)
    total = np.asarray(probe.mean2d).sum(0)
    np.testing.assert_allclose(total, [x * camera.width / 2, y * camera.height / 2], rtol=2e-2)
    assert probe.absolute is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_leading_axes_of_no_splats_and_of_no_cameras(implementation):
    empty = jax.tree.map(lambda leaf: jnp.stack([leaf[:0]] * 2), splats())
    got = rasterize(empty, CAMERAS[0], BACKGROUND, implementation=implementation)
    np.testing.assert_array_equal(got.rgb, np.broadcast_to(BACKGROUND, (2, 18, 25, 3)))
    assert got.radii.shape == (2, 0)
    got = rasterize(splats(), CAMERAS[:0], BACKGROUND, implementation=implementation)
    assert got.rgb.shape == (0, 18, 25, 3)
