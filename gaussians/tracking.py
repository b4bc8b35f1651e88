"""Follows the motion of control points through a clip, before anything else is fitted.

The splats keep the look that the frames at rest gave them; only the poses of the nodes move. Three
things let a few thousand small steps follow a limb that swings across half of the object:

- Instants open one after the other, from both ends of the clip inwards, each starting from the pose
  and the velocity of its neighbour. From one end alone errors of depth add up along the clip; so
  only clips that end near the pose at rest are tracked (`returns`).
- Every step is spread over neighbouring nodes and instants (the preconditioner of Nicolet et al.
  2021, "Large Steps in Inverse Rendering"), so that limbs move as wholes, and what is not seen
  follows what is, instead of wandering.
- Rigidity saturates (Geman-McClure): a link that must tear, as between a hand and a hip that touch
  at rest, tears at a bounded price.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from d4d_jax import pytree
from d4d_jax.clips import Color
from d4d_jax.typing import PyTree
from gaussians import losses, preparation
from gaussians.asset import pair_capacity
from gaussians.captures import Capture, Views
from gaussians.deformation import Deformation, rigidity
from gaussians.deformation.control_points import ControlPoints
from gaussians.deformation.keyframes import Keyframes
from gaussians.projection import scaled_blur
from gaussians.rasterize import rasterize
from gaussians.types import Splats

#: Steps of one compiled call, after which the callback is called.
CHUNK = 50
_RECENT = 3  # instants at each end of the open ones that get half of the steps


@dataclasses.dataclass(frozen=True)
class Tracking:
    """How motion is followed.

    Attributes:
        steps: of a start, on one view each; 0 leaves tracking out.
        starts: the motion is followed this many times from rest, with the views in another order
            each, and what ends with the least loss is kept.
        pixels: width of the images.
        rate: Adam's step size of the poses, world units, at the first step.
        end_rate: factor on it at the last step; exponential in between.
        opening: share of the steps after which all instants are open.
        momentum: share of its neighbour's velocity that an instant starts with.
        spread: how far a step reaches over the links between nodes, at the first and the last step:
            lambda of (1 + lambda L)^-1, with the normalised Laplacian L of the graph.
        time_spread: likewise over the instants.
        neighbours: links per node.
        tolerance: stretch at which a link tears, relative to the length of the links.
        rigidity: weight of the links.
        acceleration: weight of the acceleration of the nodes.
        settled: factor on the nodes' learning rate in the fine stage: what was found is polished.
    """

    steps: int = 2400
    starts: int = 1
    pixels: int = 64
    rate: float = 8e-3
    end_rate: float = 0.1
    opening: float = 0.6
    momentum: float = 0.5
    spread: tuple[float, float] = (20.0, 1.0)
    time_spread: tuple[float, float] = (2.0, 0.5)
    neighbours: int = 8
    tolerance: float = 0.3
    rigidity: float = 1.0
    acceleration: float = 15.0
    settled: float = 0.2

    def __post_init__(self):
        if self.steps < 0 or min(self.starts, self.pixels, self.neighbours) < 1:
            raise ValueError(
                "Tracking needs steps of at least 0, and starts, pixels and neighbours of at least"
                f" 1; got {self}."
            )
        if not 0 < self.opening <= 1:
            raise ValueError(f"opening must lie in (0, 1]; got {self.opening}.")
        object.__setattr__(self, "spread", tuple(self.spread))
        object.__setattr__(self, "time_spread", tuple(self.time_spread))
        positive = (
            self.rate,
            self.end_rate,
            self.tolerance,
            self.settled,
            *self.spread,
            *self.time_spread,
        )
        if not min(positive) > 0:
            raise ValueError(
                f"Rates, spreads and the tolerance of tracking must be positive; got {self}."
            )


def bottom(field: Deformation, params: PyTree) -> tuple[Deformation, PyTree]:
    """The field at the bottom of a stack of fields, and its parameters for the first body."""
    while (base := getattr(field, "base", None)) is not None:
        params = params["base"]
        if isinstance(field, Keyframes):
            params = jax.tree.map(lambda leaf: leaf[0], params)
        field = base
    return field, params


def with_bottom(field: Deformation, params: PyTree, new: PyTree) -> PyTree:
    """`params` of a stack of fields with new ones for the field that `bottom` gives."""
    base = getattr(field, "base", None)
    if base is None:
        return new
    if isinstance(field, Keyframes):
        first = jax.tree.map(lambda leaf: leaf[0], params["base"])
        first = with_bottom(base, first, new)
        kept = jax.tree.map(lambda leaf, one: leaf.at[0].set(one), params["base"], first)
        return params | {"base": kept}
    return params | {"base": with_bottom(base, params["base"], new)}


def can_track(field: Deformation, capture: Capture) -> bool:
    """Whether the field has control points with a table of poses, and the clip returns to rest."""
    while (base := getattr(field, "base", None)) is not None:
        field = base
    return isinstance(field, ControlPoints) and field.motion == "table" and returns(capture)


def returns(capture: Capture, share: float = 0.5) -> bool:
    """Whether the clip ends near the pose at rest, as animations that loop do.

    Still and moving frame i need to share their camera. Their mean squared difference is then, in
    the last frame, at most `share` of what it is in the frame where it is largest.
    """
    moving, still = capture.moving, capture.still
    if still is None or still is moving or len(still) != len(moving):
        return False
    if not np.allclose(moving.camera.world_to_camera, still.camera.world_to_camera, atol=1e-4):
        return False
    errors = np.mean((np.asarray(moving.rgb) - np.asarray(still.rgb)) ** 2, axis=(1, 2, 3))
    return bool(errors[np.asarray(moving.timestamps).argmax()] <= share * errors.max())


@pytree.dataclass
class _Plan:
    """What the steps of one compiled call do."""

    views: Int[Array, "c"]
    rates: Float[Array, "c"]
    space: Float[Array, "m m"]
    time: Float[Array, "t t"]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is fixed at compile time."""

    field: ControlPoints
    tracking: Tracking
    background: Color
    rest: int
    blur: float
    pairs: int
    implementation: str | None


