"""Tiled rasterizer as two Pallas kernels, one program per tile; off GPU they are interpreted.

Splats are listed per tile (`binning`), and XLA copies their numbers into rows, tile after tile and
nearest first, each tile beginning at a multiple of `_CHUNK`. A program walks through its rows one
chunk at a time, until they end or all of its pixels are opaque. The kernels so read and write
contiguous slices only, and what they write for rows reaches the splats as the transpose of that
copy, without atomics in a kernel.

The algebra is that of `tiled`, with sums over a chunk in place of the loop over its splats: where
s is the sum of log(1 - alpha) over the splats in front of one, its transmittance is T exp(s).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from gaussians.rasterize.binning import bin_splats, default_capacity, in_chunks
from gaussians.rasterize.screen import (
    ALPHA_MIN,
    TRANSMITTANCE_MIN,
    Composite,
    ScreenSplats,
    geometry_gradients,
)

# A thread of the GPU holds one pixel, hence `_CHUNK` numbers of every array (k p).
_CHUNK = 16
_GEOMETRY = 6  # columns of a row before its features: x, y, p, s, r, opacity
_TILE_SIZE = 8
_TILE_SIZES = (4, 8, 16)  # products need 16 pixels; 32 x 32 would not fit into registers


def obstacle(dtype: Any) -> str | None:
    """Why the kernels would be interpreted here, or None."""
    del dtype
    return None if jax.default_backend() == "gpu" else "JAX has no GPU here"


class _Static(NamedTuple):
    """What both kernels know in advance."""

    tile: int
    alpha_max: float
    features: int
    absolute: bool  # rows end in two columns for `ScreenSplats.absolute`

    @property
    def pixels(self) -> int:
        return self.tile * self.tile

    @property
    def padded(self) -> int:
        """A power of two with room for a row, and for the channels of `_blend_backward`."""
        return max(16, 1 << (_GEOMETRY + self.features + 2).bit_length())


def composite(
    screen: ScreenSplats,
    *,
    width: int,
    height: int,
    tile_size: int | None = None,
    capacity: int | None = None,
    alpha_max: float = 0.99,
) -> Composite:
    """Blends splats into an image; see `gaussians.rasterize.rasterize` for the arguments.

    Raises:
        ValueError: When `tile_size` is none of 4, 8 and 16.
    """
    tile = _TILE_SIZE if tile_size is None else tile_size
    if tile not in _TILE_SIZES:
        raise ValueError(f"tile_size of `pallas` must be one of {_TILE_SIZES}; got {tile}.")
    n, num_features = screen.features.shape
    dtype = screen.features.dtype
    if n == 0 or width == 0 or height == 0:
        blank = jnp.zeros((height, width, num_features), dtype)
        return Composite(blank, jnp.zeros((height, width), dtype), jnp.zeros((), jnp.int32))
    capacity = default_capacity(n, width, height, tile) if capacity is None else capacity
    fixed: ScreenSplats = lax.stop_gradient(screen)
    bins = bin_splats(fixed, width=width, height=height, tile_size=tile, capacity=capacity)
    chunks = in_chunks(bins, n, _CHUNK)

    columns, lines = -(-width // tile), -(-height // tile)
    corners = jnp.stack([chunks.tiles % columns, chunks.tiles // columns], -1)
    centres = jnp.repeat(corners * tile + tile // 2, _CHUNK, axis=0).astype(dtype)
    parts = [screen.means2d, screen.factors, screen.opacities[:, None], screen.features]
    if screen.absolute is not None:
        parts.append(screen.absolute)
    rows = jnp.concatenate(parts, -1).at[chunks.splats].get(mode="fill", fill_value=0.0)
    rows = rows.at[:, :2].add(-centres)

    # One inside the image, zero past its border, where nothing needs to be blended.
    y = jnp.arange(lines * tile).reshape(lines, 1, tile, 1) < height
    x = jnp.arange(columns * tile).reshape(1, columns, 1, tile) < width
    inside = (x & y).reshape(-1, tile * tile).astype(dtype)

    largest = 1.0 - float(jnp.finfo(dtype).epsneg)  # below 1 after rounding
    static = _Static(tile, min(alpha_max, largest), num_features, screen.absolute is not None)
    blended: Array = _blend(static, rows, chunks.starts, inside)
    image = blended.reshape(lines, columns, -1, tile, tile).transpose(0, 3, 1, 4, 2)
    image = image.reshape(lines * tile, columns * tile, -1)[:height, :width]
    return Composite(image[..., :-1], image[..., -1], bins.overflow)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blend(
    static: _Static,
    rows: Float[Array, "m d"],
    starts: Int[Array, "starts"],
    inside: Float[Array, "tiles p"],
) -> Float[Array, "tiles c p"]:
    """Tiles of the features (columns of `rows` behind the geometry), and alpha as the last one."""
    return _blend_forward(static, rows, starts, inside)[0]


def _blend_forward(static: _Static, rows: Array, starts: Array, inside: Array):
    out = jax.ShapeDtypeStruct((len(inside), static.features + 1, static.pixels), rows.dtype)
    blended = _for_each_tile(static, _forward, out, starts, rows.T, inside)
    return blended, (rows, starts, inside, blended)


def _blend_backward(static: _Static, residuals: tuple, cotangent: Array):
    rows, starts, inside, blended = residuals
    remainder = jnp.sum(blended * cotangent, axis=1)
    received = jnp.concatenate([cotangent, remainder[:, None], inside[:, None]], axis=1)
    spare = static.padded - _GEOMETRY - received.shape[1]
    received = jnp.pad(received, ((0, 0), (_GEOMETRY, spare), (0, 0)))
    out = jax.ShapeDtypeStruct((len(rows), static.padded), rows.dtype)
    sums = _for_each_tile(static, _backward, out, starts, rows.T, received)
    return _row_gradients(rows, sums), None, None


_blend.defvjp(_blend_forward, _blend_backward)


def _for_each_tile(
    static: _Static, kernel: Any, out: jax.ShapeDtypeStruct, starts: Array, *operands: Array
) -> Array:
    """Runs `kernel(static, starts, basis, *operands, out)` once per tile; all see whole arrays."""
    from jax.experimental.pallas import triton  # slow, and not part of every jaxlib

    call = functools.partial(
        pl.pallas_call,
        functools.partial(kernel, static),
        out,
        grid=(len(starts) - 1,),
        compiler_params=triton.CompilerParams(num_warps=max(1, static.pixels // 32)),
    )
    # The interpreter would copy whole operands for every tile once they have a batch axis.
    interpreted = jax.custom_batching.sequential_vmap(call(interpret=True))
    native = call(interpret=False)
    basis = _basis(static, out.dtype)
    return lax.platform_dependent(
        starts, basis, *operands, cuda=native, rocm=native, default=interpreted
    )


def _basis(static: _Static, dtype: Any) -> np.ndarray:
    """1, x, y, x^2, x y, y^2 at the pixels of a tile, relative to its centre; then zeros."""
    axis = np.arange(static.tile) + 0.5 - static.tile // 2
    y, x = (side.reshape(-1) for side in np.meshgrid(axis, axis, indexing="ij"))
    rows = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y])
    return np.pad(rows, ((0, static.padded - len(rows)), (0, 0))).astype(dtype)


class _Chunk(NamedTuple):
    """The next k splats of a tile at its p pixels."""

    factors: tuple[Array, Array, Array]  # p, s, r, each (k 1)
    u: Float[Array, "k p"]  # dx + s dy of the pixels from the splats' centres
    dy: Float[Array, "k p"]
    features: list[Array]  # each (k 1)
    peaks: Float[Array, "k p"]  # opacity * exp(-distance^2 / 2) before both cuts
    alphas: Float[Array, "k p"]
    before: Float[Array, "k p"]  # transmittance in front of each splat
    weights: Float[Array, "k p"]
    after: Float[Array, "p"]  # transmittance behind the chunk


def _read_chunk(
    static: _Static,
    basis: jax.Ref,
    rows: jax.Ref,
    chunk: Int[Array, ""],
    transmittance: Float[Array, "p"],
) -> _Chunk:
    here = pl.ds(chunk * _CHUNK, _CHUNK)
    x, y, p, s, r, opacity, *features = (
        rows[column, here][:, None] for column in range(_GEOMETRY + static.features)
    )
    dy = basis[2, :][None, :] - y
    u = basis[1, :][None, :] - x + s * dy
    peaks = opacity * jnp.exp(-0.5 * (p * u * u + r * dy * dy))
    alphas = jnp.minimum(peaks, static.alpha_max)
    alphas = jnp.where(alphas >= ALPHA_MIN, alphas, 0.0)
    # log1p would be no better than the factors 1 - alpha, and its branches cost registers.
    passed = 1.0 - alphas
    logs = jnp.log(passed)
    before = transmittance * jnp.exp(jnp.cumsum(logs, axis=0) - logs)
    weights = jnp.where(before * passed >= TRANSMITTANCE_MIN, alphas * before, 0.0)
    after = transmittance * jnp.exp(jnp.sum(logs, axis=0))
    return _Chunk((p, s, r), u, dy, features, peaks, alphas, before, weights, after)


def _walk(starts: jax.Ref, transmittance: Float[Array, "p"], state: Any, advance: Any) -> tuple:
    """Repeats (T, state) = advance(chunk, T, state); the chunk where it stopped, and the state."""
    tile = pl.program_id(0)
    end = starts[tile + 1]

    def unfinished(carry: tuple) -> Array:
        chunk, transmittance, _ = carry
        return (chunk < end) & (jnp.max(transmittance) >= TRANSMITTANCE_MIN)

    def body(carry: tuple) -> tuple:
        chunk, transmittance, state = carry
        return chunk + 1, *advance(chunk, transmittance, state)

    chunk, _, state = lax.while_loop(unfinished, body, (starts[tile], transmittance, state))
    return chunk, state


def _forward(
    static: _Static, starts: jax.Ref, basis: jax.Ref, rows: jax.Ref, inside: jax.Ref, out: jax.Ref
) -> None:
    def advance(chunk: Array, transmittance: Array, blended: list) -> tuple:
        splats = _read_chunk(static, basis, rows, chunk, transmittance)
        weighted = [splats.weights * feature for feature in splats.features] + [splats.weights]
        sums = [jnp.sum(one, axis=0) for one in weighted]
        return splats.after, [old + new for old, new in zip(blended, sums, strict=True)]

    tile = pl.program_id(0)
    transmittance = inside[tile, :]
    blank = [jnp.zeros_like(transmittance)] * (static.features + 1)
    _, blended = _walk(starts, transmittance, blank, advance)
    for channel, image in enumerate(blended):
        out[tile, channel, :] = image


def _backward(
    static: _Static, starts: jax.Ref, basis: jax.Ref, rows: jax.Ref, received: jax.Ref, out: jax.Ref
) -> None:
    """Writes rows of the moments of e = a dL/da, then the gradients of features and `absolute`."""
    tile = pl.program_id(0)
    *channels, of_alpha, remainder, inside = (
        received[tile, _GEOMETRY + channel, :] for channel in range(static.features + 3)
    )

    def advance(chunk: Array, transmittance: Array, remainder: Array) -> tuple:
        splats = _read_chunk(static, basis, rows, chunk, transmittance)
        gains = of_alpha
        for channel, feature in zip(channels, splats.features, strict=True):
            gains = gains + channel * feature
        spent = splats.weights * gains
        behind = remainder - jnp.cumsum(spent, axis=0)
        energies = splats.alphas * (splats.before * gains - behind / (1.0 - splats.alphas))
        inert = (splats.weights <= 0.0) | (splats.peaks > static.alpha_max)
        energies = jnp.where(inert, 0.0, energies)
        sums = _over_pixels(energies, basis[...])
        sums = sums + _over_pixels(splats.weights, received[tile, :, :])
        if static.absolute:
            column = lax.broadcasted_iota(jnp.int32, sums.shape, 1)
            p, s, r = splats.factors
            pulls = (p * splats.u, p * s * splats.u + r * splats.dy)
            for offset, pull in enumerate(pulls, _GEOMETRY + static.features):
                total = jnp.sum(jnp.abs(energies * pull), axis=1)[:, None]
                sums = jnp.where(column == offset, total, sums)
        out[pl.ds(chunk * _CHUNK, _CHUNK), :] = sums
        return splats.after, remainder - jnp.sum(spent, axis=0)

    def clear(chunk: Array, _: None) -> None:
        out[pl.ds(chunk * _CHUNK, _CHUNK), :] = jnp.zeros((_CHUNK, static.padded), out.dtype)

    stopped, _ = _walk(starts, inside, remainder, advance)
    lax.fori_loop(stopped, starts[tile + 1], clear, None)


def _over_pixels(values: Float[Array, "k p"], columns: Float[Array, "c p"]) -> Float[Array, "k c"]:
    contract = (((1,), (1,)), ((), ()))
    return lax.dot_general(values, columns, contract, precision=lax.Precision.HIGHEST)


def _row_gradients(
    rows: Float[Array, "m d"], sums: Float[Array, "m padded"]
) -> Float[Array, "m d"]:
    """Cotangent of the rows from what `_backward` wrote; arbitrary in chunks of no tile."""
    geometry = geometry_gradients(rows[:, :_GEOMETRY].T, sums[:, :_GEOMETRY].T)
    return jnp.concatenate([geometry, sums[:, _GEOMETRY : rows.shape[1]]], -1)
