"""Large frames through a network in overlapping tiles, so that memory does not grow with them."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def blend_tiles(
    function: Callable[[Array], Array],
    x: Float[Array, "n h w c"],
    *,
    tile: int,
    overlap: int,
    cells: tuple[int, int],
) -> Float[Array, "n h2 w2 d"]:
    """`function` of overlapping tiles of x, one at a time, blended linearly where they overlap.

    Args:
        function: maps (n, i a, i b, c) to (n, o a, o b, d) for any a and b.
        x: frames whose sides are multiples of i.
        tile: side of a tile in cells; an axis that is no longer is taken whole.
        overlap: least number of cells that neighbours share, below `tile`.
        cells: (i, o), the side of a cell on the way in and on the way out.

    Raises:
        ValueError: a side is no multiple of i.
    """
    inner, outer = cells
    n, *sides, c = x.shape
    if any(side % inner for side in sides):
        raise ValueError(
            f"Frames of {sides[0]} x {sides[1]} do not split into cells of {inner} x {inner}"
            " pixels; pad or resize them."
        )
    sides = [side // inner for side in sides]
    axes = (_tile_axis(side, tile, overlap, outer) for side in sides)
    (rows, row_weights), (columns, column_weights) = jax.tree.map(jnp.asarray, tuple(axes))
    height, width = (min(tile, side) for side in sides)

    def add(canvas: Array, place: Array) -> tuple[Array, None]:
        row, column = rows[place[0]], columns[place[1]]
        source = (0, row * inner, column * inner, 0)
        part = jax.lax.dynamic_slice(x, source, (n, height * inner, width * inner, c))
        weight = row_weights[place[0], :, None, None] * column_weights[place[1], :, None]
        target = (0, row * outer, column * outer, 0)
        piece = weight * function(part)
        piece += jax.lax.dynamic_slice(canvas, target, piece.shape)
        return jax.lax.dynamic_update_slice(canvas, piece, target), None

    first = jax.eval_shape(function, jax.ShapeDtypeStruct((n, inner, inner, c), x.dtype))
    canvas = jnp.zeros((n, sides[0] * outer, sides[1] * outer, first.shape[-1]), first.dtype)
    places = jnp.stack(jnp.indices((len(rows), len(columns))), -1).reshape(-1, 2)
    return jax.lax.scan(add, canvas, places)[0]


def _tile_axis(
    size: int, tile: int, overlap: int, outer: int
) -> tuple[Int[np.ndarray, "k"], Float[np.ndarray, "k p"]]:
    """First cells (k,) of the tiles of an axis, evenly spaced, and their weights (k, pixels).

    Weights fall off linearly over `overlap` cells and add up to 1 at every pixel.
    """
    tile = min(tile, size)
    count = 1 if tile == size else math.ceil((size - overlap) / (tile - overlap))
    starts = np.round(np.linspace(0, size - tile, count)).astype(np.int32)
    position = np.arange(tile * outer) + 0.5
    ramp = np.minimum(np.minimum(position, position[::-1]), max(overlap * outer, 1))
    spans = starts[:, None] * outer + np.arange(tile * outer)
    total = np.zeros(size * outer)
    np.add.at(total, spans, np.broadcast_to(ramp, spans.shape))
    return starts, (ramp / total[spans]).astype(np.float32)
