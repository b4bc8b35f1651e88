"""Finds the poses that tracking lost, and carves bodies for them.

After the coarse stage the moving splats should cover the silhouette of every frame. Where the
motion was too large to be followed they do not: there the object gets a body of its own
(`gaussians.deformation.keyframes`), carved from the longest run of frames whose silhouettes agree
on one shape.
"""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from d4d_jax import metrics
from d4d_jax.typing import PyTree
from gaussians import initialize
from gaussians.asset import Asset
from gaussians.captures import Capture, Views
from gaussians.evaluation import render_views
from gaussians.preparation import silhouettes
from gaussians.types import Splats

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Turn:
    """A run of instants that gets a body of its own.

    Attributes:
        first, last: the instants whose silhouettes the body is carved from, counted from 0.
        start, stop: timestamps between which the body is visible; above 1 means to the end.
    """

    first: int
    last: int
    start: float
    stop: float


def add_bodies(
    asset: Asset, capture: Capture, *, count: int, num_splats: int, key: jax.Array
) -> tuple[Splats, PyTree]:
    """Gives lost poses bodies of their own, as many as the field still has room for.

    Args:
        asset: after the coarse stage. Its field has `bodies` and `with_body`.
        capture: what it was fitted to.
        count: most bodies to add.
        num_splats: of each; fewer where fewer slots are free, none below a quarter of it.
        key: places the splats.

    Returns:
        The splats and the parameters of the field.
    """
    splats, params = asset.splats, asset.params
    field: Any = asset.deformation  # a Deformation that can hold bodies
    overlap = coverage_of(asset, capture)
    for number in range(count):
        turn = find_turn(overlap, capture)
        if turn is None:
            break
        free = int(np.sum(~np.asarray(splats.active)))
        if free < max(4, num_splats // 4):
            _LOGGER.warning(
                "Tracking lost the object from t = %.3f on, but only %d slots are free for the %d"
                " splats of a body: raise the capacity.",
                turn.start,
                free,
                num_splats,
            )
            break
        born_key, field_key = jax.random.split(jax.random.fold_in(key, number))
        born = _carve(  # One silhouette may miss a point: the object does move a little.
            capture,
            turn.first,
            turn.last,
            num_splats=min(num_splats, free),
            tolerance=1,
            sh_degree=splats.sh_degree,
            key=born_key,
        )
        if born is None:
            break
        splats, members = _append(splats, born)
        params = field.with_body(params, splats, members, turn.start, turn.stop, key=field_key)
        _LOGGER.info(
            "Tracking lost the object; %d splats are a body of its own from t = %.3f to %.3f.",
            int(members.sum()),
            turn.start,
            min(turn.stop, 1.0),
        )
        instants = capture.instants
        overlap = np.where((instants >= turn.start) & (instants <= turn.stop), 1.0, overlap)
    return splats, params


def coverage_of(asset: Asset, capture: Capture) -> Float[np.ndarray, "t"]:
    """The IoU of rendered and true silhouettes at every instant, the mean over its views."""
    views = capture.moving
    alpha = render_views(asset, views).alpha
    ious = metrics.alpha_iou(alpha, silhouettes(views.rgb, views.alpha, capture.background))
    _, instant = np.unique(np.asarray(views.timestamps), return_inverse=True)
    return np.bincount(instant, np.asarray(ious)) / np.bincount(instant)


def find_turn(
    overlap: Float[np.ndarray, "t"],
    capture: Capture,
    *,
    lost: float = 0.6,
    found: float = 0.75,
    min_agreement: float = 0.985,
    min_views: int = 4,
) -> Turn | None:
    """The run of instants around the worst one that one body can explain; None if none is lost.

    The run grows from the worst instant as long as its hull covers the silhouettes, so that it
    holds one pose. The turn goes half-way to the instants where tracking succeeded.

    Args:
        overlap: `coverage_of`.
        capture: whose moving frames give the silhouettes.
        lost: an IoU below this needs a body.
        found: an IoU of this or more needs none.
        min_agreement: fraction of the silhouettes that their hull must cover.
        min_views: the fewest frames that make a body.
    """
    worst = int(overlap.argmin())
    if overlap[worst] >= lost:
        return None
    first = last = worst
    while first > 0 and _agreement(capture, first - 1, last) >= min_agreement:
        first -= 1
    while last + 1 < len(overlap) and _agreement(capture, first, last + 1) >= min_agreement:
        last += 1
    instant_of = _instant_of(capture)
    if np.isin(instant_of, np.arange(first, last + 1)).sum() < min_views:
        return None
    before = [i for i in range(first) if overlap[i] >= found]
    after = [i for i in range(last + 1, len(overlap)) if overlap[i] >= found]
    times = capture.instants
    start = _between(times, before[-1], first) if before else 0.0
    stop = _between(times, last, after[0]) if after else 2.0
    return Turn(first, last, start, stop)


def _between(times: Float[np.ndarray, "t"], left: int, right: int) -> float:
    """A timestamp between two frames, half-way from instant `left` to instant `right`."""
    middle = (left + right + 1) // 2
    return float(times[middle - 1] + times[middle]) / 2


def _instant_of(capture: Capture) -> np.ndarray:
    return np.unique(np.asarray(capture.moving.timestamps), return_inverse=True)[1]


def _carve(
    capture: Capture,
    first: int,
    last: int,
    *,
    num_splats: int,
    tolerance: int,
    sh_degree: int,
    key: jax.Array,
) -> Splats | None:
    """Splats on the hull of a run of instants; None where their silhouettes have none."""
    views = _run(capture, first, last)
    try:
        return initialize.visual_hull(
            np.asarray(views.rgb),
            views.alpha,
            views.camera,
            num_splats=num_splats,
            tolerance=min(tolerance, len(views) - 1),
            sh_degree=sh_degree,
            opacity=0.6,
            key=key,
        )
    except initialize.EmptyHull:
        return None


def _run(capture: Capture, first: int, last: int) -> Views:
    """The moving views from instant `first` to `last`, with silhouettes."""
    instant = _instant_of(capture)
    views = jax.tree.map(np.asarray, capture.moving)[(first <= instant) & (instant <= last)]
    return dataclasses.replace(views, alpha=silhouettes(views.rgb, views.alpha, capture.background))


def _agreement(capture: Capture, first: int, last: int, cells: int = 16) -> float:
    """The fraction of the silhouettes of a run of instants that splats on their hull fall on.

    Judged on a grid of `cells` x `cells` over the image; mean over the views.
    """
    views = _run(capture, first, last)
    key = jax.random.key(0)
    hull = _carve(capture, first, last, num_splats=4000, tolerance=0, sh_degree=0, key=key)
    if hull is None:
        return 0.0
    points, size = np.asarray(hull.means), np.array([views.camera.width, views.camera.height])
    masks = np.asarray(views.alpha) > 0.5
    rows, columns = ((np.arange(cells) + 0.5) / cells * n for n in masks.shape[1:])
    covered = []
    for i, mask in enumerate(masks):
        pose, intrinsics = views.camera[i].world_to_camera, views.camera[i].intrinsics
        pixels = (points @ pose[:3, :3].T + pose[:3, 3]) @ np.asarray(intrinsics).T
        cell = np.clip(pixels[:, :2] / pixels[:, 2:] / size * cells, 0, cells - 1).astype(int)
        hit = np.zeros((cells, cells), bool)
        hit[cell[:, 1], cell[:, 0]] = True
        inside = mask[np.ix_(rows.astype(int), columns.astype(int))]
        covered.append((hit & inside).sum() / max(inside.sum(), 1))
    return float(np.mean(covered))


def _append(splats: Splats, born: Splats) -> tuple[Splats, Bool[jax.Array, "n"]]:
    """Puts `born` into free slots; returns the splats and which slots are new."""
    free = np.flatnonzero(~np.asarray(splats.active))[: len(born)]
    merged = jax.tree.map(
        lambda old, new: jnp.asarray(old).at[free].set(new[: len(free)]), splats, born
    )
    members = jnp.zeros(len(splats), bool).at[free].set(True)
    return merged, members
