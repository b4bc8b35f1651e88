"""Noise schedules: the tables of a discrete diffusion process and the algebra of its predictions.

A noisy sample is x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, with t an integer in
[0, num_steps) and t = 0 next to the data. A network may predict

  * "eps": the noise,
  * "x0":  the clean sample,
  * "v":   sqrt(abar) noise - sqrt(1 - abar) x0.

Tables are computed in float64 and stored in float32.
"""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float64, Int, Int32

from d4d_jax import pytree
from d4d_jax.registry import register
from d4d_jax.typing import AnyArray

Prediction = Literal["eps", "x0", "v"]
PREDICTIONS = ("eps", "x0", "v")


@pytree.dataclass
class NoiseSchedule:
    """The tables of one schedule and what the network that goes with it predicts.

    Build one with `scaled_linear`, `cosine` or `from_alphas_cumprod`. The tables are pytree
    leaves, `prediction` is static.

    Attributes:
        alphas_cumprod: abar_t, the share of signal variance, decreasing from about 1.
        signal: sqrt(abar_t).
        sigma: sqrt(1 - abar_t), rounded once from float64 (1 - abar loses digits in float32).
        prediction: "eps", "x0" or "v".
    """

    alphas_cumprod: Float[AnyArray, "num_steps"]
    signal: Float[AnyArray, "num_steps"]
    sigma: Float[AnyArray, "num_steps"]
    prediction: Prediction = pytree.static(default="eps")

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Sequence[float] | ArrayLike, prediction: str = "eps"
    ) -> "NoiseSchedule":
        """Schedule from a table of abar_t, index 0 next to the data.

        Raises:
            ValueError: the table is not a decreasing sequence in [0, 1], or the prediction is
                unknown.
        """
        table = np.asarray(alphas_cumprod, np.float64)
        if table.ndim != 1 or table.min() < 0.0 or table.max() > 1.0 or np.any(np.diff(table) > 0):
            raise ValueError("alphas_cumprod must be one decreasing sequence of numbers in [0, 1].")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, not {prediction!r}.")
        tables = (table, np.sqrt(table), np.sqrt(1.0 - table))
        return cls(*(t.astype(np.float32) for t in tables), prediction=prediction)

    @property
    def num_steps(self) -> int:
        """Length of the tables (1000 for every published network)."""
        return self.alphas_cumprod.shape[0]

    def scales(self, t: Int[ArrayLike, "b"], ndim: int) -> tuple[Array, Array]:
        """(sqrt(abar_t), sqrt(1 - abar_t)) of every sample, shaped (b, 1, ...) with `ndim` axes."""
        shape = (-1,) + (1,) * (ndim - 1)
        signal, sigma = jnp.asarray(self.signal)[t], jnp.asarray(self.sigma)[t]
        return signal.reshape(shape), sigma.reshape(shape)

    def snr(self, t: Int[ArrayLike, "*b"]) -> Float[Array, "*b"]:
        """Signal-to-noise ratio abar / (1 - abar); 0 where no signal is left."""
        signal, sigma = jnp.asarray(self.signal)[t], jnp.asarray(self.sigma)[t]
        return jnp.square(signal / jnp.maximum(sigma, 1e-12))

    def add_noise(
        self, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """The noisy sample x_t."""
        signal, sigma = self.scales(t, x0.ndim)
        return signal * x0 + sigma * noise

    def target(
        self, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """What the network should answer at `add_noise(x0, noise, t)`."""
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x0
        signal, sigma = self.scales(t, x0.ndim)
        return signal * noise - sigma * x0

    def to_x0(
        self, prediction: Float[Array, "b *d"], x_t: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """Clean sample implied by a prediction.

        Under "eps" a sample without signal (abar = 0) says nothing about x0: the answer is 0 there.
        """
        if self.prediction == "x0":
            return prediction
        signal, sigma = self.scales(t, x_t.ndim)
        if self.prediction == "v":
            return signal * x_t - sigma * prediction
        return _divide(x_t - sigma * prediction, signal)

    def to_eps(
        self, prediction: Float[Array, "b *d"], x_t: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """Noise implied by a prediction; finite at abar = 0 and (as 0) at abar = 1."""
        if self.prediction == "eps":
            return prediction
        signal, sigma = self.scales(t, x_t.ndim)
        if self.prediction == "v":
            return signal * prediction + sigma * x_t
        return _divide(x_t - signal * prediction, sigma)

    def to_v(
        self, prediction: Float[Array, "b *d"], x_t: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """Velocity implied by a prediction (0 where it is undefined: "eps" at abar = 0)."""
        if self.prediction == "v":
            return prediction
        signal, sigma = self.scales(t, x_t.ndim)
        if self.prediction == "eps":
            return _divide(prediction - sigma * x_t, signal)
        return _divide(signal * x_t - prediction, sigma)


def _divide(numerator: Array, denominator: Array) -> Array:
    """Quotient that is 0 (with gradient 0) where the denominator is 0."""
    safe = jnp.where(denominator > 0, denominator, 1.0)
    return jnp.where(denominator > 0, numerator / safe, 0.0)


@register("schedule", "scaled_linear")
def scaled_linear(
    num_steps: int = 1000,
    *,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    prediction: str = "eps",
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """Square roots of the betas on a line: Stable Diffusion, ModelScope T2V, VideoMV's text net."""
    betas = np.linspace(np.sqrt(beta_start), np.sqrt(beta_end), num_steps, dtype=np.float64) ** 2
    return _finish(np.cumprod(1.0 - betas), prediction, zero_terminal_snr)


@register("schedule", "cosine")
def cosine(
    num_steps: int = 1000,
    *,
    offset: float = 0.008,
    max_beta: float = 0.999,
    prediction: str = "v",
    zero_terminal_snr: bool = True,
) -> NoiseSchedule:
    """abar on a squared cosine (Nichol & Dhariwal 2021); I2VGen-XL adds the zero terminal SNR."""
    u = np.arange(num_steps + 1, dtype=np.float64) / num_steps
    curve = np.cos((u + offset) / (1.0 + offset) * np.pi / 2.0) ** 2
    betas = np.minimum(1.0 - curve[1:] / curve[:-1], max_beta)
    return _finish(np.cumprod(1.0 - betas), prediction, zero_terminal_snr)


def rescale_zero_terminal_snr(
    alphas_cumprod: Float64[np.ndarray, "num_steps"],
) -> Float64[np.ndarray, "num_steps"]:
    """Shift and stretch sqrt(abar): the last becomes 0, the first is kept (Lin et al. 2023)."""
    signal = np.sqrt(alphas_cumprod)
    stretch = signal[0] / (signal[0] - signal[-1])
    return ((signal - signal[-1]) * stretch) ** 2


def _finish(alphas_cumprod: np.ndarray, prediction: str, zero_terminal_snr: bool) -> NoiseSchedule:
    if zero_terminal_snr:
        alphas_cumprod = rescale_zero_terminal_snr(alphas_cumprod)
    return NoiseSchedule.from_alphas_cumprod(alphas_cumprod, prediction)


@register("timesteps", "leading")
def leading(train_steps: int, num_steps: int, *, offset: int = 1) -> Int32[np.ndarray, "n"]:
    """Every (train_steps // num_steps)-th timestep from `offset`, largest first: 981 ... 21, 1.

    The spacing of VideoMV's DDIM (1000 and 50 steps, offset 1). It never visits the last
    timestep.

    Raises:
        ValueError: the strides do not fit: they would leave the schedule, or start so far from its
            end (below 90 %) that pure noise would pass for a partly clean sample.
    """
    stride = _stride(train_steps, num_steps)
    steps = np.arange(num_steps, dtype=np.int32)[::-1] * stride + offset
    if not 0.9 * train_steps <= steps[0] + stride - 1 or steps[0] >= train_steps:
        raise ValueError(
            f"{num_steps} leading steps of {train_steps} would start at timestep {steps[0]}; take"
            ' a smaller number that divides the schedule, or the spacing "trailing".'
        )
    return steps.astype(np.int32)


@register("timesteps", "trailing")
def trailing(train_steps: int, num_steps: int) -> Int32[np.ndarray, "n"]:
    """Evenly spaced timesteps that start at the very last one: 999, 979, ... 19.

    What a network trained with zero terminal SNR wants: sampling starts where x_t is pure noise.
    """
    _stride(train_steps, num_steps)  # Checks the count.
    steps = np.round(train_steps - np.arange(num_steps) * (train_steps / num_steps)) - 1
    return steps.astype(np.int32)


@register("timesteps", "linspace")
def linspace(train_steps: int, num_steps: int) -> Int32[np.ndarray, "n"]:
    """Evenly spaced timesteps from the very last one towards 0, which is left out: 999, 979 ... 20.

    DPM-Solver's own spacing: the last move, which the sampler adds, is as long as the others.

    Raises:
        ValueError: there are fewer than one step, or not more timesteps than steps.
    """
    _stride(train_steps, num_steps)  # Checks the count.
    if num_steps == train_steps:
        raise ValueError(
            f'The spacing "linspace" leaves timestep 0 out: take at most {train_steps - 1} steps,'
            ' or the spacing "trailing".'
        )
    steps = np.round(np.linspace(train_steps - 1, 0, num_steps + 1))[:-1]
    return steps.astype(np.int32)


def _stride(train_steps: int, num_steps: int) -> int:
    if not 1 <= num_steps <= train_steps:
        raise ValueError(
            f"num_steps must lie between 1 and the schedule's {train_steps} steps, not {num_steps}."
        )
    return train_steps // num_steps
