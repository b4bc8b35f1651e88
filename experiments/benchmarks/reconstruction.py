"""The reconstruction suite: what a training step consists of, what it needs, what a run takes."""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from d4d_jax import metrics
from d4d_jax.clips import OrbitClip
from d4d_jax.typing import PyTree
from experiments.benchmarks import measure
from experiments.benchmarks.measure import Spread
from experiments.benchmarks.step_parts import PARTS, Repeated, take_apart
from experiments.benchmarks.tables import markdown, number
from experiments.configs import reconstruct as configs
from experiments.reconstruct import to_config
from gaussians import preparation, tracking
from gaussians.asset import pair_capacity
from gaussians.captures import Capture, Views, of_clip
from gaussians.deformation import build
from gaussians.deformation.skeleton import Skeleton
from gaussians.optimization import StepSettings, create_state, refine, step
from gaussians.projection import scaled_blur
from gaussians.rasterize import chosen
from gaussians.reconstruct import ReconstructConfig, reconstruct, tracks
from gaussians.types import Splats

_SHORT = 3  # steps of either stage of a short run
_CHUNKS = 6  # of tracking; the first one compiles

Row = dict[str, Any]


class Program(NamedTuple):
    """A training step as a run compiles it.

    settings: What is fixed at compile time.
    scale: Of the resolution.
    """

    settings: StepSettings
    scale: float


class ShortRun(NamedTuple):
    """What a few steps of a run left behind, on the host.

    splats, params: Of the asset.
    peak_mb: The process's largest resident memory; None: unknown.
    device_peak_mb: Largest use of the device's memory; None: it does not count it.
    """

    splats: Splats
    params: PyTree
    peak_mb: float | None
    device_peak_mb: float | None


class Prepared(NamedTuple):
    """A compiled step and its parts.

    calls: By "step" and the names of `step_parts.PARTS`.
    size: Pixels a side.
    compile_s: Seconds to trace and compile the step.
    program_mb: What the compiled step holds while it runs.
    """

    calls: dict[str, Callable[[], Any]]
    size: int
    compile_s: float
    program_mb: float | None


class Tracked(NamedTuple):
    """What tracking takes.

    ms: Milliseconds of a step.
    steps: Of a run.
    first_s: Seconds until its first steps are done, compilation included.
    """

    ms: Spread
    steps: int
    first_s: float


class _Candidate(NamedTuple):
    """A configuration, ready to be timed. `steps` are those of each program, stage by stage."""

    words: str
    config: ReconstructConfig
    run: ShortRun
    steps: dict[Program, dict[str, int]]
    prepared: dict[Program, Prepared]
    refinement: Callable[[], Any]
    tracked: Tracked | None


def run(
    clip: OrbitClip,
    words: Sequence[str],
    names: Sequence[str | None],
    *,
    repeats: int,
    seconds: float,
) -> tuple[list[Row], list[str]]:
    """Measures the training steps of configurations on one clip.

    Times are quartiles over rounds in which every step and every part has its turn, all in this
    process; a step and its parts see the same view, that of the middle frame, and the same splats,
    those of a short run. Peaks are those of that run, which has a process of its own. Steps of
    tracking are timed before, in chunks.

    Args:
        clip: with a dynamic orbit.
        words: of each configuration, for `experiments/configs/reconstruct.py`.
        names: of rasterizers, None for the fastest; each configuration is measured with each.
        repeats: most rounds.
        seconds: no round starts later than this.

    Returns:
        A row for each configuration, with a list of the programs it compiles; and sentences about
        what could not be measured.

    Raises:
        ValueError: there is no such word or rasterizer.
    """
    configurations = [(text, to_configuration(text, name)) for text in words for name in names]
    capture = of_clip(clip, preparation.find_static_time(clip))
    views = functools.lru_cache(lambda scale: preparation.views_of(capture, scale))
    candidates = [_candidate(text, config, clip, capture, views) for text, config in configurations]
    *_, (program, prepared) = candidates[0].prepared.items()
    missing = _add_perceptual(prepared, views(program.scale))
    calls: dict[Any, Callable[[], Any]] = {}
    for i, candidate in enumerate(candidates):
        calls[i, None, "refinement"] = candidate.refinement
        for program, prepared in candidate.prepared.items():
            calls |= {(i, program, name): call for name, call in prepared.calls.items()}
    samples = measure.rounds(calls, repeats=repeats, seconds=seconds)
    rows = []
    for i, candidate in enumerate(candidates):
        own = {key[1:]: times for key, times in samples.items() if key[0] == i}
        rows.append(_row(candidate, own))
    return rows, missing


