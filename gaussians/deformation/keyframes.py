"""Keyframes: several bodies take turns, each with splats and a motion of its own.

A pose that is too far away to be found by following gradients gets a body of its own, carved from
the silhouettes that show it. At every instant exactly one body is visible and the change is sudden,
between two frames, so two poses are never seen at once; around its keyframe each body moves by its
own copy of the field `base`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from d4d_jax.registry import register
from d4d_jax.typing import PyTree
from gaussians.deformation import Deformation, Timestamp, build
from gaussians.types import Splats

_INVISIBLE = -30.0  # opacity logit of the bodies whose turn it is not


@register("deformation", "keyframes")
@dataclasses.dataclass(frozen=True)
class Keyframes:
    """Turns of bodies around the field `base`.

    Attributes:
        base: the field that moves a body, or its spec (`{"name": "control_points", ...}`).
        bodies: how many there can be, at least 1.

    The parameters are `{"base", "body", "starts", "turns"}`: the fields of all bodies (leading axis
    `bodies`), the body that each splat belongs to (n,), and, per turn (2 bodies - 1 of them), when
    it begins and whose it is. Turns that begin after 1 are not taken. The last three are whole
    numbers and timestamps in float arrays, which no gradient reaches.
    """

    base: Any = dataclasses.field(default_factory=lambda: {"name": "control_points"})
    bodies: int = 2

    def __post_init__(self):
        if self.bodies < 1:
            raise ValueError(f"Keyframes need at least 1 body; got {self.bodies}.")
        if isinstance(self.base, Mapping):
            object.__setattr__(self, "base", build(self.base))

    @property
    def field(self) -> Deformation:
        """The field that moves a body."""
        return self.base

    def init(self, key: jax.Array, splats: Splats) -> PyTree:
        """All splats belong to body 0, whose turn lasts from t = 0 to t = 1."""
        base = self.field.init(key, splats)
        turns = 2 * self.bodies - 1
        return {
            "base": jax.tree.map(lambda leaf: jnp.stack([leaf] * self.bodies), base),
            "body": jnp.zeros(splats.means.shape[0]),
            "starts": jnp.full(turns, 2.0).at[0].set(0.0),
            "turns": jnp.zeros(turns),
        }

    def apply(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """The body whose turn it is, moved by its field; all other splats are invisible."""
        base, on_stage = self._on_stage(params, t)
        moved = self.field.apply(base, splats, t)
        body = jax.lax.stop_gradient(params["body"])
        logits = jnp.where(body == on_stage, moved.opacity_logits, _INVISIBLE)
        return dataclasses.replace(moved, opacity_logits=logits)

    def skeleton(self, params: PyTree, splats: Splats, t: Timestamp) -> Splats:
        """Of the body whose turn it is, such as `ControlPoints.skeleton`."""
        base, on_stage = self._on_stage(params, t)
        own = jnp.asarray(splats.active) & (params["body"] == on_stage)
        return self.base.skeleton(base, dataclasses.replace(splats, active=own), t)

    def _on_stage(self, params: PyTree, t: Timestamp) -> tuple[PyTree, Float[Array, ""]]:
        """The field and the number of the body whose turn it is."""
        starts, turns = jax.lax.stop_gradient((params["starts"], params["turns"]))
        body = turns[jnp.maximum(jnp.sum(jnp.asarray(t) >= starts) - 1, 0)]
        return jax.tree.map(lambda leaf: leaf[body.astype(int)], params["base"]), body

    def regularization(self, params: PyTree) -> dict[str, Float[Array, ""]]:
        """The terms of the base field, summed over the bodies; an unused body is at rest."""
        terms = jax.vmap(self.field.regularization)(params["base"])
        return {name: jnp.sum(values) for name, values in terms.items()}

    def hold(self, params: PyTree, t: Timestamp) -> PyTree:
        """Holds the fields of all bodies; the turns stay as they are."""
        held = jax.vmap(self.field.hold, in_axes=(0, None))(params["base"], t)
        return params | {"base": held}

    def peak_opacities(self, params: PyTree, splats: Splats) -> Float[Array, "n"] | None:
        """The largest opacity of each splat while it is the turn of its body, by the base field."""
        peaks = jax.vmap(self.field.peak_opacities, in_axes=(0, None))(params["base"], splats)
        if peaks is None:
            return None
        body = params["body"].astype(int)
        return jnp.take_along_axis(peaks, body[None], axis=0)[0]

    def gather(self, params: PyTree, source: Int[Array, "n"]) -> PyTree:
        """A split or cloned splat belongs to the body of its parent."""
        base = jax.vmap(self.field.gather, in_axes=(0, None))(params["base"], source)
        return params | {"base": base, "body": params["body"][source]}

    def turns_of(self, params: PyTree) -> list[tuple[float, int]]:
        """When each turn begins, and the number of the body, in the order of time."""
        starts, turns = np.asarray(params["starts"]), np.asarray(params["turns"])
        pairs = zip(starts.tolist(), turns.astype(int).tolist(), strict=True)
        return sorted((start, body) for start, body in pairs if start <= 1)

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
        """Gives a new body the turn between two timestamps; before and after nothing changes.

        Args:
            params: of this field.
            splats: with those of the new body among them.
            members: the splats that are the new body.
            start: of its turn, in [0, 1].
            stop: end of its turn, above `start`; the body that is on at `stop` goes on then.
            key: of the new body's field.

        Raises:
            ValueError: all bodies are taken, or the turn is empty.
        """
        turns = self.turns_of(params)
        number = 1 + max(body for _, body in turns)
        if number >= self.bodies:
            raise ValueError(f"All {self.bodies} bodies are taken; raise `bodies`.")
        if not start < stop:
            raise ValueError(f"The turn of a body must end after it begins: {start} to {stop}.")
        after = [body for begin, body in turns if begin <= stop][-1]
        kept = [(begin, body) for begin, body in turns if not start <= begin <= stop]
        turns = sorted([*kept, (start, number), *([(stop, after)] if stop <= 1 else [])])
        free = 2 * self.bodies - 1 - len(turns)
        starts, whose = zip(*turns, *[(2.0, 0)] * free, strict=True)
        own = dataclasses.replace(splats, active=jnp.asarray(splats.active) & members)
        fresh = self.field.init(key, own)
        return {
            "base": jax.tree.map(
                lambda every, one: jnp.asarray(every).at[number].set(one), params["base"], fresh
            ),
            "body": jnp.where(members, float(number), params["body"]),
            "starts": jnp.array(starts, jnp.float32),
            "turns": jnp.array(whose, jnp.float32),
        }
