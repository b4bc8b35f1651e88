"""Splats that come and go: an opacity of its own per splat and instant, around another field.

What the motion uncovers, or shades, has no place in the static pose. Each splat has a curve of
changes of its opacity logit, piecewise linear over `knots` instants. The price: where the motion is
wrong, splats of one pose can fade into those of another, and both be half visible.
`regularization` keeps the curves small and smooth.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from d4d_jax.registry import register
from d4d_jax.typing import PyTree
from gaussians.deformation import Deformation, Timestamp, build
from gaussians.deformation.hexplane import slice_at
from gaussians.types import Splats


@register("deformation", "lifespan")
@dataclasses.dataclass(frozen=True)
class Lifespan:
    """Adds an opacity curve per splat to the field `base`.

    Attributes:
        base: the field that moves the splats, or its spec (`{"name": "hexplane", ...}`).
        knots: instants at which a curve is stored, equally spaced over [0, 1]; at least 2.

    The parameters are `{"base": ..., "curves": (knots, n)}`.
    """

    base: Any = dataclasses.field(default_factory=lambda: {"name": "hexplane"})
    knots: int = 9

    def __post_init__(self):
        if self.knots < 2:
            raise ValueError(f"A lifespan needs at least 2 knots; got {self.knots}.")
        if isinstance(self.base, Mapping):
            object.__setattr__(self, "base", build(self.base))

    @property
    def field(self) -> Deformation:
        """The field that moves the splats."""
        return self.base

    def init(self, key: jax.Array, splats: Splats) -> PyTree:
        """Curves that are 0 everywhere: every splat lives from t = 0 to t = 1."""
        curves = jnp.zeros((self.knots, splats.means.shape[0]))
        return {"base": self.field.init(key, splats), "curves": curves}

    def apply(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """The splats moved by the base field, with the opacity logits of this instant."""
        moved = self.field.apply(params["base"], splats, t)
        change = slice_at(params["curves"], t)
        return dataclasses.replace(moved, opacity_logits=moved.opacity_logits + change)

    def skeleton(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """Of the base field, such as `ControlPoints.skeleton`; it lives from t = 0 to t = 1."""
        return self.base.skeleton(params["base"], splats, t)

    def regularization(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        """The base field's terms, and `lifespan`: mean square of the curves and of their slopes."""
        curves = params["curves"]
        lifespan = jnp.mean(curves**2) + jnp.mean(jnp.diff(curves, axis=0) ** 2)
        return self.field.regularization(params["base"]) | {"lifespan": lifespan}

    def hold(self, params: PyTree, t: Timestamp) -> PyTree:
        """Holds the base field; the curves stay as they are."""
        return params | {"base": self.field.hold(params["base"], t)}

    def peak_opacities(self, params: PyTree, splats: Splats) -> Float[Array, "n"]:
        """The largest opacity at a knot of the curve, on top of the base field's largest."""
        base = self.field.peak_opacities(params["base"], splats)
        logits = splats.opacity_logits if base is None else jax.scipy.special.logit(base)
        return jax.nn.sigmoid(logits + params["curves"].max(axis=0))

    def gather(self, params: PyTree, source: Int[Array, "n"]) -> PyTree:
        """A split or cloned splat inherits the curve of its parent."""
        return {
            "base": self.field.gather(params["base"], source),
            "curves": params["curves"][:, source],
        }

    @property
    def bodies(self) -> int:
        """How many bodies the base field can hold; see `keyframes`."""
        return getattr(self.base, "bodies", 1)

    def with_body(
        self,
        params: PyTree,
        splats: Splats,
        members: Bool[Array, "n"],
        start: float,
        stop: float,
        *,
        key: jax.Array,
    ) -> PyTree:
        """`Keyframes.with_body` of the base field; the members start with curves of 0."""
        base = self.base.with_body(params["base"], splats, members, start, stop, key=key)
        return {"base": base, "curves": jnp.where(members, 0.0, params["curves"])}
