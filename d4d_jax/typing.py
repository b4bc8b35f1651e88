"""Array aliases and the Protocols of what people swap.

Axes: `b` clips, `t` frames, `h` and `w` pixels (or latent cells), `c` channels. Images that a
network sees are in [-1, 1]; frames of a clip and rendered images are in [0, 1].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

AnyArray: TypeAlias = Array | np.ndarray
PyTree: TypeAlias = Any

Image: TypeAlias = Float[AnyArray, "h w c"]
Frames: TypeAlias = Float[AnyArray, "t h w c"]
Alpha: TypeAlias = Float[AnyArray, "t h w"]
Video: TypeAlias = Float[Array, "b t h w c"]
Timestep: TypeAlias = Int[Array, "b"]
Pose: TypeAlias = Float[AnyArray, "*b 4 4"]
Motion: TypeAlias = Float[Array, "b"]


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
    """Receives scalars and images during training; signatures as in clu.metric_writers."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None: ...

    def write_images(self, step: int, images: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


Class = TypeVar("Class", bound=type)


def pytree_dataclass(cls: Class) -> Class:
    """Registers a frozen dataclass as a pytree; fields of metadata {"static": True} are not leaves.

    Unlike `jax.tree_util.register_dataclass`, rebuilding the pytree skips `__init__`, so a tree of
    specs, axes or None with the same structure passes even where field types are checked.
    """
    fields = dataclasses.fields(cls)
    leaves = [f.name for f in fields if not f.metadata.get("static", False)]
    static = [f.name for f in fields if f.metadata.get("static", False)]

    def flatten_with_keys(value):
        keyed = [(jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in leaves]
        return keyed, tuple(getattr(value, name) for name in static)

    def flatten(value):
        return [getattr(value, name) for name in leaves], tuple(getattr(value, n) for n in static)

    def unflatten(metadata, children):
        value = object.__new__(cls)
        for name, child in zip((*static, *leaves), (*metadata, *children), strict=True):
            object.__setattr__(value, name, child)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
