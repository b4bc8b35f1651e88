"""The networks suite: our UNet beside diffusers', its compilation, and paper scale on a GPU."""

import functools
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from d4d_jax.models.unet import SpatioTemporalUNet
from experiments.benchmarks import denoisers, measure
from experiments.benchmarks.denoisers import NAMES, REDUCED, Candidate, Shape
from experiments.benchmarks.measure import Spread
from experiments.benchmarks.tables import markdown, number

#: What the suite can do: time the reduced network; its training step; compile a full one on the
#: CPU, without and with a persistent cache; time a full one on a GPU.
PARTS = ("reduced", "training", "compilation", "full")

#: What ratios are to.
BASELINE = "diffusers"

#: FLOPs of one prediction of VideoMV's text network for 24 x 32 x 32 latents, as torch counts them.
FORWARD_FLOPS = 7.336e12

#: Forward passes that a pass amounts to, for a sample of 50 steps.
_FORWARDS = {"forward": 1, "forward_backward": 3, "step": 3, "sample": 150}

#: Dense bfloat16 TFLOP/s by what the name of a device holds; the first that fits counts.
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362}

_FULL = Shape(24, 32)

Row = dict[str, Any]
Maker = Callable[..., Candidate]

#: By the name of their rows.
IMPLEMENTATIONS: dict[str, Maker] = {
    "d4d_jax": denoisers.ours,
    BASELINE: denoisers.diffusers,
    "diffusers, torch.compile": functools.partial(denoisers.diffusers, compiled=True),
}


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is not one of `IMPLEMENTATIONS`."""
    for name in names:
        if name not in IMPLEMENTATIONS:
            known = ", ".join(f"{each!r}" for each in IMPLEMENTATIONS)
            raise ValueError(f"There is no network {name!r}; known: {known}.")


def compare(
    names: Sequence[str],
    fields: Mapping[str, Any],
    shape: Shape,
    passes: Sequence[str] = ("forward", "forward_backward"),
    *,
    repeats: int,
    seconds: float,
    **options: Any,
) -> list[Row]:
    """Times implementations of one network in turn, in this process.

    Args:
        names: in `IMPLEMENTATIONS`.
        fields: of our network.
        shape: of the latents.
        passes: of `denoisers.PASSES`.
        repeats: most rounds.
        seconds: no round starts later than this.
        options: for the implementations, except those of torch alone.

    Returns:
        A row for each implementation and pass: quartiles of milliseconds, quartiles of how many
        times faster than `BASELINE` it was in the same round, and a note where it did not run.

    Raises:
        Exception: ours does not run; a peer that does not is a note.
    """
    candidates: dict[str, Candidate] = {}
    failures: dict[str, str] = {}
    for name in names:
        make = IMPLEMENTATIONS[name]
        torch_only = {} if name == "d4d_jax" else {"device": _torch_device()}
        logging.info("Preparing %s at %s.", name, shape)
        try:
            candidates[name] = make(fields, shape, passes, **options, **torch_only)
        except Exception as error:
            if name == "d4d_jax" and not _out_of_memory(error):
                raise
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    calls = {
        (name, each): call
        for each in passes
        for name, candidate in candidates.items()
        for call in [candidate.calls[each]]
    }
    samples = measure.rounds(calls, repeats=repeats, seconds=seconds) if calls else {}
    rows = []
    for name, each in itertools.product(names, passes):
        taken, base = samples.get((name, each)), samples.get((BASELINE, each))
        known = candidates.get(name, Candidate({}, {}, {}))
        ratios = [b / own for b, own in zip(base, taken, strict=True)] if base and taken else None
        rows.append(
            {
                "implementation": name,
                "pass": each,
                "frames": shape.frames,
                "latents": shape.latents,
                "ms": _quartiles(taken),
                "times_faster": _quartiles(ratios),
                "compile_s": _rounded(known.compile_s.get(each)),
                "peak_mb": _rounded(known.peak_mb.get(each)),
                "note": failures.get(name),
            }
        )
    return rows


def reduced(
    names: Sequence[str],
    shapes: Sequence[Shape],
    *,
    part: str = "reduced",
    fields: Mapping[str, Any] = REDUCED,
    repeats: int,
    seconds: float,
) -> list[Row]:
    """The rows of `compare` for the reduced network in float32, with that `part`.

    Args:
        part: "reduced": the network and its gradient; "training": an update with AdamW.
    """
    passes = {"reduced": ("forward", "forward_backward"), "training": ("step",)}[part]
    rows = []
    for shape in shapes:
        rows += compare(names, fields, shape, passes, repeats=repeats, seconds=seconds)
    return [{"part": part, **row} for row in rows]


def full(
    names: Sequence[str],
    *,
    fields: Mapping[str, Any],
    shape: Shape = _FULL,
    passes: Sequence[str] = ("forward", "step", "sample"),
    steps: int = 50,
    peak_tflops: float | None = None,
    repeats: int,
    seconds: float,
) -> list[Row]:
    """A whole network in bfloat16 on the accelerator; without one every row is "not measured".

    Args:
        names: in `IMPLEMENTATIONS`.
        fields: of our network.
        shape: of the latents. FLOPs are known for the one of the default.
        passes: each is prepared and timed by itself, since weights and states are large.
        steps: of a sample.
        peak_tflops: of the device; None: that of `PEAK_TFLOPS`.
        repeats: most rounds.
        seconds: no round starts later than this.
    """
    options = {"half": True, "steps": steps}
    rows = []
    for each in passes:
        if jax.default_backend() == "cpu":
            empty = dict.fromkeys(("ms", "times_faster", "compile_s", "peak_mb"))
            sizes = {"frames": shape.frames, "latents": shape.latents}
            found: list[Row] = [
                {"implementation": name, "pass": each, **sizes, **empty, "note": "not measured"}
                for name in names
            ]
        else:
            found = compare(
                names, fields, shape, [each], repeats=repeats, seconds=seconds, **options
            )
        for row in found:
            forwards = _FORWARDS[each] * (steps / 50 if each == "sample" else 1)
            known = shape == _FULL and row["ms"] is not None
            rate = FORWARD_FLOPS * forwards / row["ms"][1] / 1e9 if known else None
            peak = peak_tflops or _peak_tflops(jax.devices()[0].device_kind)
            row |= {"tflops": _rounded(rate), "mfu": _rounded(rate and peak and rate / peak)}
        rows += found
    return [{"part": "full", **row} for row in rows]


def compilation(name: str, fields: Mapping[str, Any], shape: Shape, *, half: bool) -> list[Row]:
    """Seconds to trace and to compile a forward pass, cold and from a persistent cache.

    Each is a process of its own, which keeps its programs as with --compilation_cache_dir; both
    have the same folder. Parameters are shapes only.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for state in ("cold", "warm"):
            lower_s, compile_s = measure.in_fresh_process(compile_once, fields, shape, half, folder)
            cached = sum(f.stat().st_size for f in pathlib.Path(folder).rglob("*") if f.is_file())
            rows.append(
                {
                    "part": "compilation",
                    "variant": name,
                    "frames": shape.frames,
                    "latents": shape.latents,
                    "dtype": "bfloat16" if half else "float32",
                    "cache": state,
                    "lower_s": _rounded(lower_s),
                    "compile_s": _rounded(compile_s),
                    "cache_mb": _rounded(cached / 1e6),
                }
            )
    return rows


