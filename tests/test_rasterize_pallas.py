"""gaussians.rasterize.pallas: what is particular to its kernels and to the layout of its rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaussians.rasterize import pallas, reference
from gaussians.rasterize.binning import Bins, in_chunks
from gaussians.rasterize.screen import ScreenSplats


def screen_of(n: int, size: int, opacity: float, seed: int = 0) -> ScreenSplats:
    """Round splats of 3 px all over a square image of `size` px, at random depths."""
    rng = np.random.default_rng(seed)
    return ScreenSplats(
        means2d=jnp.asarray(rng.uniform(0, size, (n, 2)), jnp.float32),
        factors=jnp.tile(jnp.array([1 / 9, 0.0, 1 / 9]), (n, 1)),
        opacities=jnp.full(n, opacity),
        features=jnp.asarray(rng.uniform(0, 1, (n, 4)), jnp.float32),
        depths=jnp.asarray(rng.uniform(1, 2, n), jnp.float32),
        extents=jnp.full((n, 2), 3 * np.sqrt(2 * np.log(255 * opacity)), jnp.float32),
        visible=jnp.ones(n, bool),
        absolute=jnp.zeros((n, 2)),
    )


def weighted(composite, screen: ScreenSplats, size: int, **options):
    image = composite(screen, width=size, height=size, alpha_max=0.99, **options)
    return jnp.sum(jnp.sin(9 * image.features)) + jnp.sum(image.alpha)


@pytest.mark.parametrize("n", [1, 3000])
@pytest.mark.parametrize("tile_size", [4, 8, 16])
def test_lowers_for_cuda_where_there_is_no_gpu(n, tile_size):
    screen = screen_of(n, 256, 0.5)
    image = functools.partial(weighted, pallas.composite, size=256, tile_size=tile_size)
    gradient = jax.grad(lambda parts: image(screen._replace(**parts)))
    parts = {"means2d": screen.means2d, "absolute": screen.absolute}
    for function, argument, kernels in ((image, screen, 1), (gradient, parts, 2)):
        lowered = jax.jit(function).trace(argument).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("custom_call @__gpu$xla.gpu.triton") == kernels


@pytest.mark.parametrize("capacity", [300, 1])
def test_layout_holds_every_pair_once_in_order_and_aligned(capacity):
    rng = np.random.default_rng(1)
    n, size, num_tiles = 50, 16, 12
    counts = rng.multinomial(capacity - capacity // 10, rng.dirichlet(np.ones(num_tiles) / 3))
    counts[[0, -1]] = 0
    pairs = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    splats = rng.integers(0, n, capacity).astype(np.int32)
    bins = Bins(jnp.asarray(splats), jnp.asarray(pairs), jnp.zeros((), jnp.int32))
    chunks = jax.tree.map(np.asarray, in_chunks(bins, n, size))
    assert len(chunks.splats) == size * len(chunks.tiles) >= size * chunks.starts[-1]
    for tile in range(num_tiles):
        own = slice(chunks.starts[tile], chunks.starts[tile + 1])
        slots = chunks.splats.reshape(-1, size)[own].reshape(-1)
        np.testing.assert_array_equal(chunks.tiles[own], tile)
        np.testing.assert_array_equal(slots[: counts[tile]], splats[pairs[tile] : pairs[tile + 1]])
        np.testing.assert_array_equal(slots[counts[tile] :], n)
        assert len(slots) - counts[tile] < size
    np.testing.assert_array_equal(chunks.splats[size * chunks.starts[-1] :], n)


def test_chunks_behind_opaque_splats_leave_nothing_in_the_gradient():
    screen, size = screen_of(400, 16, 0.97), 16  # a tile has some 25 chunks and stops early
    gradients = [
        jax.jit(jax.grad(functools.partial(weighted, composite, size=size), allow_int=True))(screen)
        for composite in (pallas.composite, reference.composite)
    ]
    for name in ("means2d", "factors", "opacities", "features", "absolute"):
        got, expected = (np.asarray(getattr(gradient, name)) for gradient in gradients)
        assert np.mean(np.all(expected.reshape(400, -1) == 0, axis=-1)) > 0.5
        assert np.linalg.norm(got - expected) <= 1e-5 * np.linalg.norm(expected), name


def test_tile_sizes_that_a_kernel_cannot_take_are_named():
    with pytest.raises(ValueError, match=r"one of \(4, 8, 16\); got 32"):
        weighted(pallas.composite, screen_of(1, 8, 0.5), 8, tile_size=32)
