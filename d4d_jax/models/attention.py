"""Scaled dot-product attention by the implementation that suits the device, or by name."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "chunked")

#: Scores that "chunked" has in memory at a time, at least those of one query: on a CPU as many as
#: its cache holds, elsewhere 256 MB of float32.
CPU_CHUNK = 2**18
CHUNK = 2**26

#: Scores of one sequence from which on "chunked" is the faster on a CPU.
_CPU_SCORES = 2**14

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
            `jax.nn.dot_product_attention`; "chunked" is for as many queries at a time as have
            `CHUNK` scores (`CPU_CHUNK`), which are computed again in the backward pass, so that
            the scores of large frames or long clips never exist as a whole; "auto" is "cudnn"
            where JAX's default device can do it, "chunked" for long sequences on a CPU, and else
            "xla". "cudnn" and "chunked" have no forward-mode derivative.

    Raises:
        ValueError: another name.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is one of {IMPLEMENTATIONS}, not {implementation!r}.")
    if implementation == "auto":
        implementation = _suited(query, key)
    if implementation == "chunked":
        return _by_sequence(query, key, value)
    kernel = "cudnn" if implementation == "cudnn" else "xla"
    return jax.nn.dot_product_attention(query, key, value, implementation=kernel)


def _suited(query: Array, key: Array) -> str:
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "chunked" if query.shape[1] * key.shape[1] >= _CPU_SCORES else "xla"
    half, channels = query.dtype in (jnp.bfloat16, jnp.float16), query.shape[-1]
    if not half or channels > _FLASH_CHANNELS or channels % 8:
        return "xla"
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind:
        return "xla"
    return "cudnn" if float(device.compute_capability) >= _FLASH_CAPABILITY else "xla"


def _by_sequence(query: Array, key: Array, value: Array) -> Array:
    """`_chunked` for every head of every sequence."""
    n, length, heads, channels = query.shape

    def split(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(n * heads, -1, channels)

    mixed = _chunked(split(query), split(key), split(value))
    return mixed.reshape(n, heads, length, channels).swapaxes(1, 2)


@jax.custom_vjp
def _chunked(
    query: Float[Array, "s q d"], key: Float[Array, "s k d"], value: Float[Array, "s k d"]
) -> Float[Array, "s q d"]:
    """Attention of some sequences and some of their queries at a time.

    The backward pass keeps one number per query, the logarithm of the sum of its exponentials
    (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
    """
    return _forward(query, key, value)[0]


def _forward(query: Array, key: Array, value: Array) -> tuple[Array, tuple[Array, ...]]:
    chunks, scale = _Chunks(query, key), query.shape[-1] ** -0.5

    def rows(key: Array, value: Array, query: Array) -> tuple[Array, Array]:
        scores = _product("sqd,skd->sqk", query, key)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scale * (scores - top))  # scaled in the same pass as the exponential
        total = weights.sum(-1, keepdims=True)
        mixed = _product("sqk,skd->sqd", weights.astype(value.dtype), value) / total
        return mixed.astype(query.dtype), (scale * top + jnp.log(total))[..., 0]

    def sequences(given: tuple[Array, ...]) -> tuple[Array, Array]:
        key, value, queries = given
        return jax.lax.map(lambda query: rows(key, value, query), queries)

    folded = chunks.fold(key), chunks.fold(value), chunks.fold_queries(query)
    mixed, logsumexp = map(chunks.unfold_queries, jax.lax.map(sequences, folded))
    return mixed, (query, key, value, mixed, logsumexp)


def _backward(saved: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    query, key, value, mixed, logsumexp = saved
    chunks, scale = _Chunks(query, key), query.shape[-1] ** -0.5
    dots = jnp.sum(cotangent.astype(jnp.float32) * mixed, -1)

    def columns(
        key: Array, value: Array, key_rows: Array, part: tuple[Array, ...]
    ) -> tuple[Array, ...]:
        # Keys come first in all large matrices: no product then needs one of them transposed.
        query, logsumexp, cotangent, dots = part
        weights = jnp.exp(scale * _product("skd,sqd->skq", key, query) - logsumexp[:, None])
        slopes = weights * (_product("skd,sqd->skq", value, cotangent) - dots[:, None])
        slopes = (scale * slopes).astype(key.dtype)
        return (
            _product("skq,sqd->skd", slopes, query),
            _product("skq,sqd->skd", weights.astype(key.dtype), cotangent),
            _product("sdk,skq->sdq", key_rows, slopes).astype(query.dtype),
        )

    def sequences(given: tuple[Array, ...]) -> tuple[Array, ...]:
        key, value, *queries = given
        key_rows = key.mT

        def add(sums: tuple[Array, Array], part: tuple[Array, ...]):
            *new, d_query = columns(key, value, key_rows, part)
            return (sums[0] + new[0], sums[1] + new[1]), d_query

        zero = jnp.zeros(key.shape, jnp.float32)
        (d_key, d_value), d_query = jax.lax.scan(add, (zero, zero), tuple(queries))
        return d_query, d_key.astype(key.dtype), d_value.astype(value.dtype)

    parts = map(chunks.fold_queries, (query, logsumexp, cotangent, dots))
    d_query, *others = jax.lax.map(sequences, (chunks.fold(key), chunks.fold(value), *parts))
    return chunks.unfold_queries(d_query.mT), *map(chunks.unfold, others)


_chunked.defvjp(_forward, _backward)


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


class _Chunks:
    """How sequences and their queries are cut, all pieces alike with the least padding.

    Padded queries have no part in a gradient: their cotangents are zeros.
    """

    def __init__(self, query: Array, key: Array):
        (self.sequences, self.queries), keys = query.shape[:2], key.shape[1]
        # Off a CPU all sequences are kept together, for a device has many units and the batch may
        # be spread over many devices.
        on_cpu = jax.default_backend() == "cpu"
        most = CPU_CHUNK if on_cpu else CHUNK // self.sequences
        self.rows = _even(self.queries, most // keys)
        together = CPU_CHUNK // (self.rows * keys) if on_cpu else self.sequences
        self.group = _even(self.sequences, together)

    def fold(self, x: Array) -> Array:
        """(s ...) -> (group, s in the group, ...)"""
        x = _padded(x, 0, self.group)
        return x.reshape(-1, self.group, *x.shape[1:])

    def unfold(self, x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[: self.sequences]

    def fold_queries(self, x: Array) -> Array:
        """(s q ...) -> (group, chunk, s in the group, q in the chunk, ...)"""
        x = _padded(self.fold(x), 2, self.rows)
        x = x.reshape(*x.shape[:2], -1, self.rows, *x.shape[3:])
        return x.swapaxes(1, 2)

    def unfold_queries(self, x: Array) -> Array:
        x = x.swapaxes(1, 2)
        x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
        return self.unfold(x[:, :, : self.queries])


def _even(count: int, most: int) -> int:
    """Size of the least number of pieces of `count` that have no more than `most`, or one."""
    return -(-count // -(-count // max(1, most)))


def _padded(x: Array, axis: int, multiple: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)
