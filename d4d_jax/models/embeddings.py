"""Embeddings of the numbers that steer the network; all are added to the time embedding."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from d4d_jax.models.layers import Dense, fan_in_uniform, zeros
from d4d_jax.registry import register
from d4d_jax.typing import AnyArray


def sinusoidal(
    values: Num[Array, "*b"], width: int, *, max_period: float = 10_000.0
) -> Float[Array, "*b width"]:
    """Cosines then sines of `values` at `width / 2` frequencies from 1 down to 1 / max_period."""
    if width % 2:
        raise ValueError(f"A sinusoidal embedding needs an even width, not {width}.")
    half = width // 2
    frequencies = max_period ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = values[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, Linear; `zero_init` makes it an exact 0 before training."""

    width: int
    zero_init: bool = False
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        x = nn.silu(Dense(self.width, dtype=self.dtype, name="linear_1")(x))
        kernel_init = zeros if self.zero_init else fan_in_uniform
        return Dense(self.width, True, kernel_init, self.dtype, name="linear_2")(x)


@register("motion_embedding", "mlp")
class MotionEmbedding(nn.Module):
    """Embeds the motion magnitude of a clip by a two-layer MLP on the number; 0 before training.

    Subclasses say by `features` what the MLP sees instead.

    Attributes:
        null: what stands for a dropped magnitude: a "learnt" vector (0 at the start) or "zero".
        input_scale: factor on the magnitude, so that typical values (0 to 20) are of order one.
    """

    width: int
    null: str = "learnt"
    input_scale: float = 0.1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, motion: Float[AnyArray, "b"], drop: Bool[AnyArray, "b"] | None = None
    ) -> Float[Array, "b d"]:
        if self.null not in ("learnt", "zero"):
            raise ValueError(f"The null motion embedding is 'learnt' or 'zero', not {self.null!r}.")
        mlp = EmbeddingMLP(self.width, zero_init=True, dtype=self.dtype, name="mlp")
        embedding = mlp(self.features(jnp.asarray(motion) * self.input_scale))
        null = jnp.zeros((self.width,), self.dtype)
        if self.null == "learnt":
            null = self.param("null", zeros, (self.width,), jnp.float32).astype(self.dtype)
        if drop is None:
            return embedding
        return jnp.where(drop[:, None], null, embedding)

    def features(self, motion: Float[Array, "b"]) -> Float[Array, "b f"]:
        """What the MLP sees of the scaled magnitudes: themselves."""
        return motion[:, None]


@register("motion_embedding", "fourier")
class FourierMotionEmbedding(MotionEmbedding):
    """The same on Fourier features: small differences of the magnitude are told apart sooner.

    Attributes:
        waves: number of frequencies, each twice the one before; the longest wave is 8 times the
            range in which scaled magnitudes are of order one.
    """

    waves: int = 8

    def features(self, motion: Float[Array, "b"]) -> Float[Array, "b f"]:
        """Cosines, then sines, then the scaled magnitudes themselves."""
        angles = motion[:, None] * (2 * jnp.pi / 8) * 2.0 ** jnp.arange(self.waves)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles), motion[:, None]], axis=-1)
