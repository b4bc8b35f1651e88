"""Splats that come and go: an opacity of its own per splat and instant, around another field.

Where a motion is too large or too fast to be found by following gradients, the object of one pose
can fade out while splats fitted to the next pose fade in. Each splat has a curve of changes of its
opacity logit, piecewise linear over `knots` instants. The price is cross-fading: between the two
poses both can be half visible. `regularization` keeps the curves near their priors and smooth.
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

    The parameters are `{"base": ..., "curves": (knots, n), "priors": (knots, n)}`. `curves` are
    trained; `priors` are the curves the splats were born with, which no gradient reaches.
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
        return {"base": self.field.init(key, splats), "curves": curves, "priors": curves}

    def apply(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """The splats moved by the base field, with the opacity logits of this instant."""
        moved = self.field.apply(params["base"], splats, t)
        change = slice_at(params["curves"], t)
        return dataclasses.replace(moved, opacity_logits=moved.opacity_logits + change)

    def regularization(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        """The base field's terms, and `lifespan`: distance of the curves from their priors.

        The squared distance, plus the squared slope of the distance, both as means.
        """
        distance = params["curves"] - jax.lax.stop_gradient(params["priors"])
        lifespan = jnp.mean(distance**2) + jnp.mean(jnp.diff(distance, axis=0) ** 2)
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
            "priors": params["priors"][:, source],
        }

    def with_window(
        self,
        params: PyTree,
        members: Bool[Array, "n"],
        start: float,
        stop: float,
        *,
        fade_time: float = 0.13,
        depth: float = 6.0,
    ) -> PyTree:
        """Gives some splats a life between two timestamps.

        Inside [start, stop] their opacity logit is unchanged; outside it falls linearly, by `depth`
        within `fade_time`, and stays there.

        Args:
            params: of this field.
            members: the splats concerned.
            start: timestamp in [0, 1].
            stop: timestamp in [0, 1].
            fade_time: fraction of the clip.
            depth: logits.
        """
        curve = -depth * (1 - self._presence(start, stop, fade_time))
        curves = jnp.where(members, curve[:, None], params["curves"])
        return params | {"curves": curves, "priors": curves}

    def without_window(
        self,
        params: PyTree,
        members: Bool[Array, "n"],
        start: float,
        stop: float,
        *,
        fade_time: float = 0.13,
        depth: float = 6.0,
    ) -> PyTree:
        """The opposite of `with_window`: the splats are gone between two timestamps."""
        curve = -depth * self._presence(start, stop, fade_time)[:, None]
        curves = jnp.where(members, jnp.minimum(params["curves"], curve), params["curves"])
        return params | {"curves": curves, "priors": curves}

    def _presence(self, start: float, stop: float, fade_time: float) -> Float[Array, "knots"]:
        """1 within [start, stop], falling to 0 within `fade_time` on both sides."""
        instants = jnp.linspace(0, 1, self.knots)
        outside = jnp.maximum(jnp.maximum(start - instants, instants - stop), 0)
        return 1 - jnp.minimum(outside / fade_time, 1)