def compile_once(
    fields: Mapping[str, Any], shape: Shape, half: bool, folder: str
) -> tuple[float, float]:
    """Seconds to lower and to compile a forward pass with a cache in `folder`."""
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    network = SpatioTemporalUNet(**fields, dtype=jnp.bfloat16 if half else jnp.float32)
    params = denoisers.abstract_params(network, shape)
    given = denoisers.example(network, shape)
    function, arguments = denoisers.program("forward", network, params, given)
    start = time.perf_counter()
    lowered = function.lower(*arguments)
    middle = time.perf_counter()
    lowered.compile()
    return middle - start, time.perf_counter() - middle


def tables(rows: Sequence[Row]) -> str:
    """Markdown tables of the parts that the rows have."""
    texts = []
    for part, make in zip(PARTS, (_timed, _timed, _compiled, _timed), strict=True):
        own = [row for row in rows if row["part"] == part]
        if own:
            texts.append(make(own))
    return "\n\n".join(texts)


def notes(rows: Sequence[Row]) -> list[str]:
    """What the figures mean, and why some are missing."""
    lines = [
        "Milliseconds are medians [quartiles], and so is `x`: times faster than `diffusers` in the"
        " same round. Weights are random; `backward` is to every parameter.",
    ]
    if any(row["part"] == "full" for row in rows):
        lines.append(
            f"TFLOP/s and MFU count {FORWARD_FLOPS / 1e12:.2f} TFLOP for a forward pass at"
            " 24 x 32², three times that for a training step, without what is computed twice, and"
            " 150 times for a sample (50 steps of three branches in one batch)."
        )
    found = {
        f"`{row['implementation']}` did not run at {row['frames']} x {row['latents']}²:"
        f" {row['note']}."
        for row in rows
        if row.get("note") not in (None, "not measured")
    }
    return [*lines, *sorted(found)]


def _timed(rows: Sequence[Row]) -> str:
    headings = ["latents", "pass", "implementation", "ms", "x", "compile (s)", "program (MB)"]
    whole = "tflops" in rows[0]
    headings += ["TFLOP/s", "MFU"] if whole else []
    cells = []
    for row in sorted(rows, key=lambda row: (-row["latents"], row["frames"])):
        missing = "not measured" if row["note"] == "not measured" else "-"
        line = [
            f"{row['frames']} x {row['latents']}²",
            NAMES[row["pass"]],
            f"`{row['implementation']}`",
            _interval(row["ms"]) if row["ms"] else missing,
            _interval(row["times_faster"]),
            number(row["compile_s"]),
            number(row["peak_mb"]),
        ]
        if whole:
            mfu = row["mfu"]
            line += [number(row["tflops"]), "-" if mfu is None else f"{100 * mfu:.0f} %"]
        cells.append(line)
    return markdown(headings, cells, left=3)


def _compiled(rows: Sequence[Row]) -> str:
    headings = ["network", "latents", "dtype", "cache", "lower (s)", "compile (s)", "cache (MB)"]
    cells = [
        [
            f"`{row['variant']}`",
            f"{row['frames']} x {row['latents']}²",
            row["dtype"],
            row["cache"],
            *(number(row[key]) for key in ("lower_s", "compile_s", "cache_mb")),
        ]
        for row in rows
    ]
    return markdown(headings, cells, left=4)


def _interval(spread: Sequence[float] | None) -> str:
    if spread is None:
        return "-"
    low, median, high = map(number, spread)
    return f"{median} [{low}, {high}]"


def _quartiles(samples: Sequence[float] | None) -> list[float] | None:
    return [round(value, 4) for value in Spread.of(samples)] if samples else None


def _rounded(figure: float | None) -> float | None:
    return figure and round(figure, 4)


def _peak_tflops(kind: str) -> float | None:
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in kind), None)


def _torch_device() -> str:
    """The device of torch that goes with jax's."""
    return "cpu" if jax.default_backend() == "cpu" else "cuda"


def _out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error)
