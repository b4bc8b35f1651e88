"""The reconstruction suite of `benchmark`: its parts make up the step, its steps make up a run."""

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from binaries import run_binary

from d4d_jax import cameras, metrics, pytree
from d4d_jax.data import synthetic
from experiments.benchmarks import reconstruction, scenes
from experiments.benchmarks.measure import Spread
from experiments.benchmarks.step_parts import PARTS, take_apart
from gaussians import preparation
from gaussians import reconstruct as library
from gaussians.captures import Views, of_clip
from gaussians.deformation import build
from gaussians.densify import AdaptiveDensity, MCMCDensity
from gaussians.losses import LossWeights
from gaussians.optimization import (
    LearningRates,
    StepReport,
    StepSettings,
    create_state,
    step,
)
from gaussians.reconstruct import ReconstructConfig, reconstruct
from gaussians.stages import Stage
from gaussians.tracking import Tracking

SIZE, N = 24, 60
SIZES = {"spatial_resolution": 4, "time_resolution": 3, "multires": (1,), "channels": 4, "width": 8}
LIFESPAN = {"name": "lifespan", "base": {"name": "hexplane", **SIZES}, "knots": 3}
SETTINGS = StepSettings(
    deformation=None,
    weights=LossWeights(),
    rates=LearningRates(),
    density=AdaptiveDensity(),
    background=(1.0, 1.0, 1.0),
    pairs=4096,
)


@pytest.fixture(scope="module")
def views():
    rng = np.random.default_rng(0)
    frames = Views(
        rgb=rng.uniform(size=(3, SIZE, SIZE, 3)).astype(np.float32),
        alpha=rng.uniform(size=(3, SIZE, SIZE)).astype(np.float32),
        camera=cameras.orbit(3, width=SIZE, height=SIZE),
        timestamps=np.linspace(0, 1, 3, dtype=np.float32),
    )
    return jax.tree.map(jnp.asarray, frames)


def make_state(settings):
    """A state whose field does something, with a few unused slots."""
    splats = scenes.ball("object", N, SIZE).splats
    splats = dataclasses.replace(splats, active=jnp.arange(N) % 9 != 8)
    key, params = jax.random.key(1), {}
    if settings.deformation is not None:
        params = settings.deformation.init(key, splats)
        leaves, structure = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        noisy = [
            x + 0.05 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
        ]
        params = jax.tree.unflatten(structure, noisy)
    return create_state(splats, params, settings.rates)


def assert_alike(tree, expected, tolerance=1e-4):
    """Leaf by leaf, to a fraction of the largest number of the leaf."""
    for (path, leaf), (_, other) in zip(
        *(jax.tree_util.tree_leaves_with_path(t) for t in (tree, expected)), strict=True
    ):
        atol = tolerance * np.abs(np.asarray(other, float)).max() if leaf.size else 0
        np.testing.assert_allclose(leaf, other, atol=atol, rtol=0, err_msg=str(path))


