"""The networks and memory suites of `benchmark`, on networks of a few thousand parameters."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from binaries import run_binary

from d4d_jax.models.unet import SpatioTemporalUNet
from experiments.benchmarks import denoisers, memory, networks
from experiments.benchmarks.denoisers import REDUCED, Candidate, Shape

SHAPE = Shape(2, 4)
FIELDS = {
    "width": 8,
    "multipliers": (1,),
    "blocks": 1,
    "attention_levels": (),
    "head_dim": 8,
    "init_heads": 0,
    "context_dim": 0,
    "groups": 4,
    "temporal_conv": False,
    "motion_embedding": False,
    "dropout": 0.0,
}


def parameters(fields):
    shapes = denoisers.abstract_params(SpatioTemporalUNet(**fields), Shape(2, 8))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def test_the_reduced_network_is_the_one_of_the_published_timings():
    assert parameters(REDUCED) == 7_058_148


@pytest.mark.live
def test_the_peer_has_the_same_parameters_and_runs_every_pass():
    fields = FIELDS | {"context_dim": 16, "temporal_conv": True, "camera_embedding": False}
    fields |= {"init_heads": 8, "init_head_dim": 8}
    model = denoisers.torch_model(fields)
    assert sum(weight.numel() for weight in model.parameters()) == parameters(fields)
    peer = denoisers.diffusers(fields, Shape(2, 8), denoisers.PASSES, steps=2)
    assert peer.calls["forward"]().shape == peer.calls["sample"]()[:1].shape == (1, 4, 2, 8, 8)
    assert len(peer.calls["forward_backward"]()) == len(list(model.parameters()))
    assert peer.compile_s == {} and {*peer.peak_mb.values()} == {None}
    peer.calls["step"]()


@pytest.fixture(scope="module")
def prepared():
    return denoisers.ours(FIELDS, SHAPE, denoisers.PASSES, steps=2)


def test_every_pass_runs_and_is_sized(prepared):
    assert [*prepared.calls] == [*prepared.compile_s] == [*prepared.peak_mb] == [*denoisers.PASSES]
    assert all(seconds > 0 for seconds in prepared.compile_s.values())
    count = parameters(FIELDS)
    # The gradient has parameters and results, a step parameters, average and two moments.
    assert prepared.peak_mb["forward"] > 4e-6 * count
    assert prepared.peak_mb["forward_backward"] > 8e-6 * count
    assert prepared.peak_mb["step"] > 20e-6 * count
    latents = prepared.calls["forward"]()
    assert latents.shape == prepared.calls["sample"]().shape == (1, *SHAPE, SHAPE.latents, 4)


def test_a_step_goes_on_from_the_state_it_left(prepared):
    first, second = (prepared.calls["step"]() for _ in range(2))
    assert jnp.isfinite(second["loss"]) and second["loss"] != first["loss"]


def test_half_precision_is_what_is_computed_in(prepared):
    half = denoisers.ours(FIELDS, SHAPE, ["forward"], half=True).calls["forward"]()
    whole = prepared.calls["forward"]()
    assert 1e-4 < jnp.abs(half - whole).max() < 0.1 * jnp.abs(whole).max()


def fake(ms, *, fails=None):
    def make(fields, shape, names, **options):
        if fails:
            raise fails
        return Candidate({name: lambda: ms for name in names}, {}, {})

    return make


@pytest.fixture
def fakes(monkeypatch):
    makers = {
        "d4d_jax": fake(2.0),
        "diffusers": fake(6.0),
        "broken": fake(0.0, fails=RuntimeError("no\n compiler")),
    }
    monkeypatch.setattr(networks, "IMPLEMENTATIONS", makers)
    monkeypatch.setattr(
        networks.measure,
        "rounds",
        lambda calls, **_: {key: [call(), 2 * call()] for key, call in calls.items()},
    )


def test_ratios_are_to_the_baseline_of_the_same_round(fakes):
    rows = networks.compare(["d4d_jax", "diffusers"], {}, SHAPE, repeats=2, seconds=0)
    assert [row["times_faster"] for row in rows] == 2 * [[3.0] * 3] + 2 * [[1.0] * 3]
    assert rows[0]["ms"] == [2.5, 3.0, 3.5]
    (row,) = networks.compare(["d4d_jax"], {}, SHAPE, ["forward"], repeats=2, seconds=0)
    assert row["times_faster"] is None and row["note"] is None


def test_a_peer_that_does_not_run_is_a_note(fakes, monkeypatch):
    rows = networks.reduced(["d4d_jax", "broken"], [SHAPE], fields={}, repeats=1, seconds=0)
    assert [row["ms"] is None for row in rows] == [False, False, True, True]
    assert networks.notes(rows)[-1] == "`broken` did not run at 2 x 4²: RuntimeError: no compiler."
    assert "| `broken` | - | - | - | - |" in networks.tables(rows)
    monkeypatch.setitem(networks.IMPLEMENTATIONS, "d4d_jax", fake(0, fails=ValueError("ours")))
    with pytest.raises(ValueError, match="There is no network 'torch'; known: 'd4d_jax', 'diff"):
        networks.check_names(["torch"])
    with pytest.raises(ValueError, match="ours"):
        networks.compare(["d4d_jax"], {}, SHAPE, repeats=1, seconds=0)


def test_full_rows_count_the_floating_point_operations(fakes, monkeypatch):
    """A forward pass of 7.336 TFLOP in 9 ms is 815 TFLOP/s; a sample is 150 of them."""
    monkeypatch.setattr(networks.jax, "default_backend", lambda: "gpu")
    monkeypatch.setitem(networks.IMPLEMENTATIONS, "d4d_jax", fake(6.0))
    run = functools.partial(networks.full, ["d4d_jax"], fields={}, repeats=2, seconds=0)
    rows = run(peak_tflops=1000.0)
    assert [row["tflops"] for row in rows] == pytest.approx([815.1, 2445.3, 122266.7], rel=1e-3)
    assert rows[0]["mfu"] == pytest.approx(0.815, abs=1e-3)
    assert "| 815 | 82 % |" in networks.tables(rows)
    assert run(shape=SHAPE)[0]["tflops"] is None  # FLOPs are known for one shape only
    assert networks._peak_tflops("NVIDIA H100 PCIe") == 756
    assert networks._peak_tflops("cpu") is None


def test_nothing_is_measured_at_full_size_on_a_cpu():
    rows = networks.full(["d4d_jax"], fields={}, repeats=1, seconds=0)
    assert {row["note"] for row in rows} == {"not measured"} and len(rows) == 3
    assert networks.tables(rows).count("not measured") == 3
    assert all(row["ms"] is None and row["mfu"] is None for row in rows)


def test_the_cache_is_filled_cold_and_read_warm():
    cold, warm = networks.compilation("net", FIELDS, SHAPE, half=False)
    assert (cold["cache"], warm["cache"]) == ("cold", "warm")
    assert cold["cache_mb"] == warm["cache_mb"] > 0
    assert warm["compile_s"] < cold["compile_s"]
    assert "| `net` | 2 x 4² | float32 | warm |" in networks.tables([cold, warm])


def test_memory_is_that_of_the_compiled_program():
    row = memory.analyse(FIELDS, SHAPE, "forward")
    network = SpatioTemporalUNet(**FIELDS)
    inputs = denoisers.example(network, SHAPE)
    used = inputs.x_t, inputs.timestep, inputs.conditioning.camera
    given = sum(4 * math.prod(x.shape) for x in used) + 4 * row["parameters"]
    assert row["parameters"] == parameters(FIELDS)
    assert given <= row["arguments_mb"] * 1e6 < 1.1 * given  # every one is padded
    assert row["program_mb"] > row["arguments_mb"] + row["temporaries_mb"]


def test_a_larger_clip_has_larger_activations_and_the_same_parameters():
    small, large = (memory.analyse(FIELDS, Shape(2, n), "forward") for n in (4, 16))
    assert small["parameters"] == large["parameters"]
    assert large["temporaries_mb"] > 8 * small["temporaries_mb"]


def test_recomputing_blocks_saves_less_for_the_backward_pass():
    def saved(n, **fields):
        network = SpatioTemporalUNet(**FIELDS | fields)
        shape = Shape(2, n)
        params = denoisers.abstract_params(network, shape)
        return memory.saved_mb(network, params, denoisers.example(network, shape))

    none, dots, blocks = (saved(16, remat=each) for each in ("none", "dots", "blocks"))
    assert 2 * blocks < dots < none
    assert saved(16) > 3.5 * saved(8) > 0  # activations alone: parameters are not counted


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite=memory", "--variants=huge"], "Unknown network variant 'huge'; known: tiny"),
        (["--suite=networks", "--sizes=64"], "--sizes has no part in --suite=networks"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments, words, tmp_path):
    file = tmp_path / "rows.json"
    result = run_binary("benchmark", f"--json={file}", *arguments)
    assert result.returncode == 1 and words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not file.exists()


def test_the_binary_writes_rows_and_a_table(tmp_path):
    result = run_binary(
        "benchmark",
        *("--suite=memory", f"--json={tmp_path / 'rows.json'}", "--variants=tiny", "--frames=2"),
        *("--latents=4", "--dtypes=bfloat16", "--passes=forward"),
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["variant"], row["dtype"], row["remat"]) == ("tiny", "bfloat16", "none")
    assert row["platform"] == "cpu" and np.isfinite(row["temporaries_mb"])
    assert memory.table([row]) in result.stdout and "Compiled for the CPU" in result.stdout
    assert "jax" in result.stdout.splitlines()[0]
