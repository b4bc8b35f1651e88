"""The largest body that has the silhouettes of an orbit, covered with splats."""

import dataclasses
import math

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray
from scipy import ndimage

from d4d_jax.cameras import Camera
from d4d_jax.registry import register
from d4d_jax.typing import AnyArray
from gaussians.captures import Capture
from gaussians.initialize.points import nearest_distances, numpy_generator
from gaussians.types import Splats

_COARSE_RESOLUTION = 48
_RESOLUTIONS = (24, 144)  # fewest and most voxels by default
_MARGIN = 2  # voxels of empty space around the carved box
_DEPTH = 1.5  # standard deviations of a splat below the surface


class EmptyHull(ValueError):
    """The silhouettes have no point in common."""


def visual_hull(
    images: Float[AnyArray, "v h w 3"],
    alphas: Float[AnyArray, "v h w"] | None,
    camera: Camera,
    *,
    num_splats: int,
    key: PRNGKeyArray,
    capacity: int | None = None,
    sh_degree: int = 0,
    resolution: int | None = None,
    tolerance: int = 0,
    half_extent: float | None = None,
    opacity: float = 0.8,
    scale: float = 0.6,
) -> Splats:
    """Splats on the surface of the largest body that has the given silhouettes.

    A cube around the origin is carved twice: coarsely, to find the box of the object, then with
    `resolution` voxels along the longest side of that box. Splats are spread evenly over the
    surface voxels, so deep below the surface that their visible parts end at it. The colour of each
    is the mean over the views that see it, weighted by how much it faces them. The body is the
    visual hull of Laurentini (1994): what no silhouette shows, such as the inside of a bowl, is
    filled.

    Args:
        images: in [0, 1], views of an object that does not move.
        alphas: in [0, 1]; a pixel belongs to the silhouette above 0.5. A silhouette that touches
            the image border is taken to go on beyond it.
        camera: one camera per view, of the images' size.
        num_splats: splats to create, at least 4.
        key: places the splats inside their voxels.
        capacity: rows of the result, at least `num_splats` (the default).
        sh_degree: 0 to 3; coefficients above the constant one start at zero.
        resolution: voxels along the longest side of the object; by default one for each pixel of an
            image's width, from 24 to 144.
        tolerance: how many silhouettes may miss a point of the body; above 0 for noisy masks.
        half_extent: half the side of the cube that is carved, in world units; by default the
            distance from the origin to the nearest border of what the cameras see around it.
        opacity: of every splat, in (0, 1).
        scale: standard deviation of a splat over the mean distance to its 3 nearest neighbours.

    Raises:
        ValueError: there are no masks, the sizes do not agree, a number is out of range, or
            nothing survives the carving.
    """
    images, alphas, camera = _checked_views(images, alphas, camera)
    if num_splats < 4:
        raise ValueError(f"The visual hull needs at least 4 splats; got num_splats={num_splats}.")
    if not 0 <= tolerance < len(camera):
        raise ValueError(
            f"The tolerance must be at least 0 and below the {len(camera)} views; got {tolerance}."
        )
    if resolution is None:
        least, most = _RESOLUTIONS
        resolution = min(most, max(least, camera.width))
    rng = numpy_generator(key)
    masks = alphas > 0.5
    if half_extent is None:
        half_extent = _visible_half_extent(camera)
    lower, upper = _bounding_box(masks, camera, half_extent, tolerance)
    voxel = float((upper - lower).max()) / resolution
    lower, shape = lower - _MARGIN * voxel, np.ceil((upper - lower) / voxel) + 2 * _MARGIN
    centers = _grid(lower, voxel, tuple(int(side) for side in shape))
    inside = carve(centers.reshape(-1, 3), masks, camera, tolerance).reshape(centers.shape[:3])
    if not inside.any():
        raise EmptyHull(_nothing_left(masks, tolerance))

    surface = inside & np.logical_not(ndimage.binary_erosion(inside))
    points, normals = centers[surface], _outward_normals(inside)[surface]
    colours = _paint(points, normals, images, alphas, camera, voxel)
    chosen = _even_choice(rng, len(points), num_splats)
    points = points[chosen] + rng.uniform(-voxel / 2, voxel / 2, (num_splats, 3))
    spread = np.clip(scale * nearest_distances(points, 3).mean(axis=1), voxel / 4, voxel * 4)
    return Splats.from_points(
        points - _DEPTH * spread[:, None] * normals[chosen],
        colours[chosen],
        scale=spread,
        opacity=opacity,
        capacity=capacity,
        sh_degree=sh_degree,
    )