def to_configuration(words: str, implementation: str | None) -> ReconstructConfig:
    """The configuration that the words name, with a rasterizer.

    Raises:
        ValueError: there is no such word or rasterizer.
    """
    config = to_config(configs.get_config(words))
    return dataclasses.replace(config, implementation=chosen(implementation))


def programs(
    config: ReconstructConfig, capture: Capture, pairs: int
) -> dict[Program, collections.Counter[str]]:
    """The steps that a run of `gaussians.reconstruct` compiles, and how many each stage takes.

    Args:
        config: the choices.
        capture: without still views there is no warm-up; where it is tracked, no coarse stage.
        pairs: capacity of the rasterizer's pair list.

    Raises:
        ValueError: a stage takes more than one view per step.
    """
    names = ["warmup"] * (capture.still is not None) + ["nodes", "coarse", "fine"]
    stages = {name: getattr(config, name) for name in names}
    tracked, done = tracks(config, capture), 0
    counts: collections.Counter[tuple[str, float, int]] = collections.Counter()
    for name, stage in stages.items():
        if name == "coarse" and tracked:
            done += stage.steps
            continue
        if stage.views > 1:
            raise ValueError(f"A step of one view is measured; {name}.views is {stage.views}.")
        for i in range(stage.steps):
            bands = done // config.sh_interval if config.sh_interval else config.sh_degree
            scale = stage.low_scale if i < stage.low_steps else 1.0
            counts[name, scale, min(bands, config.sh_degree)] += 1
            done += 1
    field = build(config.deformation)
    found: dict[Program, collections.Counter[str]] = {}
    for (name, scale, degree), steps in counts.items():
        rates = stages[name].rates or config.rates
        if name == "fine" and tracked:
            rates = dataclasses.replace(rates, nodes=config.tracking.settled * rates.nodes)
        settings = StepSettings(
            deformation={"warmup": None, "nodes": Skeleton(field)}.get(name, field),
            weights=stages[name].weights or config.weights,
            rates=rates,
            density=config.density,
            background=capture.background,
            pairs=pairs,
            blur=scaled_blur(scale),
            sh_degree=degree,
            implementation=config.implementation,
        )
        found.setdefault(Program(settings, scale), collections.Counter())[name] += steps
    return found


def short_run(clip: OrbitClip, config: ReconstructConfig) -> ShortRun:
    """A few steps with the field, at full resolution, in a process that does nothing else.

    Nothing is tracked, also in a clip that returns to rest.
    """
    few = {"steps": _SHORT, "low_steps": 0, "curriculum": 0.0}
    stages = {
        name: dataclasses.replace(getattr(config, name), **few) for name in ("coarse", "fine")
    }
    for name in ("warmup", "nodes"):
        stages[name] = dataclasses.replace(getattr(config, name), steps=0)
    config = dataclasses.replace(config, **stages, tracking=tracking.Tracking(steps=0))
    asset = reconstruct(clip, config, jax.random.key(0))
    splats, params = jax.tree.map(np.asarray, (asset.splats, asset.params))
    return ShortRun(splats, params, measure.process_peak_mb(), measure.device_peak_mb())


def track(config: ReconstructConfig, capture: Capture, run: ShortRun) -> Tracked | None:
    """Times the first steps of tracking; None where a run does not track."""
    if not tracks(config, capture):
        return None
    field, _ = tracking.bottom(build(config.deformation), run.params)
    steps = _CHUNKS * tracking.CHUNK
    moments = [time.perf_counter()]
    tracking.track(
        field,
        run.splats,
        capture,
        dataclasses.replace(config.tracking, steps=steps, starts=1),
        jax.random.key(0),
        implementation=config.implementation,
        callback=lambda *_: moments.append(time.perf_counter()),
    )
    first, *others = np.diff(moments)
    spread = Spread.of(1e3 * np.array(others) / tracking.CHUNK)
    return Tracked(spread, config.tracking.starts * config.tracking.steps, float(first))


