"""The field that moves nothing: static reconstructions, and a baseline for ablations."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from d4d_jax.registry import register
from d4d_jax.typing import PyTree
from gaussians.deformation import Timestamp
from gaussians.types import Splats


@register("deformation", "identity")
@dataclasses.dataclass(frozen=True)
class Identity:
    """No parameters; `apply` returns the canonical splats for every timestamp."""

    def init(self, key: jax.Array, splats: Splats) -> PyTree:
        """An empty parameter tree."""
        del key, splats
        return {}

    def apply(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """The splats themselves."""
        del params, t
        return splats

    def regularization(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        """Nothing to penalise."""
        del params
        return {}

    def hold(self, params: PyTree, t: Timestamp) -> PyTree:
        """The field is at rest at all times."""
        del t
        return params

    def peak_opacities(self, params: PyTree, splats: Splats) -> None:
        """Opacity does not change over time."""
        del params, splats

    def gather(self, params: PyTree, source: Int[Array, "n"]) -> PyTree:
        """No parameters per splat."""
        del source
        return params