def track(
    field: ControlPoints,
    splats: Splats,
    capture: Capture,
    tracking: Tracking,
    key: jax.Array,
    *,
    implementation: str | None = None,
    callback: Callable[[int, float, float, PyTree], None] | None = None,
) -> PyTree:
    """Control points that follow the motion of a capture.

    Args:
        field: control points whose motion is a table.
        splats: as the still frames show the object; the nodes are placed among them.
        capture: with still frames. Tracking is meant for those that `returns` is true of.
        tracking: the choices.
        key: orders the views.
        implementation: of the rasterizer.
        callback: called every CHUNK steps with the steps done (of all starts), the mean loss and
            squared colour error of these, and the parameters as they are.

    Returns:
        Parameters of the field. The poses at the timestamp of the still frames are at rest.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    params = jax.jit(field.init)(key, splats)
    tracker = _Tracker(field, params, splats, capture, tracking, key, implementation, callback)
    starts = [tracker.run() for _ in range(tracking.starts)]
    poses, _ = min(starts, key=lambda start: start[1])
    return params | {"poses": poses}


class _Tracker:
    """The host's side of tracking: what all starts share, and the order of their views."""

    def __init__(
        self,
        field: ControlPoints,
        params: PyTree,
        splats: Splats,
        capture: Capture,
        tracking: Tracking,
        key: jax.Array,
        implementation: str | None,
        callback: Callable[[int, float, float, PyTree], None] | None,
    ):
        self.callback, self.done = callback, 0
        self.tracking, self.params, self.splats = tracking, params, splats
        scale = min(1.0, tracking.pixels / capture.moving.camera.width)
        moving = dataclasses.replace(capture, still=None)
        self.views = _with_silhouettes(preparation.views_of(moving, scale), capture)
        self.times = np.asarray(capture.moving.timestamps)
        self.instants = np.linspace(0, 1, field.time_resolution)
        still = 0.0 if capture.still is None else float(np.asarray(capture.still.timestamps)[0])
        self.settings = _Settings(
            field,
            tracking,
            capture.background,
            rest=int(np.abs(self.instants - still).argmin()),
            blur=scaled_blur(scale),
            pairs=pair_capacity(4 * len(splats)),
            implementation=implementation,
        )
        neighbours = min(tracking.neighbours, field.num_nodes - 1)
        self.graph = rigidity.neighbour_graph(params["nodes"]["positions"], neighbours)
        self.smooth = _Smoothing(self.graph, field.time_resolution, tracking)
        self.rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())

    def run(self) -> tuple[PyTree, float]:
        """All steps of a start: the poses, and the mean loss of the last chunk."""
        steps, poses, loss = self.tracking.steps, self.params["poses"], math.inf
        moments = _adam().init(poses)
        opened = np.zeros(0, int)
        for begin in range(0, steps, CHUNK):
            count = min(CHUNK, steps - begin)
            plan, now = self._plan(begin, count)
            poses = _open(poses, opened, now, self.tracking.momentum)
            opened = now
            poses, moments, loss, mse = self._advance(poses, moments, plan)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"The loss became {loss} at step {begin} of tracking; lower tracking.rate,"
                    " or check the frames for numbers that are not finite."
                )
            self.done += count
            if self.callback is not None:
                self.callback(self.done, loss, mse, self.params | {"poses": poses})
        return poses, loss

    def _plan(self, begin: int, count: int) -> tuple[_Plan, np.ndarray]:
        """What `count` steps do, and the instants that are open in them."""
        tracking, spacing = self.tracking, 1 / (len(self.instants) - 1)
        done = begin / tracking.steps
        depth = 0.5 * done / tracking.opening + 2.5 * spacing
        steps = (begin + np.arange(count)) / tracking.steps
        views = _draw_views(self.rng, self.times, depth, _RECENT * spacing, count)
        plan = _Plan(
            views=jnp.asarray(views),
            rates=jnp.asarray(tracking.rate * tracking.end_rate**steps, jnp.float32),
            space=self.smooth.space(done),
            time=self.smooth.time(done),
        )
        return plan, np.flatnonzero(np.minimum(self.instants, 1 - self.instants) <= depth)

    def _advance(
        self, poses: PyTree, moments: PyTree, plan: _Plan
    ) -> tuple[PyTree, PyTree, float, float]:
        """Poses, moments, mean loss and squared error, with as much memory as it takes."""
        still = (self.params["nodes"], self.splats, self.views, self.graph, plan)
        while True:
            result, loss, mse, overflow = _advance(poses, moments, *still, settings=self.settings)
            if not int(overflow):
                return *result, float(loss), float(mse)
            pairs = pair_capacity(self.settings.pairs + int(overflow))
            self.settings = dataclasses.replace(self.settings, pairs=pairs)


