"""First splats: from the silhouettes of an orbit, from a point cloud, or at random in a cube.

All of this runs once, on the host, in NumPy; the result is a `Splats` of fixed capacity whose rows
beyond the created splats are inactive. The functions take arrays; an `Initializer` makes the first
splats of a reconstruction and is chosen by name:

    initializer = build({"name": "ply", "path": "cloud.ply"})
    splats = initializer(capture, num_splats=8000, capacity=12000, sh_degree=0, key=key)

An initialiser of your own needs the method of `Initializer` and either
`@register("initializer", "my_start")` or the name `"my.module:MyStart"`.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from jaxtyping import PRNGKeyArray

from d4d_jax import registry
from gaussians.captures import Capture
from gaussians.initialize.hull import EmptyHull, VisualHull, carve, visual_hull
from gaussians.initialize.points import (
    PlyFile,
    RandomCube,
    nearest_distances,
    point_cloud,
    random_cube,
)
from gaussians.types import Splats

__all__ = [
    "EmptyHull",
    "Initializer",
    "PlyFile",
    "RandomCube",
    "VisualHull",
    "build",
    "carve",
    "nearest_distances",
    "point_cloud",
    "random_cube",
    "visual_hull",
]


@runtime_checkable
class Initializer(Protocol):
    """Makes the first splats of a reconstruction; a frozen dataclass of choices."""

    def __call__(
        self,
        capture: Capture,
        *,
        num_splats: int,
        capacity: int,
        sh_degree: int,
        key: PRNGKeyArray,
    ) -> Splats:
        """The splats of the object at rest.

        Args:
            capture: its `still` frames are those that show the object at rest best, with alpha.
            num_splats: to create, where the initialiser is free to choose.
            capacity: rows of the result.
            sh_degree: of the result's coefficients, 0 to 3.
            key: of all that is random.
        """
        ...


def build(spec: Mapping[str, Any]) -> Initializer:
    """Builds an initialiser from `{"name": "visual_hull" | "random_cube" | "ply", **choices}`.

    Raises:
        ValueError: unknown name, or an argument that the initialiser does not take.
    """
    return registry.build("initializer", spec)
