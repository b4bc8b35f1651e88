"""Which splats touch which tiles, nearest first: the integer half of the tiled rasterizer.

Shapes are static, so the list of (tile, splat) pairs has a fixed capacity; the pairs beyond it are
counted and returned. Sorting dominates on CPU, where XLA sorts one array of integers four to five
times faster than a key with its payload: keys and payloads are therefore packed into single words.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gaussians.rasterize.screen import ScreenSplats

#: Extents come out of a few roundings; this much more of them, and of a pixel, is on the safe side.
EXTENT_SLACK = 1e-4
_NO_PAIR = 0xFFFFFFFF


class Bins(NamedTuple):
    """Pairs sorted by tile, within a tile by depth.

    splats: Splat of each pair; entries behind the last pair are arbitrary.
    starts: Tile t owns the pairs starts[t] .. starts[t + 1] - 1.
    overflow: Pairs that found no room.
    """

    splats: Int[Array, "m"]
    starts: Int[Array, "starts"]
    overflow: Int[Array, ""]


class Chunks(NamedTuple):
    """Pairs in slots, each tile's beginning at a multiple of the chunk size.

    splats: Splat of each slot; one past the last splat where a slot has no pair.
    tiles: Tile of each chunk; behind the last chunk in use arbitrary.
    starts: Tile t owns the chunks starts[t] .. starts[t + 1] - 1.
    """

    splats: Int[Array, "slots"]
    tiles: Int[Array, "chunks"]
    starts: Int[Array, "starts"]


def default_capacity(num_splats: int, width: int, height: int, tile_size: int) -> int:
    """A power of two with room for about 8 tiles a splat and 16 splats a tile."""
    tiles = -(-width // tile_size) * -(-height // tile_size)
    wanted = 8 * num_splats + 16 * tiles
    return 1 << (min(wanted, num_splats * tiles) - 1).bit_length()


def depth_order(depths: Float[Array, "n"], visible: Bool[Array, "n"]) -> Int[Array, "n"]:
    """Indices of splats by increasing depth, exact; invisible ones come last.

    The bits of a non-negative float order as an integer. A radix sort takes as many of them at a
    time as fit into a word beside the index, whose place in the word makes each pass stable.
    """
    if depths.dtype != jnp.float32:
        return jnp.argsort(jnp.where(visible, depths, jnp.inf), stable=True).astype(jnp.int32)
    n = depths.shape[0]
    index_bits = max(1, (n - 1).bit_length())
    digit_bits = 32 - index_bits
    nearest_first = jnp.where(visible, depths, jnp.inf)
    keys = lax.bitcast_convert_type(nearest_first, jnp.uint32)
    index = jnp.arange(n, dtype=jnp.uint32)
    order = index
    for shift in range(0, 31, digit_bits):
        digit = (keys[order] >> shift) & ((1 << digit_bits) - 1)
        packed = lax.sort((digit << index_bits) | index, is_stable=False)
        order = order[packed & ((1 << index_bits) - 1)]
    return order.astype(jnp.int32)


def bin_splats(
    screen: ScreenSplats, *, width: int, height: int, tile_size: int, capacity: int
) -> Bins:
    """Lists for each tile the splats whose support's bounding box meets it."""
    columns, rows = -(-width // tile_size), -(-height // tile_size)
    num_tiles, n = columns * rows, screen.depths.shape[0]
    order = depth_order(screen.depths, screen.visible)
    first, spans = _tile_rectangles(screen, width, height, tile_size)
    first, spans = first[order], spans[order]
    counts = spans[:, 0] * spans[:, 1]
    ends = _saturating_cumsum(counts, limit=n * num_tiles)
    total = ends[-1]

    rank = jnp.repeat(jnp.arange(n, dtype=jnp.int32), counts, total_repeat_length=capacity)
    pair = jnp.arange(capacity, dtype=jnp.int32)
    rectangle = jnp.stack([ends - counts, first[:, 1] * columns + first[:, 0], spans[:, 0]], -1)
    begin, corner, span = jnp.moveaxis(rectangle[rank], -1, 0)
    row, column = _divide(pair - begin, jnp.maximum(span, 1))
    tile = corner + row * columns + column
    sorted_rank, starts = _sort_pairs(tile, rank, pair < total, num_tiles, n)
    return Bins(
        splats=order[sorted_rank],
        starts=starts,
        overflow=jnp.maximum(total - capacity, 0).astype(jnp.int32),
    )


def _tile_rectangles(
    screen: ScreenSplats, width: int, height: int, tile_size: int
) -> tuple[Int[Array, "n 2"], Int[Array, "n 2"]]:
    """First tile (column, row) and number of columns and rows that each splat's box meets."""
    extents = screen.extents * (1.0 + EXTENT_SLACK) + EXTENT_SLACK
    size = jnp.array([width, height], screen.means2d.dtype)
    first_pixel = jnp.clip(jnp.ceil(screen.means2d - extents - 0.5), 0.0, size)
    last_pixel = jnp.clip(jnp.floor(screen.means2d + extents - 0.5), -1.0, size - 1.0)
    meets = screen.visible & jnp.all(first_pixel <= last_pixel, axis=-1)
    first = first_pixel.astype(jnp.int32) // tile_size
    spans = last_pixel.astype(jnp.int32) // tile_size - first + 1
    return first, jnp.where(meets[:, None], spans, 0)


def _saturating_cumsum(counts: Int[Array, "n"], limit: int) -> Int[Array, "n"]:
    """Running sums that stop at 2^30 where `limit`, the largest possible sum, passes int32."""
    if limit < 2**31:
        return jnp.cumsum(counts, dtype=jnp.int32)
    return lax.associative_scan(lambda a, b: a + jnp.minimum(b, 2**30 - a), counts)


def _divide(
    numerator: Int[Array, "m"], denominator: Int[Array, "m"]
) -> tuple[Int[Array, "m"], Int[Array, "m"]]:
    """Quotient and remainder of integers below 2^22, through float32: vectorised, and exact."""
    quotient = jnp.floor(
        (numerator.astype(jnp.float32) + 0.5) / denominator.astype(jnp.float32)
    ).astype(jnp.int32)
    return quotient, numerator - quotient * denominator


def _sort_pairs(
    tile: Int[Array, "m"],
    rank: Int[Array, "m"],
    valid: Bool[Array, "m"],
    num_tiles: int,
    n: int,
) -> tuple[Int[Array, "m"], Int[Array, "starts"]]:
    """Depth ranks of the valid pairs by tile, then rank; and where each tile starts."""
    rank_bits = max(1, (n - 1).bit_length())
    tiles = jnp.arange(num_tiles + 1, dtype=jnp.uint32)
    if num_tiles << rank_bits < 2**32:
        key = (tile.astype(jnp.uint32) << rank_bits) | rank.astype(jnp.uint32)
        key = lax.sort(jnp.where(valid, key, jnp.uint32(_NO_PAIR)), is_stable=False)
        starts = jnp.searchsorted(key, tiles << rank_bits)
        ranks = jnp.minimum(key & ((1 << rank_bits) - 1), n - 1)
    else:  # more than 32 bits: slower, still exact
        key = jnp.where(valid, tile, num_tiles).astype(jnp.uint32)
        key, ranks = lax.sort((key, rank.astype(jnp.uint32)), num_keys=2, is_stable=False)
        starts = jnp.searchsorted(key, tiles)
    return ranks.astype(jnp.int32), starts.astype(jnp.int32)


def in_chunks(bins: Bins, n: int, size: int) -> Chunks:
    """Lays the pairs of n splats out in chunks of one tile each, in their order."""
    counts = bins.starts[1:] - bins.starts[:-1]
    num_tiles, capacity = counts.shape[0], bins.splats.shape[0]
    most = (capacity + min(num_tiles, capacity) * (size - 1)) // size
    used = (counts + size - 1) // size
    starts = jnp.pad(jnp.cumsum(used, dtype=jnp.int32), (1, 0))
    tile = jnp.arange(num_tiles, dtype=jnp.int32)
    tiles = jnp.repeat(tile, used, total_repeat_length=most)
    first = bins.starts[tiles] + (jnp.arange(most, dtype=jnp.int32) - starts[tiles]) * size
    pair = first[:, None] + jnp.arange(size, dtype=jnp.int32)
    listed = pair < bins.starts[tiles + 1][:, None]
    splats = jnp.where(listed, bins.splats[jnp.minimum(pair, capacity - 1)], n)
    return Chunks(splats.reshape(-1), tiles, starts)


def by_occupancy(starts: Int[Array, "starts"], group: int) -> Int[Array, "groups group"]:
    """Tiles with the fullest first, in groups of equal size, padded with the tile past the last.

    Neighbours in this order hold nearly as many splats, so little is wasted when a group advances
    in step.
    """
    counts = starts[1:] - starts[:-1]
    num_tiles = counts.shape[0]
    bits = max(1, (num_tiles - 1).bit_length())
    largest = (1 << (32 - bits)) - 1
    emptiness = (largest - jnp.minimum(counts, largest)).astype(jnp.uint32)
    packed = lax.sort(
        (emptiness << bits) | jnp.arange(num_tiles, dtype=jnp.uint32), is_stable=False
    )
    tiles = (packed & ((1 << bits) - 1)).astype(jnp.int32)
    filling = -num_tiles % group
    return jnp.pad(tiles, (0, filling), constant_values=num_tiles).reshape(-1, group)
