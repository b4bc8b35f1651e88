"""Exact tiled rasterizer in plain XLA operations: CPU, GPU and TPU alike.

Splats are listed per square tile (`binning`). Tiles of similar occupancy form a group,
and a group walks through its lists nearest first, in chunks of `_CHUNK` splats, until the lists end
or all of its pixels are opaque. So the loops have the length that the scene needs, while every
array has a static shape.

The backward pass walks front to back a second time rather than storing anything. For a pixel with
cotangent v and output C, let g_k = v . f_k and R_k the part of v . C that lies behind splat k:

    dL / da_k = T_k g_k - R_k / (1 - a_k),      R_k = v . C - sum_{j <= k} w_j g_j

with w_k = a_k T_k; alpha is one more feature that is 1 for every splat. All that a splat's geometry
receives from a tile follows from the moments sum_p e_p {1, x, y, x^2, x y, y^2} of e = a dL/da over
the tile's pixels, and those are one matrix product per chunk.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gaussians.rasterize.binning import bin_splats, by_occupancy, default_capacity
from gaussians.rasterize.screen import (
    ALPHA_MIN,
    TRANSMITTANCE_MIN,
    Composite,
    ScreenSplats,
    geometry_gradients,
)

_CHUNK = 16
_GROUP = 32
_GEOMETRY = 6  # columns of a splat row before its features: x, y, p, s, r, opacity
_TILE_SIZE = 8


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The static facts of one image."""

    width: int
    height: int
    tile: int
    alpha_max: float
    absolute: bool  # the table ends in two columns for `ScreenSplats.absolute`

    @property
    def pixels(self) -> int:
        return self.tile * self.tile

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile)

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile)

    @property
    def group(self) -> int:
        """Tiles that advance together: enough for long vectors, few enough to differ little."""
        return min(_GROUP, max(8, self.columns * self.rows // 8))

    def to_tiles(self, image: Float[Array, "h w c"]) -> Float[Array, "tiles c p"]:
        """Cuts an image into tiles, the last one empty; pixels past the border are 0."""
        below, right = self.rows * self.tile - self.height, self.columns * self.tile - self.width
        image = jnp.pad(image, ((0, below), (0, right), (0, 0)))
        tiles = image.reshape(self.rows, self.tile, self.columns, self.tile, -1).transpose(
            0, 2, 4, 1, 3
        )
        return jnp.pad(
            tiles.reshape(self.rows * self.columns, -1, self.pixels), ((0, 1), (0, 0), (0, 0))
        )

    def to_image(self, tiles: Float[Array, "tiles c p"]) -> Float[Array, "h w c"]:
        """The inverse of `to_tiles`."""
        image = tiles[:-1].reshape(self.rows, self.columns, -1, self.tile, self.tile)
        image = image.transpose(0, 3, 1, 4, 2)
        image = image.reshape(self.rows * self.tile, self.columns * self.tile, -1)
        return image[: self.height, : self.width]


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

    Under `jax.vmap` the blending runs one element after the other (on CPU that is what is fastest);
    projection and sorting are batched.
    """
    tile_size = _TILE_SIZE if tile_size is None else tile_size
    n, num_features = screen.features.shape
    if n == 0 or width == 0 or height == 0:
        blank = jnp.zeros((height, width, num_features), screen.features.dtype)
        return Composite(blank, jnp.zeros((height, width), blank.dtype), jnp.zeros((), jnp.int32))
    capacity = default_capacity(n, width, height, tile_size) if capacity is None else capacity
    fixed: ScreenSplats = lax.stop_gradient(screen)
    bins = bin_splats(fixed, width=width, height=height, tile_size=tile_size, capacity=capacity)
    columns = [screen.means2d, screen.factors, screen.opacities[:, None], screen.features]
    if screen.absolute is not None:
        columns.append(screen.absolute)
    grid = _Grid(width, height, tile_size, alpha_max, absolute=screen.absolute is not None)
    blended: Array = _blend(grid, jnp.concatenate(columns, -1), bins.splats, bins.starts)
    return Composite(blended[..., :-1], blended[..., -1], bins.overflow)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blend(
    grid: _Grid, table: Float[Array, "n d"], splats: Int[Array, "m"], starts: Int[Array, "starts"]
) -> Float[Array, "h w c"]:
    """Image of the features (columns of `table` behind the geometry), and alpha as the last one."""
    return _blend_forward(grid, table, splats, starts)[0]


def _blend_forward(grid: _Grid, table: Array, splats: Array, starts: Array):
    run = jax.custom_batching.sequential_vmap(functools.partial(_forward, grid))
    image = run(table, splats, starts)
    return image, (table, splats, starts, image)


def _blend_backward(grid: _Grid, residuals: tuple, cotangent: Array):
    table, splats, starts, image = residuals
    run = jax.custom_batching.sequential_vmap(functools.partial(_backward, grid))
    return run(table, splats, starts, image, cotangent), None, None


_blend.defvjp(_blend_forward, _blend_backward)


class _Chunk(NamedTuple):
    """The next k splats of g tiles; coordinates are relative to the tile's centre."""

    index: Int[Array, "g k"]  # row of the table, or one past its end
    x: Float[Array, "g k"]
    y: Float[Array, "g k"]
    factors: tuple[Array, Array, Array]  # p, s, r, each (g k)
    opacity: Float[Array, "g k"]  # 0 past the end of a tile's list
    features: Float[Array, "g k f"]


def _read_chunk(
    grid: _Grid,
    table: Float[Array, "n d"],
    splats: Int[Array, "m"],
    begin: Int[Array, "g"],
    end: Int[Array, "g"],
    tiles: Int[Array, "g"],
    step: Int[Array, ""],
) -> _Chunk:
    position = begin[:, None] + step * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
    listed = position < end[:, None]
    index = splats[jnp.minimum(position, splats.shape[0] - 1)]
    rows = table[index]
    centre_x = ((tiles % grid.columns) * grid.tile + grid.tile // 2).astype(table.dtype)
    centre_y = ((tiles // grid.columns) * grid.tile + grid.tile // 2).astype(table.dtype)
    return _Chunk(
        index=jnp.where(listed, index, table.shape[0]),
        x=rows[..., 0] - centre_x[:, None],
        y=rows[..., 1] - centre_y[:, None],
        factors=(rows[..., 2], rows[..., 3], rows[..., 4]),
        opacity=jnp.where(listed, rows[..., 5], 0.0),
        features=rows[..., _GEOMETRY : rows.shape[-1] - 2 * grid.absolute],
    )


def _pixel_offsets(grid: _Grid, dtype) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixel centres of a tile, relative to the tile's centre."""
    axis = np.arange(grid.tile, dtype=dtype) + 0.5 - grid.tile // 2
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return x.reshape(-1).astype(dtype), y.reshape(-1).astype(dtype)


def _offsets(grid: _Grid, chunk: _Chunk) -> tuple[Float[Array, "g k p"], Float[Array, "g k p"]]:
    """u = dx + s dy and dy of the pixels from the splats' centres."""
    x, y = map(jnp.asarray, _pixel_offsets(grid, chunk.x.dtype))
    dy = y - chunk.y[..., None]
    return x - chunk.x[..., None] + chunk.factors[1][..., None] * dy, dy


def _alphas(grid: _Grid, chunk: _Chunk) -> Float[Array, "g k p"]:
    """opacity * exp(-distance^2 / 2) at every pixel, cut at both ends."""
    u, dy = _offsets(grid, chunk)
    p, _, r = (factor[..., None] for factor in chunk.factors)
    peaks = chunk.opacity[..., None] * jnp.exp(-0.5 * (p * u * u + r * dy * dy))
    alphas = jnp.minimum(peaks, grid.alpha_max)
    return jnp.where(alphas >= ALPHA_MIN, alphas, 0.0)


def _start_transmittance(grid: _Grid, tiles: Int[Array, "g"], dtype) -> Float[Array, "g p"]:
    """1 inside the image, 0 past its border, where nothing needs to be blended."""
    pixel_x, pixel_y = _pixel_offsets(grid, dtype)
    x = (tiles % grid.columns * grid.tile + grid.tile // 2)[:, None] + pixel_x
    y = (tiles // grid.columns * grid.tile + grid.tile // 2)[:, None] + pixel_y
    return ((x < grid.width) & (y < grid.height)).astype(dtype)


def _walk(grid: _Grid, starts: Array, tiles: Array, state: tuple, advance) -> tuple:
    """Runs `advance(step, begin, end, state)` until lists end or all is opaque; state[0] is T."""
    padded = jnp.append(starts, starts[-1])
    begin, end = padded[tiles], padded[tiles + 1]
    steps = (jnp.max(end - begin) + _CHUNK - 1) // _CHUNK

    def unfinished(carry: tuple) -> Bool[Array, ""]:
        step, (transmittance, *_) = carry
        return (step < steps) & (jnp.max(transmittance) >= TRANSMITTANCE_MIN)

    def body(carry: tuple) -> tuple:
        step, state = carry
        return step + 1, advance(step, begin, end, state)

    return lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), state))[1]


def _at(rows: Float[Array, "g k *c"], k: Int[Array, ""]) -> Float[Array, "g *c"]:
    return lax.dynamic_index_in_dim(rows, k, axis=1, keepdims=False, allow_negative_indices=False)


def _forward(grid: _Grid, table: Array, splats: Array, starts: Array) -> Array:
    channels = table.shape[1] - _GEOMETRY - 2 * grid.absolute + 1
    groups = by_occupancy(starts, grid.group)

    def blend_group(tiles: Array) -> Array:
        def advance(step: Array, begin: Array, end: Array, state: tuple) -> tuple:
            chunk = _read_chunk(grid, table, splats, begin, end, tiles, step)
            features = jnp.pad(chunk.features, ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
            alphas = _alphas(grid, chunk)

            def blend_one(k: Array, state: tuple) -> tuple:
                transmittance, blended = state
                alpha = _at(alphas, k)
                remaining = transmittance * (1.0 - alpha)
                weight = jnp.where(remaining >= TRANSMITTANCE_MIN, alpha * transmittance, 0.0)
                return remaining, blended + weight[:, None] * _at(features, k)[..., None]

            return lax.fori_loop(0, _CHUNK, blend_one, state)

        blank = jnp.zeros((tiles.shape[0], channels, grid.pixels), table.dtype)
        state = (_start_transmittance(grid, tiles, table.dtype), blank)
        return _walk(grid, starts, tiles, state, advance)[1]

    blended = lax.map(blend_group, groups).reshape(-1, channels, grid.pixels)
    tiles = jnp.zeros((grid.columns * grid.rows + 1, channels, grid.pixels), table.dtype)
    return grid.to_image(tiles.at[groups.reshape(-1)].set(blended))


def _backward(
    grid: _Grid, table: Array, splats: Array, starts: Array, image: Array, cotangent: Array
) -> Array:
    """Cotangent of `table`."""
    cotangents = grid.to_tiles(cotangent)
    remainders = grid.to_tiles(jnp.sum(image * cotangent, axis=-1, keepdims=True))[:, 0]

    def add_group(gradient: Array, tiles: Array) -> tuple[Array, None]:
        received = cotangents[tiles]  # (g f p)

        def advance(step: Array, begin: Array, end: Array, state: tuple) -> tuple:
            *replayed, gradient = state
            chunk = _read_chunk(grid, table, splats, begin, end, tiles, step)
            replay = functools.partial(_replay_one, grid, _alphas(grid, chunk), chunk, received)
            replayed = lax.fori_loop(0, _CHUNK, replay, tuple(replayed))
            _, _, weights, energies = replayed
            rows = _splat_gradients(grid, chunk, weights, energies, received)
            gradient = gradient.at[chunk.index.reshape(-1)].add(
                rows.reshape(-1, rows.shape[-1]), mode="drop"
            )
            return (*replayed, gradient)

        start = _start_transmittance(grid, tiles, table.dtype)
        scratch = jnp.zeros((tiles.shape[0], _CHUNK, grid.pixels), table.dtype)
        state = (start, remainders[tiles], scratch, scratch, gradient)
        return _walk(grid, starts, tiles, state, advance)[-1], None

    groups = by_occupancy(starts, grid.group)
    return lax.scan(add_group, jnp.zeros_like(table), groups)[0]


def _replay_one(
    grid: _Grid, alphas: Array, chunk: _Chunk, received: Array, k: Array, state: tuple
) -> tuple:
    """Splat k of each tile: writes its weights w and e = a dL/da."""
    transmittance, remainder, weights, energies = state
    alpha = _at(alphas, k)
    remaining = transmittance * (1.0 - alpha)
    weight = jnp.where(remaining >= TRANSMITTANCE_MIN, alpha * transmittance, 0.0)
    # The sum is written out: a reduction inside a loop runs one element at a time on CPU.
    gain, features = received[:, -1], _at(chunk.features, k)
    for f in range(received.shape[1] - 1):
        gain = gain + received[:, f] * features[:, f, None]
    remainder = remainder - weight * gain
    energy = alpha * (transmittance * gain - remainder / (1.0 - alpha))
    energy = jnp.where((weight > 0.0) & (alpha < grid.alpha_max), energy, 0.0)
    weights = lax.dynamic_update_index_in_dim(weights, weight, k, 1, allow_negative_indices=False)
    energies = lax.dynamic_update_index_in_dim(energies, energy, k, 1, allow_negative_indices=False)
    return remaining, remainder, weights, energies


def _splat_gradients(
    grid: _Grid,
    chunk: _Chunk,
    weights: Float[Array, "g k p"],
    energies: Float[Array, "g k p"],
    received: Float[Array, "g f p"],
) -> Float[Array, "g k d"]:
    """Rows of the table's cotangent from the weights and energies of one chunk."""
    px, py = _pixel_offsets(grid, weights.dtype)
    monomials = np.stack([np.ones_like(px), px, py, px * px, px * py, py * py], axis=-1)
    moments = energies.reshape(-1, grid.pixels) @ monomials
    moments = jnp.moveaxis(moments.reshape(*chunk.x.shape, 6), -1, 0)
    geometry = geometry_gradients((chunk.x, chunk.y, *chunk.factors, chunk.opacity), moments)
    of_features = jnp.einsum("gkp,gfp->gkf", weights, received[:, :-1])
    rows = [geometry, of_features]
    if grid.absolute:
        u, dy = _offsets(grid, chunk)
        p, s, r = (factor[..., None] for factor in chunk.factors)
        pulls = (energies * p * u, energies * (p * s * u + r * dy))
        rows.append(jnp.stack([jnp.sum(jnp.abs(pull), axis=-1) for pull in pulls], axis=-1))
    return jnp.concatenate(rows, axis=-1)
