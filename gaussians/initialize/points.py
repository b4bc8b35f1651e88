"""First splats at points: random ones, given ones, and those of a PLY file."""

import dataclasses
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray
from scipy.spatial import KDTree

from d4d_jax.registry import register
from d4d_jax.typing import AnyArray
from gaussians.captures import Capture
from gaussians.io.ply import points_of, read_ply, read_vertices
from gaussians.types import Splats


def random_cube(
    num_splats: int,
    *,
    key: PRNGKeyArray,
    capacity: int | None = None,
    sh_degree: int = 0,
    half_extent: float = 0.5,
    opacity: float = 0.1,
) -> Splats:
    """Grey splats, uniform in the cube [-half_extent, half_extent]^3.

    3DGS and 4DGaussians start synthetic scenes this way (2000 to 100 000 splats, half_extent 1.3).

    Raises:
        ValueError: fewer than 4 splats, or another number out of range.
    """
    if num_splats < 4:
        raise ValueError(f"The random cube needs at least 4 splats; got num_splats={num_splats}.")
    rng = numpy_generator(key)
    points = rng.uniform(-half_extent, half_extent, (num_splats, 3)).astype(np.float32)
    return point_cloud(points, capacity=capacity, sh_degree=sh_degree, opacity=opacity)


@register("initializer", "random_cube")
@dataclasses.dataclass(frozen=True)
class RandomCube:
    """Grey splats in a cube around the origin: an `Initializer` around `random_cube`.

    Attributes:
        half_extent: half the side of the cube, in units of the asset's world, which is about one
            unit wide.
        opacity: of every splat, in (0, 1).
    """

    half_extent: float = 0.5
    opacity: float = 0.1

    def __call__(
        self,
        capture: Capture,
        *,
        num_splats: int,
        capacity: int,
        sh_degree: int,
        key: PRNGKeyArray,
    ) -> Splats:
        """Looks at nothing of the capture.

        Raises:
            ValueError: a number is out of range.
        """
        return random_cube(
            num_splats,
            key=key,
            capacity=capacity,
            sh_degree=sh_degree,
            half_extent=self.half_extent,
            opacity=self.opacity,
        )


def point_cloud(
    points: Float[AnyArray, "n 3"],
    colours: Float[AnyArray, "n 3"] | None = None,
    *,
    capacity: int | None = None,
    sh_degree: int = 0,
    opacity: float = 0.1,
    scale: float = 1.0,
    scale_range: tuple[float, float] = (3e-4, math.inf),
) -> Splats:
    """Round splats at the given points, as wide as their neighbourhood is sparse.

    Args:
        points: at least 4, in world units.
        colours: in [0, 1]; grey by default.
        capacity: rows of the result; the rows beyond the points are inactive.
        sh_degree: 0 to 3.
        opacity: of every splat, in (0, 1).
        scale: standard deviation over the mean distance to the 3 nearest neighbours.
        scale_range: smallest and largest standard deviation, in world units.

    Raises:
        ValueError: too few points, or a number out of range.
    """
    points = np.asarray(points, np.float32)
    if colours is None:
        colours = np.full_like(points, 0.5)
    spread = scale * nearest_distances(points, 3).mean(axis=1)
    return Splats.from_points(
        points,
        colours,
        scale=np.clip(spread, *scale_range),
        opacity=opacity,
        capacity=capacity,
        sh_degree=sh_degree,
    )


@register("initializer", "ply")
@dataclasses.dataclass(frozen=True)
class PlyFile:
    """The splats or the points of a PLY file: an `Initializer`.

    A file of Gaussians (3DGS) is taken as it is, all splats of it; harmonics above the degree of
    the reconstruction are dropped, missing ones are 0. Of a plain point cloud (x y z, perhaps red
    green blue) at most `num_splats` points, drawn at random, become round splats (`point_cloud`).

    Attributes:
        path: of the file.
        normalised: the file is in the world of the asset, as `point_cloud.ply` of an earlier run
            is. Otherwise it is in the world of the capture's own files, as the points of
            structure from motion are, and is moved and scaled like the cameras. For clips, whose
            world stays as it is, both are the same.
        opacity: of splats made from points, in (0, 1).
        scale: of splats made from points: standard deviation over the mean distance to the 3
            nearest neighbours.
    """

    path: str | os.PathLike
    normalised: bool = False
    opacity: float = 0.1
    scale: float = 1.0

    def __call__(
        self,
        capture: Capture,
        *,
        num_splats: int,
        capacity: int,
        sh_degree: int,
        key: PRNGKeyArray,
    ) -> Splats:
        """Reads the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it cannot be read, holds more splats than the capacity or fewer than 4
                points, or a number is not finite or out of range.
        """
        centre, unit = np.zeros(3, np.float32), 1.0
        if not self.normalised:
            centre, unit = np.asarray(capture.centre, np.float32), float(capture.scale)
        vertices = read_vertices(self.path)
        if "f_dc_0" in (vertices.dtype.names or ()):
            splats = read_ply(self.path, capacity=capacity)
            if not all(np.isfinite(values).all() for values in splats.parameters.values()):
                raise ValueError(f"{os.fspath(self.path)} holds numbers that are not finite.")
            return dataclasses.replace(
                splats,
                means=(splats.means - centre) * unit,
                log_scales=splats.log_scales + math.log(unit),
                sh=_of_degree(splats.sh, sh_degree),
            )
        points, colours = points_of(vertices, self.path)
        chosen = numpy_generator(key).permutation(len(points))[:num_splats]
        return point_cloud(
            (points[chosen] - centre) * unit,
            None if colours is None else colours[chosen],
            capacity=capacity,
            sh_degree=sh_degree,
            opacity=self.opacity,
            scale=self.scale,
        )


def _of_degree(sh: Float[AnyArray, "n k 3"], degree: int) -> Float[jax.Array, "n c 3"]:
    """The coefficients up to a degree, zeros where there are none."""
    count = (degree + 1) ** 2
    return jnp.pad(sh[:, :count], [(0, 0), (0, max(0, count - sh.shape[1])), (0, 0)])


def nearest_distances(points: Float[AnyArray, "n d"], k: int) -> Float[np.ndarray, "n k"]:
    """Euclidean distances to the `k` nearest other points, nearest first, float32.

    A second point at the same place counts as a neighbour at distance 0.

    Raises:
        ValueError: there are not more than `k` points, or a coordinate is not finite.
    """
    points = np.asarray(points)
    if len(points) <= k:
        raise ValueError(f"{len(points)} points do not have {k} neighbours each.")
    if not np.isfinite(points).all():
        raise ValueError("The points to measure have coordinates that are not finite.")
    distances, _ = KDTree(points).query(points, k + 1)
    return distances[:, 1:].astype(np.float32)


def numpy_generator(key: PRNGKeyArray) -> np.random.Generator:
    """The host's generator of random numbers for a key."""
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
