"""Array aliases and the Protocols of what people swap.

Axes: `b` clips, `t` frames, `h` and `w` pixels (or latent cells), `c` channels. Images that a
network sees are in [-1, 1]; frames of a clip and rendered images are in [0, 1].
"""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from jax import Array
from jaxtyping import Float

AnyArray: TypeAlias = Array | np.ndarray
PyTree: TypeAlias = Any

Image: TypeAlias = Float[AnyArray, "h w c"]
Frames: TypeAlias = Float[AnyArray, "t h w c"]
Alpha: TypeAlias = Float[AnyArray, "t h w"]


@runtime_checkable
class DenoiseFn(Protocol):
    """A denoising network with its parameters bound: all that a sampler or a guidance sees.

    `x_t (b t h w c)` are noisy latents, `timestep (b,)` integers with 0 at the data end, and
    `conditioning` whatever the network understands (`d4d_jax.models.conditioning.Conditioning`
    for ours). Returns the prediction, shaped like `x_t`, in the schedule's parametrisation.
    """

    def __call__(self, x_t: Array, timestep: Array, conditioning: Any, /) -> Array: ...


@runtime_checkable
class Guidance(Protocol):
    """Turns a DenoiseFn into a guided DenoiseFn."""

    def __call__(self, denoise: DenoiseFn, /) -> DenoiseFn: ...


@runtime_checkable
class Codec(Protocol):
    """Maps images in [-1, 1] to latents and back; `params` is a pytree of arrays."""

    def encode(self, params: PyTree, images: Array, /) -> Array: ...

    def decode(self, params: PyTree, latents: Array, /) -> Array: ...


@runtime_checkable
class MetricWriter(Protocol):
    """Receives what training reports; signatures as in clu.metric_writers.

    Images are (h, w, 3) and videos (t, h, w, 3), in [0, 1].
    """

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None: ...

    def write_images(self, step: int, images: Mapping[str, Any]) -> None: ...

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...