def _with_silhouettes(views: Views, capture: Capture) -> Views:
    """The same views with alpha, judged by the background where it is unknown."""
    alpha = preparation.silhouettes(views.rgb, views.alpha, capture.background)
    return jax.tree.map(jnp.asarray, dataclasses.replace(views, alpha=alpha))


class _Smoothing:
    """The matrices that spread a step over nodes and instants, as they change over the run."""

    def __init__(self, graph: tuple[Array, Array], instants: int, tracking: Tracking):
        neighbours, weights = (np.asarray(part) for part in graph)
        links = np.zeros((len(neighbours),) * 2)
        np.put_along_axis(links, neighbours, weights, axis=1)
        chain = np.eye(instants, k=1) + np.eye(instants, k=-1)
        self._space, self._time = _laplacian(links + links.T), _laplacian(chain)
        self._tracking = tracking

    def space(self, done: float) -> Float[Array, "m m"]:
        return _inverse(self._space, self._tracking.spread, done)

    def time(self, done: float) -> Float[Array, "t t"]:
        return _inverse(self._time, self._tracking.time_spread, done)


def _laplacian(links: np.ndarray) -> np.ndarray:
    """1 - D^-1 W: rows sum to 0, so that its smoothing leaves what is the same for all."""
    return np.eye(len(links)) - links / links.sum(axis=1, keepdims=True)


def _inverse(laplacian: np.ndarray, spread: tuple[float, float], done: float) -> Array:
    first, last = spread
    amount = first * (last / first) ** done
    inverse = np.linalg.inv(np.eye(len(laplacian)) + amount * laplacian)
    return jnp.asarray(inverse, jnp.float32)


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(b2=0.99, eps=1e-12)


