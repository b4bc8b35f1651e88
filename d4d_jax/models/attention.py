"""Scaled dot-product attention by the implementation that suits the device, or by name."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "chunked")

#: Scores that "chunked" has in memory at a time, at least those of one query: 256 MB of float32.
CHUNK = 2**26

#: What the flash kernel of cuDNN needs: NVIDIA's Ampere or later, and heads no wider than this.
_FLASH_CAPABILITY = 8.0
_FLASH_CHANNELS = 128


def attend(
    query: Float[Array, "n q h d"],
    key: Float[Array, "n k h d"],
    value: Float[Array, "n k h d"],
    implementation: str = "auto",
) -> Float[Array, "n q h d"]:
    """Softmax(Q K^T / sqrt(d)) V for every head, with the softmax in float32.

    Args:
        query, key, value: `n` independent sequences with `h` heads.
        implementation: "xla" and "cudnn" (a flash kernel: half precision, heads of at most 128
            channels in steps of 8, NVIDIA's Ampere or later) are those of
            `jax.nn.dot_product_attention`; "chunked" is "xla" for as many queries at a time as
            have `CHUNK` scores, which are computed again in the backward pass, so that the scores
            of large frames or long clips never exist as a whole; "auto" is "cudnn" where JAX's
            default device can do it, and else "xla".

    Raises:
        ValueError: another name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is one of {IMPLEMENTATIONS}, not {implementation!r}.")
    if implementation == "chunked":
        return _chunked(query, key, value)
    if implementation == "auto":
        implementation = "cudnn" if _flash_fits(query) else "xla"
    return jax.nn.dot_product_attention(query, key, value, implementation=implementation)


def _flash_fits(query: Array) -> bool:
    half, channels = query.dtype in (jnp.bfloat16, jnp.float16), query.shape[-1]
    if not half or channels > _FLASH_CHANNELS or channels % 8:
        return False
    device = jax.devices()[0]
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return False
    return float(device.compute_capability) >= _FLASH_CAPABILITY


def _chunked(query: Array, key: Array, value: Array) -> Array:
    n, length, heads, channels = query.shape
    most = max(1, CHUNK // (n * heads * key.shape[1]))
    chunks = -(-length // most)
    size = -(-length // chunks)  # all chunks alike, with the least padding
    padding = ((0, 0), (0, chunks * size - length), (0, 0), (0, 0))
    parts = jnp.pad(query, padding).reshape(n, chunks, size, heads, channels).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(part: Array) -> Array:
        return jax.nn.dot_product_attention(part, key, value, implementation="xla")

    mixed = jax.lax.map(one, parts).swapaxes(0, 1)
    return mixed.reshape(n, chunks * size, heads, channels)[:, :length]