def prepare(
    program: Program, run: ShortRun, views: Views, index: int, *, rate: float = 0.0
) -> Prepared:
    """Compiles a step on one view, and its parts, with the splats of a short run.

    Args:
        program: its pair capacity is doubled until the view fits.
        run: whose splats and field the step goes on with.
        views: at the program's resolution.
        index: of the view.
        rate: factor on the learning rates. At 0 all is computed and nothing moves, so that every
            call does the same work.
    """
    settings = program.settings
    fresh = functools.partial(create_state, run.splats, run.params, settings.rates)
    rates, key = jnp.asarray(rate, jnp.float32), jax.random.key(0)
    while (parts := take_apart(fresh(), views, index, rates, key, settings)).overflow:
        pairs = pair_capacity(settings.pairs + parts.overflow)
        settings = dataclasses.replace(settings, pairs=pairs)
    given = views, jnp.array([index]), rates, key, None
    start = time.perf_counter()
    compiled = step.lower(fresh(), *given, settings=settings).compile()
    seconds = time.perf_counter() - start
    whole = Repeated(lambda state: compiled(state, *given), fresh())
    whole()
    calls = {"step": whole, **parts.calls}
    return Prepared(calls, views.camera.width, seconds, measure.program_mb(compiled))


def tables(rows: Sequence[Row]) -> str:
    """Two markdown tables: the programs and where their time goes, and the runs made of them."""
    columns = [*PARTS, "rest"]
    headings = ["words", "rasterizer", "stages", "pixels", "step (ms)"]
    steps = [
        [
            *_names(row),
            ", ".join(program["steps"]),
            f"{program['size']}²",
            *(_interval(program["ms"].get(name)) for name in ("step", *columns)),
            number(program["compile_s"]),
            number(program["program_mb"]),
        ]
        for row in rows
        for program in row["programs"]
    ]
    headings += [*columns, "compile (s)", "program (MB)"]
    runs = [
        [
            *_names(row),
            f"{row['size']}²",
            f"{row['splats']:,} of {row['capacity']:,}",
            _interval(row["refinement_ms"]),
            _interval(row["tracking_ms"]),
            number(row["run_peak_mb"]),
            number(row["device_peak_mb"]),
            f"{sum(row['steps'].values()) + row['tracking_steps']:,}",
            number(row["estimate_s"]),
        ]
        for row in rows
    ]
    of_runs = [
        "words",
        "rasterizer",
        "pixels",
        "splats",
        "refinement (ms)",
        "step of tracking (ms)",
        "peak (MB)",
        "on the device (MB)",
    ]
    of_runs += ["steps of a run", "estimate (s)"]
    return f"{markdown(headings, steps, left=3)}\n\n{markdown(of_runs, runs, left=3)}"


def notes(rows: Sequence[Row]) -> list[str]:
    """What the figures mean, and the time of a loss that none of the steps has."""
    perceptual = [
        f"{_interval(program['ms']['stlpips'])} ms at {program['size']}²"
        for row in rows
        for program in row["programs"]
        if "stlpips" in program["ms"]
    ]
    lines = [
        "Milliseconds are medians [quartiles]. `rest` is what the step takes beyond its parts; each"
        " part is compiled by itself and writes out what the step may fuse, so it can be negative.",
        "The step is on the view of the middle frame, with the splats of a short run. Clips that"
        " return to rest are tracked instead of the coarse stage, at a resolution of its own.",
        "`program`: arguments, results and temporaries of the compiled step; what a native kernel"
        " allocates is not in it. `peak`: resident memory of a process that does a short run,"
        " libraries and compiler included.",
        "`estimate` is no measurement: steps times their median, refinements, and compilation."
        " Reading the clip, the first splats and writing files come on top.",
    ]
    if perceptual:
        times = ", ".join(perceptual)
        lines.append(f"The shift-tolerant LPIPS, which no step here has, would add {times}.")
    return lines