@pytest.mark.parametrize(
    "changes",
    [
        {"deformation": build(LIFESPAN), "density": AdaptiveDensity(absolute=True)},
        {
            "density": MCMCDensity(
                opacity_weight=0.1, scale_weight=0.1, noise_scale=1e5, noise_opacity=0.9
            ),
            "weights": LossWeights(dssim=0.0, depth=0.5),
        },
    ],
    ids=["lifespan", "mcmc_at_rest"],
)
def test_the_parts_together_are_the_step(views, changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    rate, key = jnp.float32(0.7), jax.random.key(3)
    parts = take_apart(make_state(settings), views, 1, rate, key, settings)
    before = make_state(settings)
    given = jax.tree.map(jnp.array, before), views, jnp.array([1]), rate, key
    after, report = step(*given, settings=settings)
    assert list(parts.calls) == [*PARTS[settings.deformation is None :]]
    assert parts.overflow == 0 and parts.loss == pytest.approx(float(report.loss), rel=1e-5)
    assert_alike(parts.state.optimizer, after.optimizer)
    assert_alike(parts.state.statistics, after.statistics)
    # Adam's first step has the size of the rate even where a gradient is rounding error.
    for new, other, old in zip(
        *(jax.tree.leaves(s.params) for s in (parts.state, after, before)), strict=True
    ):
        moved = np.abs(other - old).max()
        assert np.mean(np.abs(new - other) <= 1e-3 * moved) > 0.98
    assert np.abs(after.params["splats"]["means"] - before.params["splats"]["means"]).max() > 0


def test_a_view_that_does_not_fit_is_given_more_pairs(views):
    state = make_state(SETTINGS)
    run = reconstruction.ShortRun(state.splats, state.params["deformation"], None, None)
    plain = LossWeights(dssim=0.0)
    small = dataclasses.replace(SETTINGS, pairs=16, weights=plain, implementation="tiled")
    arguments = make_state(SETTINGS), views, 0, jnp.zeros(()), jax.random.key(0)
    assert take_apart(*arguments, small).overflow > 0
    prepared = reconstruction.prepare(reconstruction.Program(small, 1.0), run, views, 0)
    assert prepared.calls["step"]().overflow == 0
    assert prepared.size == SIZE and prepared.compile_s > 0 and prepared.program_mb > 0
    for name in ("step", "optimizer"):  # at rate 0 nothing moves, however often they are called
        for _ in range(2):
            prepared.calls[name]()
        assert_alike(prepared.calls[name].state.params, state.params, 0)
        assert prepared.calls[name].state.statistics.visits.max() > 1


@pytest.mark.parametrize("kind", ["static", "moving alone", "tracked"])
def test_the_programs_are_those_of_a_run(kind, monkeypatch):
    clip = synthetic.make_clip(0, num_frames=4, size=16)
    static, tracked = kind != "moving alone", kind == "tracked"
    if not static:
        clip = dataclasses.replace(clip, static=None, static_alpha=None)
    field: dict = LIFESPAN
    if tracked:
        clip = dataclasses.replace(
            clip, dynamic=np.concatenate([clip.dynamic[:3], clip.static[3:]])
        )
        field = {"name": "control_points", "num_nodes": 6, "neighbours": 2, "graph_neighbours": 3}
    config = ReconstructConfig(
        num_splats=20,
        capacity=20,
        sh_degree=1,
        sh_interval=9,
        deformation=field,
        tracking=Tracking(steps=5, neighbours=3),
        warmup=Stage(4, static_fraction=1.0, low_steps=3),
        coarse=Stage(5, low_steps=9, curriculum=0.5, rates=LearningRates(means=1e-3)),
        fine=Stage(6, low_steps=2, weights=LossWeights(depth=0.1)),
        density=MCMCDensity(start=100),
        implementation="tiled",
    )
    taken = collections.Counter()

    def record(state, views, indices, rate, key, perceptual, *, settings):
        assert indices.shape == (1,)
        taken[settings, views.camera.width] += 1
        zero = jnp.zeros(())
        return state, StepReport(zero, zero + 1, jnp.zeros((), int), jnp.zeros((1, 20)))

    monkeypatch.setattr(library, "step", record)
    reconstruct(clip, config, jax.random.key(0))
    ((_, some), *_) = ((settings.pairs, settings) for settings, _ in taken)
    capture = of_clip(clip, preparation.find_static_time(clip))
    steps = reconstruction.programs(config, capture, some.pairs)
    assert {(p.settings, round(16 * p.scale)): n.total() for p, n in steps.items()} == taken
    stages = sum(steps.values(), collections.Counter())
    expected = {"warmup": 4 * static, "coarse": 5 * (not tracked), "fine": 6}
    assert stages == {name: steps for name, steps in expected.items() if steps}

    many = dataclasses.replace(config, fine=Stage(1, views=2))
    with pytest.raises(ValueError, match=r"fine\.views is 2"):
        reconstruction.programs(many, capture, 256)


def make_candidate():
    """Two programs, 10 and 30 steps, of which nothing is ever called."""
    splats = scenes.ball("object", N, SIZE).splats
    config = reconstruction.to_configuration("smoke,mcmc", "tiled")
    density = MCMCDensity(start=0, stop=40, every=10)
    config = dataclasses.replace(config, density=density, coarse=Stage(10))
    programs = [reconstruction.Program(SETTINGS, scale) for scale in (0.5, 1.0)]
    calls = dict.fromkeys(("step", "rasterizer", "optimizer"))
    return reconstruction._Candidate(
        words="",
        config=config,
        run=reconstruction.ShortRun(splats, {}, 512.0, None),
        steps={
            programs[0]: collections.Counter(coarse=10),
            programs[1]: collections.Counter(coarse=5, fine=25),
        },
        prepared={
            programs[0]: reconstruction.Prepared(calls, 12, 2.0, 1.5),
            programs[1]: reconstruction.Prepared(calls | {"stlpips": None}, 24, 3.0, None),
        },
        refinement=lambda: None,
        tracked=reconstruction.Tracked(Spread(8.0, 10.0, 12.0), steps=200, first_s=0.5),
    )


def test_a_row_adds_up():
    candidate = make_candidate()
    low, full = candidate.prepared
    samples = {(None, "refinement"): [50.0, 70.0, 60.0]}
    samples |= {(low, "step"): [10.0, 20.0, 30.0], (low, "rasterizer"): [4.0, 5.0, 21.0]}
    samples |= {(low, "optimizer"): [1.0, 1.0, 1.0], (full, "step"): [100.0] * 3}
    samples |= {(full, name): [1.0, 2.0, 3.0] for name in ("rasterizer", "optimizer", "stlpips")}
    row = reconstruction._row(candidate, samples)
    first, second = row["programs"]
    assert first["ms"]["step"] == [15.0, 20.0, 25.0]
    assert first["ms"]["rest"] == [6.5, 8.0, 11.0]  # of 5, 14 and 8, round by round
    assert second["ms"]["rest"][1] == 96.0  # LPIPS is no part of the step
    assert (first["steps"], first["size"], first["program_mb"]) == ({"coarse": 10}, 12, 1.5)
    assert row["steps"] == {"coarse": 15, "fine": 25} and row["size"] == 24
    assert row["refinements"] == 3  # after steps 10, 20 and 30
    assert (row["tracking_steps"], row["tracking_ms"]) == (200, [8.0, 10.0, 12.0])
    compiling, stepping, refining = 2.0 + 3.0, 10 * 0.020 + 30 * 0.100, 3 * 0.060
    tracking = 0.5 + 200 * 0.010
    assert row["estimate_s"] == pytest.approx(compiling + stepping + refining + tracking)
    json.dumps(row, allow_nan=False)

    text = reconstruction.tables([row])
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if "`tiled`" in line]
    assert lines[0][:5] == ["default", "`tiled`", "coarse", "12²", "20.0 [15.0, 25.0]"]
    assert lines[0][5:8] == ["-", "5.00 [4.50, 13.0]", "-"]
    assert lines[1][2:4] == ["coarse, fine", "24²"] and lines[1][-2:] == ["3.00", "-"]
    assert lines[2][2:5] == ["24²", f"{N} of 250", "60.0 [55.0, 65.0]"]
    assert lines[2][5:] == ["10.0 [8.00, 12.0]", "512", "-", "240", "10.9"]
    assert "2.00 [1.50, 2.50] ms at 24²" in reconstruction.notes([row])[-1]


