"""Attention by every implementation that runs here, and which one is chosen where."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.models import attention


def tensors(queries, keys, sequences=2, heads=3, channels=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(sequences, n, heads, channels) for n in (queries, keys, keys)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def test_xla_is_the_definition():
    query, key, value = (np.asarray(x, np.float64) for x in tensors(7, 5))
    scores = np.einsum("nqhd,nkhd->nhqk", query, key) / np.sqrt(8)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("nhqk,nkhd->nqhd", weights, value)
    np.testing.assert_allclose(attention.attend(*tensors(7, 5), "xla"), expected, atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize("most", [1, 10, 36, 37, 4 * 37])
def test_chunked_gives_the_same_numbers_and_gradients(monkeypatch, platform, most):
    """Queries one by one, in four chunks with the last one padded, in two, and in one.

    Where a CPU has room for all queries, it takes several of the six sequences.
    """

    def run(implementation):
        def total(*given):
            attended = attention.attend(*given, implementation)
            return jnp.sum(jnp.sin(attended)), attended

        gradient = jax.grad(total, argnums=(0, 1, 2), has_aux=True)
        return gradient(*tensors(37, 11))  # and what is attended, entry by entry

    expected = run("xla")
    monkeypatch.setattr(attention, "CHUNK", most * 2 * 3 * 11)
    monkeypatch.setattr(attention, "CPU_CHUNK", most * 11)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    jax.tree.map(
        lambda found, wanted: np.testing.assert_allclose(found, wanted, atol=1e-5),
        run("chunked"),
        expected,
    )


def test_chunks_hold_one_query_even_where_its_scores_are_too_many(monkeypatch):
    monkeypatch.setattr(attention, "CPU_CHUNK", 1)
    given = tensors(3, 4)
    expected = attention.attend(*given, "xla")
    np.testing.assert_allclose(attention.attend(*given, "chunked"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("sequences", "length"), [(1, 2048), (64, 256)], ids=["large frames", "long clips"]
)
@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_chunked_takes_less_memory_and_is_what_a_cpu_has(sequences, length, gradient):
    shape = jax.ShapeDtypeStruct((sequences, length, 1, 8), jnp.float32)

    def temporaries(implementation):
        def total(q):
            return jnp.sum(jnp.sin(attention.attend(q, q, q, implementation)))

        compiled = jax.jit(jax.grad(total) if gradient else total).lower(shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries("auto") == temporaries("chunked") < 0.4 * temporaries("xla")


def test_half_precision_has_a_softmax_in_float32():
    """Scores of a few hundred: as bfloat16 they would be off by up to one."""
    query, key, value = (12 * x for x in tensors(6, 40, dtype=jnp.bfloat16))
    expected = attention.attend(*(x.astype(jnp.float32) for x in (query, key, value)), "xla")
    for implementation in ("xla", "chunked"):
        found = attention.attend(query, key, value, implementation)
        assert found.dtype == jnp.bfloat16
        error = jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
        assert error < 0.003


#: Platform, kind and capability of a device; of the queries: type, channels and length.
CHOICES = [
    ("gpu", "NVIDIA H100", "9.0", jnp.bfloat16, 64, 24, "cudnn"),
    ("gpu", "NVIDIA A100", "8.0", jnp.float16, 128, 77, "cudnn"),
    ("gpu", "NVIDIA A100", "8.0", jnp.float32, 64, 24, "xla"),
    ("gpu", "NVIDIA A100", "8.0", jnp.bfloat16, 136, 24, "xla"),
    ("gpu", "NVIDIA A100", "8.0", jnp.bfloat16, 28, 24, "xla"),
    ("gpu", "Tesla T4 of NVIDIA", "7.5", jnp.float16, 64, 24, "xla"),
    ("gpu", "AMD Instinct MI300X", "gfx942", jnp.bfloat16, 64, 24, "xla"),
    ("tpu", "TPU v5", "", jnp.bfloat16, 64, 24, "xla"),
    ("cpu", "cpu", "", jnp.bfloat16, 64, 24, "xla"),
]


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "dtype", "channels", "length", "expected"), CHOICES
)
def test_auto_is_flash_where_the_device_can_do_it(
    monkeypatch, platform, kind, capability, dtype, channels, length, expected
):
    device = types.SimpleNamespace(
        platform=platform, device_kind=kind, compute_capability=capability
    )
    given = tensors(length, 77, channels=channels, dtype=dtype)
    chosen = []

    def record(query, key, value, implementation):
        chosen.append(implementation)
        return query

    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    attention.attend(*given)
    assert chosen == [expected]


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"attention is one of .* not 'flash'"):
        attention.attend(*tensors(3, 3), "flash")
