"""Deformation fields: how the canonical splats move, stretch and fade over time.

`build(spec)` makes one by name; every member of the family is a frozen dataclass (static: sizes)
whose parameters are a plain pytree of arrays (traced), so that one optimizer, one checkpoint and
one `jax.jit` serve them all. A field of your own needs the methods below and either
`@register("deformation", "my_field")` or the name `"my.module:MyField"`.
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from d4d_jax import registry
from d4d_jax.typing import AnyArray, PyTree
from gaussians.types import Splats

#: A timestamp in [0, 1]: a Python number or a scalar array.
Timestamp: TypeAlias = float | int | Float[AnyArray, ""]


@runtime_checkable
class Deformation(Protocol):
    """A field that carries canonical splats to a timestamp."""

    def init(self, key: jax.Array, splats: Splats) -> PyTree:
        """Parameters under which the field is the identity at every timestamp.

        `HexPlane(compat="4dgs")` is the exception.
        """
        ...

    def apply(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """The splats at timestamp `t` in [0, 1]; differentiable in `params` and `splats`."""
        ...

    def regularization(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        """Named penalties, unweighted, each a non-negative scalar that is 0 at rest."""
        ...

    def hold(self, params: PyTree, t: Timestamp) -> PyTree:
        """Parameters whose field stays, after `t`, as it is at `t`; before `t` nothing changes.

        A reconstruction that opens a clip frame by frame starts every new frame from here. Fields
        that cannot do it return `params` unchanged.
        """
        ...

    def peak_opacities(self, params: PyTree, splats: Splats) -> Float[Array, "n"] | None:
        """The largest opacity that each splat reaches over time, in [0, 1].

        None where opacity does not change over time. Density control judges splats by it.
        """
        ...

    def gather(self, params: PyTree, source: Int[Array, "n"]) -> PyTree:
        """Parameters after densification: slot i of the splats now descends from `source[i]`.

        Fields without parameters per splat return `params` unchanged.
        """
        ...


def build(spec: Mapping[str, Any]) -> Deformation:
    """Builds a deformation field from `{"name": "hexplane" | "identity" | ..., **sizes}`.

    Raises:
        ValueError: unknown name, or an argument that the field does not take.
    """
    from gaussians.deformation import (  # noqa: F401
        control_points,
        hexplane,
        identity,
        keyframes,
        lifespan,
    )

    return registry.build("deformation", spec)
