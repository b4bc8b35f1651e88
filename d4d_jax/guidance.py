"""Guidance: transforms of a DenoiseFn into another DenoiseFn, as `ThreeDAware(w1=7.0)(denoise)`.

The weights of every rule here sum to one, and eps, v and x0 are affine in each other at fixed x_t,
so the rules hold for whatever the network predicts. A weight may be a function of the timestep,
such as `Ramp` and `Interval`: guidance is stronger at one end then, or only in between.

A conditioning may be any object. Ours (`d4d_jax.models.conditioning.Conditioning`) brings the
methods `without_prompt`, `with_motion` and `concatenate`; for others pass functions instead.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from d4d_jax.registry import build, register
from d4d_jax.typing import DenoiseFn, Guidance

Condition = Any
#: A number, or a function of the timestep (b,) that gives one for every clip.
Weight = ArrayLike | Callable[[Array], Array]
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


@register("weight", "ramp")
@dataclasses.dataclass(frozen=True)
class Ramp:
    """A weight that goes in a line from `noisy` at the last timestep to `clean` at timestep 0."""

    noisy: float | int
    clean: float | int
    num_steps: int = 1000

    def __call__(self, timestep: Array, /) -> Array:
        share = timestep / (self.num_steps - 1)
        return self.clean + (self.noisy - self.clean) * share


@register("weight", "interval")
@dataclasses.dataclass(frozen=True)
class Interval:
    """A weight from timestep `first` up to but without `last`, and elsewhere `outside`.

    Guidance in an interval (Kynkaanniemi et al. 2024, arXiv 2404.07724) leaves out the noisiest
    steps, where it costs variety, and the last ones, where it changes nothing. For a `scale` of
    `ClassifierFree` no guidance is `outside` = 1.
    """

    weight: float | int
    first: int
    last: int
    outside: float | int = 0.0

    def __call__(self, timestep: Array, /) -> Array:
        inside = (timestep >= self.first) & (timestep < self.last)
        return jnp.where(inside, self.weight, self.outside)


@register("guidance", "classifier_free")
@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance: u + scale (c - u); 1 is the network itself, 0 ignores the prompt.

    Attributes:
        scale: how far to go from the unconditional (u) to the conditional (c) prediction.
        unconditional: makes the conditioning of u.
        batched: whether one call on a doubled batch computes both branches.
        join: concatenates conditionings, for `batched`.
        rescale: see `rescaled`.
    """

    scale: Weight = 7.5
    unconditional: ConditionFn = without_prompt
    batched: bool = True
    join: JoinFn = concatenate
    rescale: float | int = 0.0

    def __call__(self, denoise: DenoiseFn, /) -> DenoiseFn:
        def guided(x_t: Array, timestep: Array, conditioning: Condition, /) -> Array:
            conditionings = [conditioning, self.unconditional(conditioning)]
            cond, uncond = _branches(denoise, x_t, timestep, conditionings, self.batched, self.join)
            moved = uncond + _at(self.scale, timestep, cond) * (cond - uncond)
            return rescaled(moved, cond, self.rescale)

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
        rescale: see `rescaled`.
    """

    w1: Weight = 7.0
    w2: Weight = 0.5
    static_denoise: DenoiseFn | None = None
    unconditional: ConditionFn = without_prompt
    static: ConditionFn = without_motion
    batched: bool = True
    join: JoinFn = concatenate
    rescale: float | int = 0.0

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
            weights = [
                _at(weight, timestep, cond)
                for weight, used in ((self.w1, use_u), (self.w2, use_s))
                if used
            ]
            steps = [w * (cond - other) for w, other in zip(weights, others, strict=True)]
            return rescaled(sum(steps, start=cond), cond, self.rescale)

        return guided


def from_config(config: Mapping[str, Any]) -> Guidance:
    """A guidance by its name; a weight may be a mapping, too, with a name in the family "weight".

    Raises:
        ValueError: a wrong name or argument.
    """
    weights = {
        name: build("weight", value) for name, value in config.items() if isinstance(value, Mapping)
    }
    return build("guidance", {**config, **weights})


def rescaled(guided: Array, conditional: Array, share: float | int) -> Array:
    """The guided prediction, brought by `share` to the standard deviation of the conditional one.

    Lin et al. 2023 (arXiv 2305.08891), Eq. 15 and 16: strong guidance makes too bright and
    saturated pictures, since it enlarges the prediction. 0 leaves it as it is, 0.7 is usual.
    """
    if isinstance(share, int | float) and share == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    wanted, found = (jnp.std(x, axis=axes, keepdims=True, ddof=1) for x in (conditional, guided))
    return guided * (share * wanted / found + (1 - share))


def _at(weight: Weight, timestep: Array, like: Array) -> Array:
    """The weight at a timestep, ready to be multiplied with predictions."""
    if not callable(weight):
        return jnp.asarray(weight)
    return jnp.reshape(weight(timestep), (-1, *(1 for _ in like.shape[1:])))


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