@pytree.dataclass
class Distance:
    """Stands in for a perceptual network that wants 16 pixels."""

    weight: jax.Array

    def __call__(self, image, frame):
        if image.shape[0] < 16:
            raise ValueError("The image is too small.")
        return self.weight * jnp.sum((image - frame) ** 2)


def test_the_perceptual_loss_is_timed_where_it_can_be(views, monkeypatch):
    prepared = reconstruction.Prepared({}, SIZE, 1.0, None)
    monkeypatch.setattr(metrics, "load_stlpips", lambda: Distance(jnp.float32(2.0)))
    assert reconstruction._add_perceptual(prepared, views) == []
    value, gradient = prepared.calls.pop("stlpips")()
    np.testing.assert_allclose(value, 2 * np.sum((0.5 - np.asarray(views.rgb[0])) ** 2), rtol=1e-5)
    np.testing.assert_allclose(gradient, 4 * (0.5 - views.rgb[0]), rtol=1e-5)
    small = views.resized(0.5)
    assert reconstruction._add_perceptual(prepared, small) == ["The image is too small."]

    def absent():
        raise FileNotFoundError("Install it.")

    monkeypatch.setattr(metrics, "load_stlpips", absent)
    assert reconstruction._add_perceptual(prepared, views) == ["Install it."]
    assert prepared.calls == {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    result = run_binary(
        "benchmark",
        *("--suite=reconstruction", f"--json={folder / 'rows.json'}"),
        *(
            "--words=smoke,identity",
            "--sizes=16",
            f"--markdown={folder / 'table.md'}",
            "--repeats=2",
            "--seconds=0",
        ),
    )
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "rows.json").read_text()), folder, result