def _open(poses: PyTree, before: np.ndarray, now: np.ndarray, momentum: float) -> PyTree:
    """Starts the instants opened since from the pose and the velocity of their neighbours."""
    if not len(before):
        return poses
    tables = {name: np.array(table) for name, table in poses.items()}
    for table in tables.values():
        last = len(table) - 1
        for step, side in ((1, now[now <= last // 2]), (-1, now[now > last // 2][::-1])):
            for i in (i for i in side if i not in before):
                near, far = table[i - step], table[np.clip(i - 2 * step, 0, last)]
                table[i] = near + momentum * (near - far)
    return jax.tree.map(jnp.asarray, tables)


def _draw_views(
    rng: np.random.Generator, times: np.ndarray, depth: float, recent: float, count: int
) -> np.ndarray:
    """Views of the open instants like cards; half of them of those opened last, while some are."""
    inwards = np.minimum(times, 1 - times)
    depth = max(depth, inwards.min())
    open_ = np.flatnonzero(inwards <= depth)
    decks = [rng.permutation(open_) for _ in range(count // len(open_) + 1)]
    drawn = np.concatenate(decks)[:count]
    newest = np.flatnonzero((inwards <= depth) & (inwards > depth - recent))
    if len(open_) < len(times) and len(newest):
        drawn = np.where(rng.random(count) < 0.5, rng.choice(newest, count), drawn)
    return drawn


@functools.partial(jax.jit, static_argnames=("settings",))
def _advance(
    poses: PyTree,
    moments: PyTree,
    nodes: PyTree,
    splats: Splats,
    views: Views,
    graph: tuple[Array, Array],
    plan: _Plan,
    *,
    settings: _Settings,
) -> tuple[tuple[PyTree, PyTree], Float[Array, ""], Float[Array, ""], Int[Array, ""]]:
    """The steps of a plan: poses and moments, mean loss, mean squared error, worst overflow."""
    tracking, field = settings.tracking, settings.field
    pinned = jnp.ones((field.time_resolution, 1, 1)).at[settings.rest].set(0.0)

    def loss_of(poses: PyTree, index: Array) -> tuple[Array, tuple[Array, Array]]:
        params = {"nodes": nodes, "poses": poses}
        moved = field.apply(params, splats, views.timestamps[index])
        render = rasterize(
            moved,
            views.camera[index],
            jnp.asarray(settings.background, jnp.float32),
            implementation=settings.implementation,
            capacity=settings.pairs,
            blur=settings.blur,
        )
        target = views.rgb[index]
        loss = 0.8 * losses.l1(render.rgb, target) + 0.2 * losses.dssim(render.rgb, target)
        loss += 0.3 * losses.alpha_l1(render.alpha, jnp.asarray(views.alpha)[index])
        places, rotations = field.trajectories(params)
        loss += tracking.acceleration * rigidity.acceleration(places)
        links = rigidity.arap(
            nodes["positions"],
            places,
            rotations,
            *graph,
            tracking.tolerance,
            saturating=True,
        )
        mse = jnp.mean((render.rgb - target) ** 2)
        return loss + tracking.rigidity * links, (mse, render.overflow)

    def spread(tree: PyTree, time: Array, space: Array) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.einsum("st,tmc,mn->snc", time, leaf, space), tree)

    def one(carry: tuple[PyTree, PyTree], step: tuple[Array, Array]) -> tuple[Any, Any]:
        poses, moments = carry
        index, rate = step
        (loss, (mse, overflow)), grads = jax.value_and_grad(loss_of, has_aux=True)(poses, index)
        updates, moments = _adam().update(spread(grads, plan.time.T, plan.space), moments)
        updates = spread(updates, plan.time, plan.space.T)
        poses = jax.tree.map(lambda pose, update: pose - rate * pinned * update, poses, updates)
        return (poses, moments), (loss, mse, overflow)

    carry, told = jax.lax.scan(one, (poses, moments), (plan.views, plan.rates))
    loss, mse, overflow = told
    return carry, loss.mean(), mse.mean(), overflow.max()