def _candidate(
    words: str,
    config: ReconstructConfig,
    clip: OrbitClip,
    capture: Capture,
    views: Callable[[float], Views],
) -> _Candidate:
    run = measure.in_fresh_process(short_run, clip, config)
    pairs = pair_capacity(config.pairs_per_splat * config.capacity)
    steps = programs(config, capture, pairs)
    middle = len(capture.moving) // 2
    prepared = {each: prepare(each, run, views(each.scale), middle) for each in steps}
    state = create_state(run.splats, run.params, config.rates)
    settings = {"density": config.density, "field": build(config.deformation)}

    def refinement() -> Any:
        return jax.block_until_ready(refine(state, jax.random.key(0), 1, **settings)[0])

    refinement()
    return _Candidate(words, config, run, steps, prepared, refinement, track(config, capture, run))


def _add_perceptual(prepared: Prepared, views: Views) -> list[str]:
    """Gives a program of views the call "stlpips", forward and backward; or says why it cannot."""
    try:
        network = metrics.load_stlpips()
        frame = views.rgb[0]
        gradient = jax.jit(jax.value_and_grad(lambda image, frame, network: network(image, frame)))
        call = functools.partial(gradient, jnp.full_like(frame, 0.5), frame, network)
        jax.block_until_ready(call())
    except (FileNotFoundError, ValueError) as error:  # not installed, or the image is too small
        return [str(error)]
    prepared.calls["stlpips"] = lambda: jax.block_until_ready(call())
    return []


def _row(candidate: _Candidate, samples: dict[tuple[Program | None, str], list[float]]) -> Row:
    entries, seconds = [], 0.0
    for program, prepared in candidate.prepared.items():
        taken = {name: np.array(samples[program, name]) for name in prepared.calls}
        parts = sum(taken[name] for name in PARTS if name in taken)
        spreads = {name: Spread.of(times) for name, times in taken.items()}
        spreads["rest"] = Spread.of(taken["step"] - parts)
        steps = candidate.steps[program]
        seconds += prepared.compile_s + 1e-3 * spreads["step"].median * sum(steps.values())
        entries.append(
            {
                "steps": dict(steps),
                "size": prepared.size,
                "ms": {name: _rounded(spread) for name, spread in spreads.items()},
                "compile_s": round(prepared.compile_s, 4),
                "program_mb": _rounded(prepared.program_mb),
            }
        )
    config, run = candidate.config, candidate.run
    total = collections.Counter[str]()
    for steps in candidate.steps.values():
        total.update(steps)
    tracked = candidate.tracked
    end = total.total()
    if tracked is not None:
        end += config.coarse.steps
        seconds += tracked.first_s + 1e-3 * tracked.ms.median * tracked.steps
    refinements = sum(map(config.density.refines_at, range(1, end + 1)))
    refinement = Spread.of(samples[None, "refinement"])
    return {
        "words": candidate.words,
        "implementation": config.implementation,
        "size": max(entry["size"] for entry in entries),
        "splats": int(np.sum(run.splats.active)),
        "capacity": config.capacity,
        "programs": entries,
        "steps": dict(total),
        "refinements": refinements,
        "refinement_ms": _rounded(refinement),
        "tracking_steps": 0 if tracked is None else tracked.steps,
        "tracking_ms": tracked and _rounded(tracked.ms),
        "run_peak_mb": _rounded(run.peak_mb),
        "device_peak_mb": _rounded(run.device_peak_mb),
        "estimate_s": round(seconds + 1e-3 * refinements * refinement.median, 4),
    }


def _rounded(figure: Any) -> Any:
    """To four digits after the point; a spread becomes a list, None stays."""
    if isinstance(figure, Spread):
        return [round(value, 4) for value in figure]
    return figure and round(figure, 4)


def _interval(spread: Sequence[float] | None) -> str:
    if spread is None:
        return "-"
    low, median, high = map(number, spread)
    return f"{median} [{low}, {high}]"


def _names(row: Row) -> list[str]:
    return [row["words"] or "default", f"`{row['implementation']}`"]
