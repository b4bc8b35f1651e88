"""Shows what carries the splats instead of the splats."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from d4d_jax.typing import PyTree
from gaussians.deformation import Deformation, Timestamp
from gaussians.types import Splats


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """`field`, with its parameters, but `apply` gives the field's `skeleton`.

    For SC-GS's first stage (Huang et al. 2024), in which the control points are fitted to the
    images as if they were the splats.

    Attributes:
        field: a Deformation; `carries` tells whether it has a skeleton.
    """

    field: Any

    @staticmethod
    def carries(field: Deformation) -> bool:
        """Whether the field, or the one at the bottom of a stack of fields, has a skeleton."""
        base = getattr(field, "base", None)
        return hasattr(field, "skeleton") if base is None else Skeleton.carries(base)

    def init(self, key: jax.Array, splats: Splats) -> PyTree:
        return self.field.init(key, splats)

    def apply(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """The moved control points as splats, in as many slots as `splats` has."""
        return self.field.skeleton(params, splats, t)

    def regularization(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        return self.field.regularization(params)

    def hold(self, params: PyTree, t: Timestamp) -> PyTree:
        return self.field.hold(params, t)

    def peak_opacities(self, params: PyTree, splats: Splats) -> Float[Array, "n"] | None:
        return self.field.peak_opacities(params, splats)

    def gather(self, params: PyTree, source: Int[Array, "n"]) -> PyTree:
        return self.field.gather(params, source)
