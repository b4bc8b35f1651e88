"""The training objective of Diffusion4D: from a batch of clips to L_ldm + omega L_mr.

    objective = DiffusionObjective(network, codec, schedule, omega=0.1, drop_prompt=0.1)
    step_fn = make_train_step(objective, optax.adamw(3e-5))

All that is random for a clip (its timestep, its noise, which of its conditions are dropped) comes
from that clip's own key. So the loss does not depend on how the clips of a batch are ordered, split
over processes and devices, or accumulated.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from d4d_jax import losses
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.motion import MotionCondition
from d4d_jax.schedules import NoiseSchedule
from d4d_jax.typing import Codec, PyTree

#: Conditions that a batch may bring ready for the network, as an encoded prompt.
TOLD = ("context", "null_context", "image_embedding")

#: Conditions that are dropped on their own, each with the probability `drop_NAME`.
SEPARATE = ("text", "image", "static", "motion")


@dataclasses.dataclass(frozen=True)
class DiffusionObjective:
    """The loss of a network on a batch of clips, and the same without chance for validation.

    A batch is a dict of arrays as `d4d_jax.data.pipeline.make_dataset` gives them:

        dynamic, static   (b, t, h, w, 4) frames in [-1, 1]; or else `dynamic_latents` and
                          `static_latents`, which are used as they are
        camera, motion    (b, t, 4, 4), (b,)
        key               (b, 2) uint32, a random key of each clip; without, the step's is split
        and the entries in `TOLD`, if the network reads them.

    Attributes:
        network: called as `network.apply({"params": params}, x_t, t, conditioning, train=, rngs=)`.
        codec: makes latents of frames, with the parameters `frozen["codec"]`.
        schedule: the noise schedule, which also says what the network predicts.
        omega: weight of L_mr; 0 leaves it out of the gradient, and it is still reported.
        snr_power: see `losses.motion_reconstruction_loss`.
        min_snr_gamma: see `losses.min_snr_weight`; 0 weighs all timesteps alike.
        noise_offset: see `draw_noise`.
        timestep_shift: see `draw_timesteps`.
        drop_prompt: probability that text and image are dropped together.
        drop_text, drop_image, drop_static, drop_motion: of each on its own, independently.
        motion: which magnitude the network is told.
    """

    network: Any
    codec: Codec
    schedule: NoiseSchedule
    omega: float | int = 1.0
    snr_power: float | int = 0.0
    min_snr_gamma: float | int = 0.0
    noise_offset: float | int = 0.0
    timestep_shift: float | int = 1.0
    drop_prompt: float | int = 0.1
    drop_text: float | int = 0.0
    drop_image: float | int = 0.0
    drop_static: float | int = 0.0
    drop_motion: float | int = 0.1
    motion: MotionCondition = dataclasses.field(default=MotionCondition())

    def __post_init__(self) -> None:
        """Raises ValueError for a probability outside [0, 1]."""
        for name in ("prompt", *SEPARATE):
            probability = getattr(self, f"drop_{name}")
            if not 0 <= probability <= 1:
                raise ValueError(f"drop_{name} must lie in [0, 1], but it is {probability}.")

    def __call__(
        self, params: PyTree, frozen: PyTree, batch: PyTree, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss of a training batch, and what it is made of; all are means over the batch.

        The parts are "denoising" (L_ldm) and "motion" (L_mr); "m" and "m_hat" are the latent motion
        magnitudes that L_mr compares, of the true clips and of those that the network implies.

        Args:
            params: of the network.
            frozen: {"codec": parameters of the codec}.
            batch: see the class.
            key: of the step.
        """
        latents, static = self.latents(frozen, batch)
        keys = clip_keys(batch, key)
        noise_keys, time_keys, drop_keys = (jax.vmap(jax.random.split, (0, None))(keys, 3)).T
        timestep = draw_timesteps(time_keys, self.schedule.num_steps, self.timestep_shift)
        noise = draw_noise(noise_keys, latents.shape[1:], self.noise_offset)
        told = self._drop(self.conditioning(batch, latents, static), drop_keys)
        parts = self._losses(params, latents, static, noise, timestep, told, dropout_key=key)
        terms = {name: values.mean() for name, values in parts.items()}
        if not self.omega:
            return terms["denoising"], terms
        return terms["denoising"] + self.omega * terms["motion"], terms

    def evaluate(
        self, params: PyTree, frozen: PyTree, batch: PyTree, timestep: Int[Array, "b"]
    ) -> dict[str, Float[Array, "b"]]:
        """The same parts for every clip, at given timesteps, with all conditions and no dropout.

        Args:
            batch: see the class; the noise comes from its `key`.
        """
        latents, static = self.latents(frozen, batch)
        keys = jax.vmap(jax.random.split, (0, None))(clip_keys(batch, None), 3)
        noise = draw_noise(keys[:, 0], latents.shape[1:], 0.0)
        told = self.conditioning(batch, latents, static)
        plain = dataclasses.replace(self, min_snr_gamma=0.0, snr_power=0.0)
        return plain._losses(params, latents, static, noise, timestep, told)

    def latents(
        self, frozen: PyTree, batch: PyTree
    ) -> tuple[Float[Array, "b t h w c"], Float[Array, "b t h w c"]]:
        """The latents of the dynamic and of the static orbit."""
        if "dynamic_latents" in batch:
            views = (batch["dynamic_latents"], batch["static_latents"])
            return jnp.asarray(views[0], jnp.float32), jnp.asarray(views[1], jnp.float32)
        dynamic, static = (
            self.codec.encode(frozen["codec"], batch[view]) for view in ("dynamic", "static")
        )
        return dynamic, static

    def conditioning(self, batch: PyTree, latents: Array, static: Array) -> Conditioning:
        """All that the network is told of a batch; nothing is dropped."""
        told = {name: batch[name] for name in TOLD if name in batch}
        return Conditioning(
            image=latents[:, 0],
            static=static if getattr(self.network, "static_channels", 0) else None,
            camera=batch["camera"],
            motion=self.motion.of_batch(batch, latents, static),
            **told,
        )

    def _drop(self, told: Conditioning, keys: Key[Array, "b"]) -> Conditioning:
        """Drops conditions at random."""
        joint = _flags(keys, 0, self.drop_prompt)
        own = {
            name: _flags(keys, i, getattr(self, f"drop_{name}"))
            for i, name in enumerate(SEPARATE, start=1)
        }
        return dataclasses.replace(
            told,
            drop_text=joint | own["text"],
            drop_image=joint | own["image"],
            drop_static=own["static"] if self.drop_static else None,
            drop_motion=own["motion"],
        )

    def _losses(
        self,
        params: PyTree,
        latents: Array,
        static: Array,
        noise: Array,
        timestep: Array,
        told: Conditioning,
        dropout_key: Key[Array, ""] | None = None,
    ) -> dict[str, Float[Array, "b"]]:
        options: dict[str, Any] = {}
        if dropout_key is not None:
            options = {"train": True, "rngs": {"dropout": dropout_key}}
        x_t = self.schedule.add_noise(latents, noise, timestep)
        prediction = self.network.apply({"params": params}, x_t, timestep, told, **options)
        clips = (prediction, latents, noise, timestep)
        m_hat, m = losses.motion_magnitudes(self.schedule, *clips, static)
        return {
            "denoising": losses.denoising_loss(
                self.schedule, *clips, min_snr_gamma=self.min_snr_gamma or None
            ),
            "motion": losses.motion_reconstruction_loss(
                self.schedule, *clips, static, snr_power=self.snr_power
            ),
            "m": m,
            "m_hat": m_hat,
        }