@register("initializer", "visual_hull")
@dataclasses.dataclass(frozen=True)
class VisualHull:
    """Splats on the hull of the frames at rest: an `Initializer` around `visual_hull`.

    Attributes:
        tolerance: as in `visual_hull`. None is 0 for frames of one instant; otherwise it is a
            quarter of the frames, since an object that moves leaves its silhouettes.
        resolution: as in `visual_hull`, like the rest.
        half_extent: None takes what the cameras see.
        opacity: of every splat.
        scale: of every splat.
    """

    tolerance: int | None = None
    resolution: int | None = None
    half_extent: float | None = None
    opacity: float = 0.8
    scale: float = 0.6

    def __call__(
        self,
        capture: Capture,
        *,
        num_splats: int,
        capacity: int,
        sh_degree: int,
        key: PRNGKeyArray,
    ) -> Splats:
        """Carves the `still` frames of the capture.

        Raises:
            EmptyHull: nothing survives the carving.
            ValueError: there are no such frames, they have no alpha, or a number is out of range.
        """
        rest = capture.still
        if rest is None:
            raise ValueError("The visual hull needs frames of the object at rest.")
        tolerance = self.tolerance
        if tolerance is None:
            instants = np.unique(np.asarray(rest.timestamps))
            tolerance = 0 if len(instants) == 1 else len(rest) // 4
        return visual_hull(
            np.asarray(rest.rgb),
            rest.alpha,
            rest.camera,
            num_splats=num_splats,
            key=key,
            capacity=capacity,
            sh_degree=sh_degree,
            resolution=self.resolution,
            tolerance=tolerance,
            half_extent=self.half_extent,
            opacity=self.opacity,
            scale=self.scale,
        )


def carve(
    points: Float[np.ndarray, "n 3"],
    masks: Bool[np.ndarray, "v h w"],
    camera: Camera,
    tolerance: int = 0,
) -> Bool[np.ndarray, "n"]:
    """Whether each point lies in front of every camera and inside all but `tolerance` masks.

    Points that project beyond the image border are judged by the nearest border pixel.
    """
    misses = np.zeros(len(points), np.int32)
    for view in _spread_order(len(masks)):
        alive = np.flatnonzero(misses <= tolerance)
        row, column, depth = _project(points[alive], camera, view)
        misses[alive] += ~(masks[view, row, column] & (depth > 0))
    return misses <= tolerance


def _checked_views(images, alphas, camera: Camera) -> tuple[np.ndarray, np.ndarray, Camera]:
    if alphas is None:
        raise ValueError(
            "The visual hull needs the alpha masks of the views and got none; read frames that"
            " have an alpha channel, or start from the 'random_cube'."
        )
    images, alphas = np.asarray(images, np.float32), np.asarray(alphas, np.float32)
    expected = (camera.world_to_camera.shape[0], camera.height, camera.width)
    if images.shape != (*expected, 3) or alphas.shape != expected:
        raise ValueError(
            f"The cameras describe (views, height, width) = {expected}, but the images are"
            f" {images.shape} and the masks {alphas.shape}."
        )
    return images, alphas, jax.tree.map(np.asarray, camera)


def _nothing_left(masks: np.ndarray, tolerance: int) -> str:
    empty = np.flatnonzero(~masks.any(axis=(1, 2))).tolist()
    blame = f" (the masks of views {empty} are empty)" if empty else ""
    return (
        f"No point lies inside all {len(masks)} silhouettes but {tolerance}{blame}: check the"
        " cameras and masks, or raise the tolerance."
    )


def _visible_half_extent(camera: Camera) -> float:
    distance = np.linalg.norm(camera.position, axis=-1)
    half_size = np.array([camera.width, camera.height]) / 2
    focal = camera.intrinsics[:, [0, 1], [0, 1]]
    return float((distance[:, None] * half_size / focal).min())


