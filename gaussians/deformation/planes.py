"""Features of points from planes and lines of nodes, and the gradients of the nodes.

`slice_at`, `lookup_line` and `lookup_plane` interpolate one array. `sample` looks points up in the
three planes and the three lines of every scale of a HexPlane and multiplies what they find.

`sample` has a backward pass of its own, because XLA:CPU fuses elementwise operations into every
one of their readers: left alone, it repeats the lookups for each corner of each cell that a
gradient is added to. A loop stops it from doing so. The loop runs over the three pairs of a plane
and a line, and the nodes of all planes and scales form one table, so that its body is the same.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gaussians.deformation import Timestamp

#: The coordinates that address the three planes, in the order xy, xz, yz.
PAIRS = ((0, 1), (0, 2), (1, 2))
_FIRST, _SECOND = zip(*PAIRS, strict=True)

#: Per scale three arrays: the planes of `PAIRS`, (r, r, c), or the lines along x, y and z, (r, c).
Grids: TypeAlias = tuple[tuple[Array, ...], ...]


def slice_at(plane: Float[Array, "s *r"], at: Timestamp) -> Float[Array, "*r"]:
    """Linear interpolation of an array along its first axis at one scalar in [0, 1]."""
    nodes = plane.shape[0]
    weights = jnp.maximum(0, 1 - jnp.abs(jnp.clip(at, 0, 1) * (nodes - 1) - jnp.arange(nodes)))
    return jnp.tensordot(weights, plane, axes=1)


def lookup_line(line: Float[Array, "r c"], at: Float[Array, "n"]) -> Float[Array, "n c"]:
    """Linear interpolation of a line of features at points in [0, 1]."""
    cell, fraction = _cells(at, line.shape[0])
    return _along_line(line, cell, fraction)


def lookup_plane(plane: Float[Array, "r s c"], at: Float[Array, "n 2"]) -> Float[Array, "n c"]:
    """Bilinear interpolation of a plane of features at points in [0, 1]^2."""
    rows, columns, channels = plane.shape
    row, down = _cells(at[:, 0], rows)
    column, right = _cells(at[:, 1], columns)
    table = plane.reshape(rows * columns, channels)
    return _in_plane(table, row * columns + column, columns, down, right)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def sample(
    planes: Grids, lines: Grids, at: Float[Array, "n 3"], slopes: bool = True
) -> Float[Array, "n f"]:
    """The product of the six features of every point, the scales side by side.

    Args:
        planes: per scale, square, the same number of nodes r a side for all three.
        lines: per scale, with as many nodes.
        at: points in [0, 1]^3.
        slopes: whether gradients reach `at`; where not, it counts as a constant.
    """
    del slopes
    scales = []
    for squares, axes in zip(planes, lines, strict=True):
        factors = [
            lookup_plane(plane, at[:, list(pair)])
            for plane, pair in zip(squares, PAIRS, strict=True)
        ]
        factors += [lookup_line(line, at[:, axis]) for axis, line in enumerate(axes)]
        scales.append(functools.reduce(jnp.multiply, factors))
    return jnp.concatenate(scales, axis=-1)


class _Places(NamedTuple):
    """Where points lie, per plane or line (3), scale (s) and point (n), in the joined tables.

    plane: row of the cell's first corner among the nodes of all planes.
    line: row of the cell's first end among the nodes of all lines.
    down, right: how far into the cell of the plane, along its first and second axis.
    along: how far into the cell of the line.
    nodes: a side of each scale, (s, 1): what is between two rows of a plane.
    """

    plane: Int[Array, "3 s n"]
    line: Int[Array, "3 s n"]
    down: Float[Array, "3 s n"]
    right: Float[Array, "3 s n"]
    along: Float[Array, "3 s n"]
    nodes: Int[Array, "s 1"]


def _sample_forward(
    planes: Grids, lines: Grids, at: Array, slopes: bool
) -> tuple[Array, tuple[Any, ...]]:
    del slopes
    places = _locate(at, [scale[0].shape[0] for scale in lines])
    plane_table, line_table = _join(planes), _join(lines)
    in_planes = _in_plane(plane_table, places.plane, places.nodes, places.down, places.right)
    in_lines = _along_line(line_table, places.line, places.along)
    features = _product(in_planes) * _product(in_lines)
    return jnp.concatenate(list(features), axis=-1), (planes, lines, at, in_planes, in_lines)


def _sample_backward(
    slopes: bool, residuals: tuple[Any, ...], cotangent: Float[Array, "n f"]
) -> tuple[Grids, Grids, Array]:
    planes, lines, at, in_planes, in_lines = residuals
    places = _locate(at, [scale[0].shape[0] for scale in lines])
    plane_table, line_table = _join(planes), _join(lines)
    scales, channels = len(lines), plane_table.shape[-1]
    cotangent = cotangent.reshape(-1, scales, channels).swapaxes(0, 1)
    past_lines = cotangent * _product(in_lines)
    past_planes = cotangent * _product(in_planes)

    def pair(grids: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], Any]:
        others = (k + 1) % 3, (k + 2) % 3
        to_plane = past_lines * in_planes[others[0]] * in_planes[others[1]]
        to_line = past_planes * in_lines[others[0]] * in_lines[others[1]]
        plane, line = places.plane[k], places.line[k]
        down, right, along = places.down[k], places.right[k], places.along[k]
        corners = _corners(plane, places.nodes, down, right)
        ends = ((line, 1 - along), (line + 1, along))
        moved = _add(grids[0], corners, to_plane), _add(grids[1], ends, to_line)
        if not slopes:
            return moved, None
        downwards, rightwards = _plane_slopes(plane_table, plane, places.nodes, down, right)
        forwards = _rows(line_table, line + 1) - _rows(line_table, line)
        steps = (places.nodes - 1).astype(at.dtype)
        return moved, jnp.stack([
            jnp.sum(steps * jnp.sum(gradient * slope, axis=-1), axis=0)
            for gradient, slope in (
                (to_plane, downwards), (to_plane, rightwards), (to_line, forwards)
            )
        ])  # fmt: skip

    grids = jnp.zeros_like(plane_table), jnp.zeros_like(line_table)
    (plane_table, line_table), pulls = jax.lax.scan(pair, grids, jnp.arange(3))
    gradient = jnp.zeros_like(at)
    if slopes:
        for k in range(3):
            for axis, pull in zip((_FIRST[k], _SECOND[k], k), pulls[k], strict=True):
                gradient = gradient.at[:, axis].add(pull)
    return _part(plane_table, planes), _part(line_table, lines), gradient


sample.defvjp(_sample_forward, _sample_backward)


def _locate(at: Float[Array, "n 3"], resolutions: Sequence[int]) -> _Places:
    nodes = jnp.array(resolutions, jnp.int32)[:, None]
    cell, fraction = _cells(at.T[:, None], nodes)

    def starts(sizes: Sequence[int]) -> Int[Array, "3 s 1"]:
        ends = list(itertools.accumulate([*sizes] * 3, initial=0))
        return jnp.array(ends[:-1], jnp.int32).reshape(3, len(sizes), 1)

    first, second = (jnp.stack([cell[axis] for axis in axes]) for axes in (_FIRST, _SECOND))
    return _Places(
        plane=first * nodes + second + starts([r * r for r in resolutions]),
        line=cell + starts(resolutions),
        down=jnp.stack([fraction[axis] for axis in _FIRST]),
        right=jnp.stack([fraction[axis] for axis in _SECOND]),
        along=fraction,
        nodes=nodes,
    )


def _cells(
    at: Float[Array, "*n"], nodes: int | Int[Array, "s 1"]
) -> tuple[Int[Array, "*m"], Float[Array, "*m"]]:
    """The cell that holds each point of [0, 1], and how far into it the point lies."""
    last = jnp.asarray(nodes - 2, at.dtype)
    scaled = at * (last + 1)
    cell = jnp.clip(jnp.floor(scaled), 0, last)
    return cell.astype(jnp.int32), scaled - cell


def _rows(table: Float[Array, "r c"], index: Int[Array, "*n"]) -> Float[Array, "*n c"]:
    return table.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _in_plane(
    table: Float[Array, "r c"],
    index: Int[Array, "*n"],
    columns: int | Int[Array, "s 1"],
    down: Float[Array, "*n"],
    right: Float[Array, "*n"],
) -> Float[Array, "*n c"]:
    return functools.reduce(
        jnp.add,
        (
            weight[..., None] * _rows(table, corner)
            for corner, weight in _corners(index, columns, down, right)
        ),
    )


def _along_line(
    table: Float[Array, "r c"], index: Int[Array, "*n"], along: Float[Array, "*n"]
) -> Float[Array, "*n c"]:
    along = along[..., None]
    return (1 - along) * _rows(table, index) + along * _rows(table, index + 1)


def _corners(
    index: Int[Array, "*n"],
    columns: int | Int[Array, "s 1"],
    down: Float[Array, "*n"],
    right: Float[Array, "*n"],
) -> tuple[tuple[Int[Array, "*n"], Float[Array, "*n"]], ...]:
    """The rows of the four corners of a cell, and their weights."""
    return (
        (index, (1 - down) * (1 - right)),
        (index + 1, (1 - down) * right),
        (index + columns, down * (1 - right)),
        (index + columns + 1, down * right),
    )


def _plane_slopes(
    table: Float[Array, "r c"],
    index: Int[Array, "s n"],
    columns: Int[Array, "s 1"],
    down: Float[Array, "s n"],
    right: Float[Array, "s n"],
) -> tuple[Float[Array, "s n c"], Float[Array, "s n c"]]:
    """The derivatives by `down` and by `right`."""
    near, near_right = _rows(table, index), _rows(table, index + 1)
    far, far_right = _rows(table, index + columns), _rows(table, index + columns + 1)
    down, right = down[..., None], right[..., None]
    downwards = (1 - right) * (far - near) + right * (far_right - near_right)
    rightwards = (1 - down) * (near_right - near) + down * (far_right - far)
    return downwards, rightwards


def _add(
    table: Float[Array, "r c"],
    parts: Iterable[tuple[Int[Array, "s n"], Float[Array, "s n"]]],
    gradient: Float[Array, "s n c"],
) -> Float[Array, "r c"]:
    """Adds a gradient to some rows of a table, with a weight each."""
    for index, weight in parts:
        update = (weight[..., None] * gradient).reshape(-1, table.shape[-1])
        table = table.at[index.reshape(-1)].add(
            update, mode="promise_in_bounds", wrap_negative_indices=False
        )
    return table


def _product(factors: Float[Array, "3 s n c"]) -> Float[Array, "s n c"]:
    return factors[0] * factors[1] * factors[2]


def _join(grids: Grids) -> Float[Array, "r c"]:
    """The nodes of all grids in one table: by plane or line, then by scale."""
    channels = grids[0][0].shape[-1]
    return jnp.concatenate([scale[k].reshape(-1, channels) for k in range(3) for scale in grids])


def _part(table: Float[Array, "r c"], grids: Grids) -> Grids:
    """The inverse of `_join`, in the shape of `grids`."""
    shapes = [scale[k].shape for k in range(3) for scale in grids]
    stops = list(itertools.accumulate(math.prod(shape[:-1]) for shape in shapes))
    parts = [
        rows.reshape(shape)
        for rows, shape in zip(jnp.split(table, stops[:-1]), shapes, strict=True)
    ]
    count = len(grids)
    return tuple(tuple(parts[s::count]) for s in range(count))