def clip_keys(batch: PyTree, key: Key[Array, ""] | None) -> Key[Array, "b"]:
    """The random key of every clip: those of the batch, or else the given one, split."""
    if "key" in batch:
        return jax.vmap(jax.random.wrap_key_data)(jnp.asarray(batch["key"], jnp.uint32))
    assert key is not None, "the batch has no keys"
    return jax.random.split(key, batch["camera"].shape[0])


def draw_timesteps(
    keys: Key[Array, "b"], num_steps: int, shift: float | int = 1.0
) -> Int[Array, "b"]:
    """Random timesteps in [0, num_steps), int32; a `shift` above 1 favours noisy ones.

    u becomes shift u / (1 + (shift - 1) u), as in Esser et al. 2024 (arXiv 2403.03206); with
    shift 1 they are uniform. The noisiest steps decide what a sampled clip shows.
    """
    u = jax.vmap(jax.random.uniform)(keys)
    u = shift * u / (1.0 + (shift - 1.0) * u)
    return jnp.minimum((u * num_steps).astype(jnp.int32), num_steps - 1)


def draw_noise(
    keys: Key[Array, "b"], shape: tuple[int, ...], offset: float | int = 0.0
) -> Float[Array, "b *d"]:
    """Normal noise, with `offset` times a normal draw per clip and channel added to it.

    With such noise (Guttenberg 2023, "Diffusion with offset noise") a network learns to change the
    mean of a whole clip, also where the last step of its schedule still holds some of it.

    Args:
        shape: of one clip, channels last.
    """
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    if not offset:
        return noise
    each = (*(1 for _ in shape[:-1]), shape[-1])
    common = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), each))(keys)
    return noise + offset * common


def _flags(keys: Key[Array, "b"], stream: int, probability: float | int) -> Array:
    """True with that probability, drawn for every clip from its key's numbered stream."""
    return jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, stream), probability))(
        keys
    )
