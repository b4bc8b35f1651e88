"""How rigidly, and how smoothly, a sparse set of points moves.

Along a single orbit every instant is seen from one side only, and how far away a point moves is
free. What keeps a body in one piece there is that neighbouring points turn and shift together: as
rigid as possible (ARAP, Sorkine & Alexa 2007).
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from d4d_jax.typing import AnyArray

_TINY = 1e-12  # squared world units; keeps sets that are one point from dividing 0 by 0


def nearest(
    points: Float[AnyArray, "n 3"], nodes: Float[AnyArray, "m 3"], count: int
) -> Int[Array, "n {count}"]:
    """The indices of the `count` nodes nearest to every point, nearest first.

    Exact, for a `count` of a few and hundreds of nodes; of equally near nodes the first wins. The
    nodes are inserted one by one into a sorted list per point, all points at once: on CPUs three to
    five times as fast as `jax.lax.top_k`, in O(n count) memory, and fast enough for every step, so
    that no list of neighbours has to follow the splats through densification.
    """
    points = jax.lax.stop_gradient(jnp.asarray(points))
    nodes = jax.lax.stop_gradient(jnp.asarray(nodes))
    coordinates = tuple(points.T)

    def insert(best: tuple, entry: tuple[Array, Array]) -> tuple[tuple, None]:
        node, number = entry
        dx, dy, dz = (x - c for x, c in zip(coordinates, node, strict=True))
        distance = dx * dx + dy * dy + dz * dz
        number = jnp.full(distance.shape, number)
        updated, incoming = [], (distance, number)
        for held in best:
            closer = distance < held[0]  # from here on: the list is sorted
            updated.append(_where(closer, incoming, held))
            incoming = _where(closer, held, (distance, number))
        return tuple(updated), None

    empty = (jnp.full(points.shape[:1], jnp.inf, points.dtype), jnp.zeros(points.shape[0], int))
    numbers = jnp.arange(nodes.shape[0])
    best, _ = jax.lax.scan(insert, (empty,) * count, (nodes, numbers), unroll=8)
    return jnp.stack([occupant for _, occupant in best], axis=-1)


def neighbour_graph(
    points: Float[AnyArray, "m 3"], count: int
) -> tuple[Int[Array, "m {count}"], Float[Array, "m {count}"]]:
    """Links every point to its `count` nearest others.

    Returns:
        The neighbours, nearest first, and the weights of the links, exp(-d^2 / mean d^2), which sum
        to 1 for every point. No gradient reaches `points`: nothing is gained by moving away.
    """
    points = jax.lax.stop_gradient(jnp.asarray(points))
    squared = jnp.sum((points[:, None] - points) ** 2, axis=-1)
    squared = jnp.where(jnp.eye(len(points), dtype=bool), jnp.inf, squared)
    negative, neighbours = jax.lax.top_k(-squared, count)
    return neighbours, jax.nn.softmax(negative / (_TINY - jnp.mean(negative)), axis=-1)


def arap(
    rest: Float[AnyArray, "m 3"],
    moved: Float[AnyArray, "t m 3"],
    rotations: Float[AnyArray, "t m 3 3"],
    neighbours: Int[AnyArray, "m k"],
    weights: Float[AnyArray, "m k"],
    tolerance: float = math.inf,
    *,
    saturating: bool = False,
) -> Float[Array, ""]:
    """As rigid as possible: how far the links of every point are from being only turned.

    The mean over instants and points of sum_j w_ij h(s_ij), where the stretch of a link is s_ij =
    |(p_j(t) - p_i(t)) - R_i(t) (p_j - p_i)| over the root mean square length of all links. So it is
    relative: 0.1 is a tenth of the length of a link, whatever the size of the object and the number
    of points. 0 for rigid motion of the whole.

    h(s) = s^2 up to about the `tolerance` c, and 2 c s beyond it (pseudo-Huber): where two limbs
    touch at rest, the links between them must be allowed to tear, and a square would rather bend
    both limbs. `saturating` takes h(s) = s^2 / (1 + (s / c)^2) instead (Geman & McClure 1985),
    which never grows beyond c^2: a link once torn costs the same wherever its ends go.

    SC-GS (Huang et al. 2024), after Sorkine & Alexa, takes for R_i the rotation that fits the links
    best (an SVD per point and instant, without gradient), and ties the points' own rotations to it
    by a second term. Here R_i is the point's own rotation. The minimum over R_i is the same, no SVD
    is needed, and the rotations that turn the splats are those that explain the positions.

    Args:
        rest: positions that define the links.
        moved: positions at t instants.
        rotations: of every point at these instants.
        neighbours, weights: of `neighbour_graph`.
        tolerance: above 0, relative to the length of the links; infinite for plain squares.
        saturating: whether a link has a highest price.
    """
    links = rest[neighbours] - rest[:, None]
    now = moved[:, neighbours] - moved[:, :, None]
    residuals = now - jnp.einsum("tmij,mkj->tmki", rotations, links)
    length = jnp.einsum("mk,mki->", weights, links**2) / len(rest)
    stretch = jnp.sum(residuals**2, axis=-1) / (length + _TINY)
    if saturating:
        stretch = stretch / (1 + stretch / tolerance**2)
    elif tolerance < math.inf:
        stretch = 2 * tolerance**2 * (jnp.sqrt(1 + stretch / tolerance**2) - 1)
    return jnp.mean(jnp.einsum("mk,tmk->tm", weights, stretch))


def acceleration(moved: Float[AnyArray, "t m 3"]) -> Float[Array, ""]:
    """Mean squared second difference over equally spaced instants, (world units / instant^2)^2."""
    if moved.shape[0] < 3:
        return jnp.zeros(())
    return jnp.mean(jnp.sum(jnp.diff(moved, n=2, axis=0) ** 2, axis=-1))


def _where(condition: Array, first: tuple[Array, ...], second: tuple[Array, ...]) -> tuple:
    return tuple(jnp.where(condition, a, b) for a, b in zip(first, second, strict=True))