def test_the_rows_of_the_binary_are_complete(finished):
    (row,), _, _ = finished
    assert row["words"] == "smoke,identity" and row["size"] == 16
    assert 0 < row["splats"] <= row["capacity"] == 250
    assert row["steps"] == {"warmup": 6, "coarse": 6, "fine": 6}
    assert row["run_peak_mb"] is None or row["run_peak_mb"] > 50
    assert row["device_peak_mb"] is None  # JAX does not count the host's memory
    assert [list(program["steps"]) for program in row["programs"]] == [
        ["warmup"],
        ["coarse"],
        ["fine"],
    ]
    for program in row["programs"]:
        moving = "warmup" not in program["steps"]
        assert {*program["ms"]} - {"stlpips", "rest"} == {"step", *PARTS[not moving :]}
        for name, (low, median, high) in program["ms"].items():
            assert low <= median <= high and (name == "rest" or low > 0)
        assert program["compile_s"] > 0 and program["program_mb"] > 0
    compiling = sum(program["compile_s"] for program in row["programs"])
    assert compiling < row["estimate_s"]


def test_the_text_of_the_binary_is_its_table_with_notes(finished):
    rows, folder, result = finished
    text = (folder / "table.md").read_text()
    assert text.strip() == result.stdout.strip() and reconstruction.tables(rows) in text
    assert "clip `knight`" in text.splitlines()[0] and "threads" in text.splitlines()[0]
    assert "no measurement" in text
    assert ("16²" in text.splitlines()[-1]) == ("stlpips" in rows[0]["programs"][-1]["ms"])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--clip=absent", "absent"),
        ("--n=100", "--n has no part in --suite=reconstruction"),
    ],
)
def test_mistakes_end_in_one_sentence(argument, words, tmp_path):
    file = tmp_path / "rows.json"
    result = run_binary("benchmark", "--suite=reconstruction", f"--json={file}", argument)
    assert result.returncode == 1 and words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and not file.exists()


def test_mistakes_in_names_are_found_before_anything_is_measured():
    clip = synthetic.make_clip(0, num_frames=4, size=16)
    for words, name, sentence in [
        ("smoke,fastest", None, "not 'fastest'"),
        ("smoke", "tyled", "There is no rasterizer 'tyled'"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            reconstruction.run(clip, ["smoke", words], [name], repeats=1, seconds=0)
