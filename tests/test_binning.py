"""gaussians.rasterize.binning: depth order, tile lists and their size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gaussians.rasterize import binning
from gaussians.rasterize.screen import ScreenSplats

TILE = 8


def test_depth_order_is_exact_and_stable():
    rng = np.random.default_rng(0)
    for n in (1, 300, 70_000):
        depths = rng.uniform(0.2, 9.0, n).astype(np.float32)
        depths[::3] = depths[0]
        if n > 2:
            depths[1] = np.nextafter(depths[0], np.float32(0))
        visible = rng.uniform(size=n) < 0.9
        order = np.asarray(jax.jit(binning.depth_order)(depths, visible))
        expected = np.argsort(np.where(visible, depths, np.inf), kind="stable")
        np.testing.assert_array_equal(order, expected)


def test_more_tiles_and_splats_than_a_packed_key_holds():
    """An image whose tile and rank need over 32 bits has its list sorted another way."""
    n, side = 33_000, 2048  # 16 bits of ranks, 17 of tiles
    rng = np.random.default_rng(0)
    centres = rng.uniform(0, side, (n, 2)).astype(np.float32)
    depths = rng.uniform(1, 2, n).astype(np.float32)
    screen = ScreenSplats(
        means2d=jnp.asarray(centres),
        factors=jnp.ones((n, 3)),
        opacities=jnp.ones(n),
        features=jnp.ones((n, 4)),
        depths=jnp.asarray(depths),
        extents=jnp.full((n, 2), 5.0),
        visible=jnp.ones(n, bool),
    )
    run = functools.partial(
        binning.bin_splats, width=side, height=side, tile_size=TILE, capacity=9 * n
    )
    bins = jax.jit(run)(screen)
    starts, splats = np.asarray(bins.starts), np.asarray(bins.splats)
    columns = side // TILE
    assert bins.overflow == 0 and starts[0] == 0
    for tile in np.flatnonzero(np.diff(starts))[::500]:
        listed = splats[starts[tile] : starts[tile + 1]]
        low = np.array([tile % columns, tile // columns]) * TILE
        distance = np.abs(centres - low - TILE / 2).max(axis=-1)
        surely, perhaps = distance < 8.49, distance < 9.02  # a pixel centre within 5, or nearly
        assert set(np.flatnonzero(surely)) <= set(listed) <= set(np.flatnonzero(perhaps))
        assert np.all(np.diff(depths[listed]) >= 0)


def test_default_capacity_is_bounded_by_all_pairs():
    assert binning.default_capacity(2, 16, 16, 8) == 8
    assert binning.default_capacity(1, 8, 8, 8) == 1
    assert binning.default_capacity(10_000, 256, 256, 8) >= 80_000


def test_pairs_beyond_the_range_of_int32_are_not_lost():
    counts = jnp.full(2**8, 2**24, jnp.int32)  # 2^32 together
    ends = np.asarray(binning._saturating_cumsum(counts, limit=2**32))
    np.testing.assert_array_equal(ends[:64], 2**24 * np.arange(1, 65))
    np.testing.assert_array_equal(ends[64:], 2**30)


def test_float64_depths_are_ordered_by_all_their_digits():
    with jax.enable_x64(True):
        depths = 1.0 + 1e-12 * jnp.array([3.0, 1.0, 2.0, 0.0])
        order = binning.depth_order(depths, jnp.array([True, True, True, False]))
    np.testing.assert_array_equal(order, [1, 2, 0, 3])