def _bounding_box(
    masks: Bool[np.ndarray, "v h w"], camera: Camera, half_extent: float, tolerance: int
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """A box that holds the body: coarse voxels that might touch it, by widened silhouettes."""
    voxel = 2 * half_extent / _COARSE_RESOLUTION
    nearest = np.linalg.norm(camera.position, axis=-1).min() - math.sqrt(3) * half_extent
    reach = math.sqrt(3) / 2 * voxel / max(nearest, voxel) * camera.intrinsics[:, 0, 0].max()
    width = min(2 * math.ceil(reach) + 1, 2 * max(camera.width, camera.height) - 1)
    widened = ndimage.maximum_filter(masks, size=(1, width, width), mode="nearest")
    lower = np.full(3, -half_extent, np.float32)
    centers = _grid(lower, voxel, (_COARSE_RESOLUTION,) * 3).reshape(-1, 3)
    kept = centers[carve(centers, widened, camera, tolerance)]
    if not len(kept):
        raise EmptyHull(_nothing_left(masks, tolerance))
    return kept.min(axis=0) - voxel / 2, kept.max(axis=0) + voxel / 2


def _grid(
    lower: Float[np.ndarray, "3"], voxel: float, shape: tuple[int, ...]
) -> Float[np.ndarray, "x y z 3"]:
    axes = [
        start + voxel * (np.arange(size, dtype=np.float32) + 0.5)
        for start, size in zip(lower, shape, strict=True)
    ]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).astype(np.float32)


def _outward_normals(inside: Bool[np.ndarray, "x y z"]) -> Float[np.ndarray, "x y z 3"]:
    smooth = ndimage.uniform_filter(inside.astype(np.float32), 5)
    outward = np.stack([-np.gradient(smooth, axis=axis) for axis in range(3)], -1)
    return outward / (np.linalg.norm(outward, axis=-1, keepdims=True) + 1e-6)


def _spread_order(count: int) -> list[int]:
    """The views in an order whose first ones look from different sides: they carve the most."""
    golden = (math.sqrt(5) - 1) / 2
    return np.argsort(np.arange(count) * golden % 1).tolist()


def _project(
    points: Float[np.ndarray, "n 3"], camera: Camera, view: int
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    """The row and column of the pixel nearest to each point's projection, and its depth."""
    pose = camera.world_to_camera[view].astype(np.float32)
    x, y, depth = (points @ pose[:3, :3].T + pose[:3, 3]).T
    ahead = np.where(depth > 1e-6, depth, np.inf)
    (fx, _, cx), (_, fy, cy), _ = camera.intrinsics[view].astype(np.float32)
    column = np.clip(fx * x / ahead + cx, 0, camera.width - 1).astype(np.int32)
    row = np.clip(fy * y / ahead + cy, 0, camera.height - 1).astype(np.int32)
    return row, column, depth


def _paint(
    points: Float[np.ndarray, "n 3"],
    normals: Float[np.ndarray, "n 3"],
    images: Float[np.ndarray, "v h w 3"],
    alphas: Float[np.ndarray, "v h w"],
    camera: Camera,
    voxel: float,
) -> Float[np.ndarray, "n 3"]:
    """The mean colour of each surface point over the views that see it, weighted by facing.

    A point is seen where nothing lies clearly in front of it in a depth buffer with cells as wide
    as about two voxels. Points that no view sees take the mean colour of all others.
    """
    total = np.zeros((len(points), 3), np.float32)
    weights = np.zeros((len(points), 1), np.float32)
    for view in range(len(images)):
        row, column, depth = _project(points, camera, view)
        cell = max(1, math.ceil(2 * voxel * camera.intrinsics[view, 0, 0] / depth.min()))
        buffer = np.full((camera.height // cell + 1, camera.width // cell + 1), np.inf, np.float32)
        np.minimum.at(buffer, (row // cell, column // cell), depth)
        visible = depth < buffer[row // cell, column // cell] + 5 * voxel
        towards = camera.position[view] - points
        towards /= np.linalg.norm(towards, axis=-1, keepdims=True)
        facing = np.maximum((normals * towards).sum(-1), 0)
        weight = ((facing**2 + 1e-3) * visible * alphas[view, row, column] ** 2)[:, None]
        total += weight * images[view, row, column]
        weights += weight
    mean = total.sum(axis=0) / max(float(weights.sum()), 1e-6)
    return np.where(weights > 1e-6, total / np.maximum(weights, 1e-6), mean).astype(np.float32)


def _even_choice(rng: np.random.Generator, population: int, count: int) -> Int[np.ndarray, "count"]:
    """`count` indices below `population`, each drawn floor or ceil of count / population times."""
    rounds = -(-count // population)
    return np.concatenate([rng.permutation(population) for _ in range(rounds)])[:count]
