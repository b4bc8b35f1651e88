"""Training losses of the diffusion half: denoising (L_ldm) and motion reconstruction (L_mr)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from d4d_jax.motion import latent_motion_magnitude
from d4d_jax.schedules import NoiseSchedule


def denoising_loss(
    schedule: NoiseSchedule,
    prediction: Float[Array, "b *d"],
    x0: Float[Array, "b *d"],
    noise: Float[Array, "b *d"],
    timestep: Int[Array, "b"],
    *,
    min_snr_gamma: float | int | None = None,
) -> Float[Array, "b"]:
    """Mean squared error of every sample in the schedule's parametrisation (L_ldm).

    Args:
        min_snr_gamma: weighs samples by `min_snr_weight`; None leaves them as they are.
    """
    error = prediction - schedule.target(x0, noise, timestep)
    loss = jnp.square(error).reshape(error.shape[0], -1).mean(-1)
    if min_snr_gamma is None:
        return loss
    return loss * min_snr_weight(schedule, timestep, min_snr_gamma)


def min_snr_weight(
    schedule: NoiseSchedule, timestep: Int[Array, "b"], gamma: float | int
) -> Float[Array, "b"]:
    """Min-SNR-gamma (Hang et al. 2023, arXiv 2303.09556): steps near the data count less.

    The squared error of the implied x0 is weighted by min(snr, gamma), whatever the schedule's
    parametrisation: as errors of eps by min(snr, gamma) / snr, of v by min(snr, gamma) / (snr + 1).

    Args:
        gamma: positive; 5 in the paper.

    Raises:
        ValueError: `gamma` is not positive.
    """
    if gamma <= 0:
        raise ValueError(f"min_snr_gamma must be positive, but it is {gamma}.")
    snr = schedule.snr(timestep)
    if schedule.prediction == "x0":
        return jnp.minimum(snr, gamma)
    if schedule.prediction == "v":
        return jnp.minimum(snr, gamma) / (snr + 1)
    return jnp.minimum(1, gamma / jnp.maximum(snr, 1e-12))  # 1 also where no signal is left


def motion_reconstruction_loss(
    schedule: NoiseSchedule,
    prediction: Float[Array, "b t h w c"],
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    timestep: Int[Array, "b"],
    static: Float[Array, "b t h w c"],
    *,
    snr_power: float | int = 0.0,
) -> Float[Array, "b"]:
    """Squared error of every sample's latent motion magnitude (L_mr, Eq. 2).

    The magnitude of the clip that the prediction implies is compared with that of the true one,
    both measured against the latents `static` of the frozen object from the same cameras.

    Args:
        snr_power: exponent of the weight min(snr, 1); 0 is Eq. 2 as printed. Under eps-prediction
            the square of the implied clip's error grows as 1 / snr, and the loss as its square, so
            that unweighted high-noise samples drown the others; 2 evens that out.
    """
    m_hat, m = motion_magnitudes(schedule, prediction, x0, noise, timestep, static)
    if snr_power == 0.0:
        return jnp.square(m_hat - m)
    return jnp.square(m_hat - m) * jnp.minimum(schedule.snr(timestep), 1.0) ** snr_power


def motion_magnitudes(
    schedule: NoiseSchedule,
    prediction: Float[Array, "b t h w c"],
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    timestep: Int[Array, "b"],
    static: Float[Array, "b t h w c"],
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """The two sides of Eq. 2: m-hat of the clip that the prediction implies, and m of the true one.

    Both are latent magnitudes against the latents `static` of the frozen object.
    """
    x_t = schedule.add_noise(x0, noise, timestep)
    implied = schedule.to_x0(prediction, x_t, timestep)
    m_hat, m = (latent_motion_magnitude(clip, static) for clip in (implied, x0))
    return jnp.asarray(m_hat), jnp.asarray(m)
