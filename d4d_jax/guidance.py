"""Guidance: transforms of a DenoiseFn into another DenoiseFn, as `ThreeDAware(w1=7.0)(denoise)`.

The weights of every rule here sum to one, and eps, v and x0 are affine in each other at fixed x_t,
so the rules hold for whatever the network predicts.

A conditioning may be any object. Ours (`d4d_jax.models.conditioning.Conditioning`) brings the
methods `without_prompt`, `with_motion` and `concatenate`; for others pass functions instead.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from d4d_jax.registry import register
from d4d_jax.typing import DenoiseFn

Condition = Any
ConditionFn = Callable[[Condition], Condition]
JoinFn = Callable[[Sequence[Condition]], Condition]


def without_prompt(conditioning: Condition) -> Condition:
    """The conditioning of eps(z_t, t): prompt and motion dropped."""
    return conditioning.without_prompt()


def without_motion(conditioning: Condition) -> Condition:
    """The conditioning of an object that stands still: motion magnitude 0."""
    return conditioning.with_motion(0.0)


def concatenate(conditionings: Sequence[Condition]) -> Condition:
    """Joins conditionings along the batch axis: by their own method, or leaf by leaf."""
    own = getattr(type(conditionings[0]), "concatenate", None)
    if own is not None:
        return own(conditionings)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conditionings)


@register("guidance", "classifier_free")
@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance: u + scale (c - u); 1 is the network itself, 0 ignores the prompt.

    Attributes:
        scale: how far to go from the unconditional (u) to the conditional (c) prediction.
        unconditional: makes the conditioning of u.
        batched: whether one call on a doubled batch computes both branches.
        join: concatenates conditionings, for `batched`.
    """

    scale: ArrayLike = 7.5
    unconditional: ConditionFn = without_prompt
    batched: bool = True
    join: JoinFn = concatenate

    def __call__(self, denoise: DenoiseFn, /) -> DenoiseFn:
        def guided(x_t: Array, timestep: Array, conditioning: Condition, /) -> Array:
            conditionings = [conditioning, self.unconditional(conditioning)]
            cond, uncond = _branches(denoise, x_t, timestep, conditionings, self.batched, self.join)
            return uncond + jnp.asarray(self.scale) * (cond - uncond)

        return guided


@register("guidance", "three_d_aware")
@dataclasses.dataclass(frozen=True)
class ThreeDAware:
    """Diffusion4D's 3D-aware classifier-free guidance (Eq. 3).

    c + w1 (c - u) + w2 (c - s): c is the conditional prediction, u the one without prompt and
    motion, s that of a network that wants a static object. With w2 = 0 it is classifier-free
    guidance of scale 1 + w1.

    Attributes:
        w1: weight of the prompt. A Python 0 leaves that branch out.
        w2: weight of the motion. A Python 0 leaves that branch out.
        static_denoise: the frozen 3D-aware network. None stands for the 4D network itself.
        unconditional: makes the conditioning of u.
        static: makes the conditioning of s: by default the prompt at motion magnitude 0.
        batched: whether one call on a larger batch computes the branches that share a network.
        join: concatenates conditionings, for `batched`.
    """

    w1: ArrayLike = 7.0
    w2: ArrayLike = 0.5
    static_denoise: DenoiseFn | None = None
    unconditional: ConditionFn = without_prompt
    static: ConditionFn = without_motion
    batched: bool = True
    join: JoinFn = concatenate

    def __call__(self, denoise: DenoiseFn, /) -> DenoiseFn:
        use_u, use_s = (not (isinstance(w, int | float) and w == 0) for w in (self.w1, self.w2))

        def guided(x_t: Array, timestep: Array, conditioning: Condition, /) -> Array:
            conditionings = [conditioning]
            if use_u:
                conditionings.append(self.unconditional(conditioning))
            if use_s and self.static_denoise is None:
                conditionings.append(self.static(conditioning))
            cond, *others = _branches(
                denoise, x_t, timestep, conditionings, self.batched, self.join
            )
            if use_s and self.static_denoise is not None:
                others.append(self.static_denoise(x_t, timestep, self.static(conditioning)))
            weights = [jnp.asarray(w) for w, used in ((self.w1, use_u), (self.w2, use_s)) if used]
            steps = [w * (cond - other) for w, other in zip(weights, others, strict=True)]
            return sum(steps, start=cond)

        return guided


def _branches(
    denoise: DenoiseFn,
    x_t: Array,
    timestep: Array,
    conditionings: list[Condition],
    batched: bool,
    join: JoinFn,
) -> list[Array]:
    """The predictions of one network under several conditionings."""
    if not batched or len(conditionings) == 1:
        return [denoise(x_t, timestep, conditioning) for conditioning in conditionings]
    n = len(conditionings)
    x_all, t_all = jnp.concatenate([x_t] * n), jnp.concatenate([timestep] * n)
    return jnp.split(denoise(x_all, t_all, join(conditionings)), n)
