"""Samplers: from noise to clean latents along a list of timesteps, in one `lax.scan`.

A sampler sees a DenoiseFn, a schedule and a conditioning it does not look into. What one move does
is a Stepper: `DDIM`, which the paper uses, or `DPMSolver2M`, which needs about half the steps.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from d4d_jax.registry import build, register
from d4d_jax.schedules import NoiseSchedule
from d4d_jax.typing import DenoiseFn

FINALS = ("first", "one")


class Level(NamedTuple):
    """A noise level: x = signal * x0 + sigma * noise.

    last: Whether sampling ends at this level.
    """

    signal: Float[Array, "*n"]
    sigma: Float[Array, "*n"]
    last: Bool[Array, "*n"] | bool = False

    @property
    def log_snr(self) -> Float[Array, "*n"]:
        """log(signal / sigma), the half log-SNR of DPM-Solver; infinite without either."""
        return jnp.log(self.signal) - jnp.log(self.sigma)


@runtime_checkable
class Stepper(Protocol):
    """One move of a sampler from a noise level to the next."""

    @property
    def stochastic(self) -> bool:
        """Whether `step` needs a key."""
        ...

    def init(self, x_t: Array, /) -> Any:
        """The carry of a method that remembers earlier moves (a pytree); () if it does not."""
        ...

    def step(
        self,
        x_t: Array,
        x0: Array,
        eps: Array,
        now: Level,
        following: Level,
        key: Array | None,
        carry: Any,
        /,
    ) -> tuple[Array, Any]:
        """The sample at the level `following`, from the estimates of x0 and noise at `now`."""
        ...


@register("stepper", "ddim")
@dataclasses.dataclass(frozen=True)
class DDIM:
    """Song et al. 2021, without fresh noise the same as Euler's method in x / signal.

    Attributes:
        eta: share of fresh noise: 0 is deterministic, 1 has the variance of ancestral sampling.
    """

    eta: float | int = 0.0

    @property
    def stochastic(self) -> bool:
        return self.eta != 0.0

    def init(self, x_t: Array, /) -> tuple[()]:
        return ()

    def step(
        self,
        x_t: Array,
        x0: Array,
        eps: Array,
        now: Level,
        following: Level,
        key: Array | None,
        carry: tuple[()],
        /,
    ) -> tuple[Array, tuple[()]]:
        if key is None:
            return following.signal * x0 + following.sigma * eps, carry
        kept = jnp.maximum(1.0 - jnp.square(now.signal / following.signal), 0.0)
        fresh = self.eta * following.sigma / now.sigma * jnp.sqrt(kept)
        direction = jnp.sqrt(jnp.maximum(jnp.square(following.sigma) - jnp.square(fresh), 0.0))
        noise = jax.random.normal(key, x_t.shape, x_t.dtype)
        return following.signal * x0 + direction * eps + fresh * noise, carry


@register("stepper", "dpmpp_2m")
@dataclasses.dataclass(frozen=True)
class DPMSolver2M:
    """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2: second order from one call of the network.

    A move is DDIM's plus a correction: the change of x0 along the log-SNR since the move before.
    There is none where that change is unknown: in the first move, and in the one after a level
    without signal, whose log-SNR is infinite.

    Attributes:
        lower_order_final: whether the last move is plain DDIM. To the clean sample it always is.
    """

    lower_order_final: bool = True
    stochastic: ClassVar[bool] = False

    def init(self, x_t: Array, /) -> tuple[Array, Array]:
        return jnp.zeros_like(x_t), jnp.full((), -jnp.inf)

    def step(
        self,
        x_t: Array,
        x0: Array,
        eps: Array,
        now: Level,
        following: Level,
        key: Array | None,
        carry: tuple[Array, Array],
        /,
    ) -> tuple[Array, tuple[Array, Array]]:
        x0_before, log_snr_before = carry
        width, width_before = following.log_snr - now.log_snr, now.log_snr - log_snr_before
        known = jnp.isfinite(width_before) & (width_before > 0) & jnp.isfinite(width)
        if self.lower_order_final:
            known &= ~jnp.asarray(following.last)
        ratio = jnp.where(known, width / jnp.where(known, width_before, 1.0), 0.0)
        gain = -following.signal * jnp.expm1(-jnp.where(known, width, 0.0)) * ratio / 2.0
        x = following.signal * x0 + following.sigma * eps + gain * (x0 - x0_before)
        return x, (x0, now.log_snr)


def sample(
    denoise: DenoiseFn,
    schedule: NoiseSchedule,
    stepper: Stepper,
    noise: Float[Array, "b *d"],
    conditioning: Any,
    *,
    timesteps: Int[np.ndarray, "n"],
    final: str = "first",
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b *d"]:
    """Runs a stepper from noise through `timesteps` and on to the final noise level.

    Args:
        denoise: the (guided) network; it predicts what `schedule.prediction` says.
        schedule: the noise schedule it was trained with.
        stepper: the method.
        noise: standard normal.
        conditioning: handed to `denoise` as it is.
        timesteps: decreasing indices of the schedule; the network is called once for each.
        final: where the last move ends: "first" is alphas_cumprod[0], as VideoMV and Stable
            Diffusion do (a trace of noise stays); "one" is the clean sample.
        key: for stochastic steppers.

    Raises:
        ValueError: bad timesteps, an unknown `final`, or a key that is missing.
    """
    steps = np.asarray(timesteps)
    if steps.size == 0 or np.any(np.diff(steps) >= 0) or not 0 <= steps[-1] <= steps[0]:
        raise ValueError(f"timesteps must decrease and not be negative: {steps.tolist()}.")
    if steps[0] >= schedule.num_steps:
        raise ValueError(f"Timestep {steps[0]} is beyond the schedule's {schedule.num_steps}.")
    if final not in FINALS:
        raise ValueError(f"final must be one of {FINALS}, not {final!r}.")
    if stepper.stochastic and key is None:
        raise ValueError(f"{stepper} adds fresh noise: pass key=jax.random.key(...).")
    signal, sigma = jnp.asarray(schedule.signal), jnp.asarray(schedule.sigma)
    last = (signal[:1], sigma[:1]) if final == "first" else (jnp.ones((1,)), jnp.zeros((1,)))
    now = Level(signal[steps], sigma[steps], jnp.zeros(steps.shape, bool))
    following = Level(
        jnp.concatenate([now.signal[1:], last[0]]),
        jnp.concatenate([now.sigma[1:], last[1]]),
        jnp.arange(steps.size) == steps.size - 1,
    )
    keys = jax.random.split(key, steps.size) if stepper.stochastic and key is not None else None

    def move(state: tuple[Array, Any], inputs: tuple) -> tuple[tuple[Array, Any], None]:
        x_t, carry = state
        t, now, following, step_key = inputs
        t = jnp.full((x_t.shape[0],), t, jnp.int32)
        prediction = denoise(x_t, t, conditioning).astype(x_t.dtype)
        x0 = schedule.to_x0(prediction, x_t, t)
        eps = schedule.to_eps(prediction, x_t, t)
        return stepper.step(x_t, x0, eps, now, following, step_key, carry), None

    inputs = (jnp.asarray(steps, jnp.int32), now, following, keys)
    (x, _), _ = jax.lax.scan(move, (noise, stepper.init(noise)), inputs)
    return x


def ddim(
    denoise: DenoiseFn,
    schedule: NoiseSchedule,
    noise: Float[Array, "b *d"],
    conditioning: Any = None,
    *,
    num_steps: int = 50,
    eta: float | int = 0.0,
    spacing: str = "leading",
    final: str = "first",
    key: Key[Array, ""] | None = None,
) -> Float[Array, "b *d"]:
    """DDIM sampling; the defaults are VideoMV's (981, 961, ... 1 for 50 steps of 1000).

    Args:
        num_steps: calls of the network.
        eta: see `DDIM`; above 0 it needs a `key`.
        spacing: name in the family "timesteps": "leading", or "trailing" to start from the last
            timestep, which suits a schedule with zero terminal SNR.
        final: "first" or "one", see `sample`.
    """
    spec = {"name": spacing, "train_steps": schedule.num_steps, "num_steps": num_steps}
    timesteps = build("timesteps", spec)
    options = {"timesteps": timesteps, "final": final, "key": key}
    return sample(denoise, schedule, DDIM(eta), noise, conditioning, **options)
