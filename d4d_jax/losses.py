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
) -> Float[Array, "b"]:
    """Mean squared error of every sample in the schedule's parametrisation (L_ldm)."""
    error = prediction - schedule.target(x0, noise, timestep)
    return jnp.square(error).reshape(error.shape[0], -1).mean(-1)


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
    x_t = schedule.add_noise(x0, noise, timestep)
    implied = schedule.to_x0(prediction, x_t, timestep)
    error = latent_motion_magnitude(implied, static) - latent_motion_magnitude(x0, static)
    if snr_power == 0.0:
        return jnp.square(error)
    return jnp.square(error) * jnp.minimum(schedule.snr(timestep), 1.0) ** snr_power


def diffusion_losses(
    schedule: NoiseSchedule,
    prediction: Float[Array, "b t h w c"],
    x0: Float[Array, "b t h w c"],
    noise: Float[Array, "b t h w c"],
    timestep: Int[Array, "b"],
    static: Float[Array, "b t h w c"] | None = None,
    *,
    omega: float | int = 1.0,
    snr_power: float | int = 0.0,
) -> dict[str, Float[Array, ""]]:
    """L = L_ldm + omega L_mr, means over the batch.

    Args:
        prediction: the network's answer at `schedule.add_noise(x0, noise, timestep)`.
        static: latents of the static orbit; without them L_mr is left out.
        omega: weight of L_mr.
        snr_power: see `motion_reconstruction_loss`.

    Returns:
        "loss", and its parts "denoising" and (unweighted by omega) "motion".
    """
    denoising = denoising_loss(schedule, prediction, x0, noise, timestep).mean()
    if static is None:
        return {"loss": denoising, "denoising": denoising}
    motion = motion_reconstruction_loss(
        schedule, prediction, x0, noise, timestep, static, snr_power=snr_power
    ).mean()
    return {"loss": denoising + omega * motion, "denoising": denoising, "motion": motion}
