"""The blocks of one resolution of the spatio-temporal UNet."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from d4d_jax.models.layers import Downsample, ResidualBlock, SpatialTransformer, Upsample
from d4d_jax.models.temporal import TemporalConv
from d4d_jax.registry import lookup

#: What is kept of a forward pass for the backward one: all, or only the inputs of the blocks and
#: what the policy of that name in `jax.checkpoint_policies` says.
REMATS = {
    "none": None,
    "blocks": "nothing_saveable",
    "dots": "dots_with_no_batch_dims_saveable",
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Makes the blocks of a network, with what all of them have in common."""

    temporal_mixer: str
    groups: int
    dropout: float
    attention: str
    remat: str
    dtype: jnp.dtype

    def residual(self, channels: int, name: str) -> nn.Module:
        """A residual block."""
        return self._lifted(ResidualBlock, 3)(channels, self.dropout, **self._norm, name=name)

    def temporal_conv(self, name: str) -> nn.Module:
        """A stack of temporal convolutions."""
        return self._lifted(TemporalConv, 2)(self.dropout, **self._norm, name=name)

    def spatial(self, *, heads: int, head_dim: int, name: str) -> nn.Module:
        """A spatial transformer."""
        options = {"attention": self.attention, **self._norm, "name": name}
        return self._lifted(SpatialTransformer)(heads, head_dim, **options)

    def mixer(self, *, heads: int, head_dim: int, name: str) -> nn.Module:
        """A temporal mixer."""
        mixer: Any = lookup("temporal_mixer", self.temporal_mixer)
        options = self._norm
        if "attention" in {field.name for field in dataclasses.fields(mixer)}:
            options |= {"attention": self.attention}
        return self._lifted(mixer)(heads=heads, head_dim=head_dim, **options, name=name)

    @property
    def _norm(self) -> dict[str, Any]:
        return {"groups": self.groups, "dtype": self.dtype}

    def _lifted(self, module: Any, *static: int) -> Any:
        """The class, computed again in the backward pass if `remat` says so.

        `static` are the positions of arguments of `__call__` that are no arrays, self being 0.
        """
        policy = REMATS[self.remat]
        if policy is None:
            return module
        keep = getattr(jax.checkpoint_policies, policy)
        return nn.remat(module, policy=keep, static_argnums=static)


class Level(nn.Module):
    """The blocks of one resolution, then a resampler.

    A block is a residual block with its temporal convolution and, where `attends` says so, a
    spatial transformer and a temporal mixer, in this order.

    Attributes:
        channels: channels of every block.
        attends: one flag for every block.
        resample: "down", "up" or None.
        blocks: makes the blocks.
    """

    channels: int
    attends: tuple[bool, ...]
    resample: str | None
    head_dim: int
    temporal_conv: bool
    blocks: Blocks

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t h w c"],
        embedding: Float[Array, "b t e"],
        skips: Sequence[Float[Array, "b t h w _"]] = (),
        *,
        context: Float[Array, "b n d"] | None,
        train: bool,
    ) -> tuple[Float[Array, "b t h2 w2 c2"], list[Array]]:
        """Runs the level; `skips` (one for every block, or none) are concatenated behind x.

        Returns the result and the outputs of all its parts, which the way up takes as skips.
        """
        heads = {"heads": self.channels // self.head_dim, "head_dim": self.head_dim}
        if self.channels % self.head_dim:
            raise ValueError(
                f"{self.channels} channels do not split into heads of {self.head_dim}."
            )
        make, outputs = self.blocks, []
        for j, attend in enumerate(self.attends):
            if skips:
                x = jnp.concatenate([x, skips[j]], axis=-1)
            x = make.residual(self.channels, f"residual_{j}")(x, embedding, train)
            if self.temporal_conv:
                x = make.temporal_conv(f"temporal_conv_{j}")(x, train)
            if attend:
                x = make.spatial(**heads, name=f"spatial_{j}")(x, context)
                x = make.mixer(**heads, name=f"temporal_{j}")(x)
            outputs.append(x)
        if self.resample is not None:
            resampler = {"down": Downsample, "up": Upsample}[self.resample]
            x = resampler(dtype=make.dtype, name=self.resample)(x)
            outputs.append(x)
        return x, outputs
