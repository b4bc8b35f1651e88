"""The rasterizer suite: our implementations and their peers, on the same scene."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.benchmarks import measure, scenes
from experiments.benchmarks.peers import PEERS, Candidate, compiled
from experiments.benchmarks.tables import number
from gaussians.asset import pair_capacity
from gaussians.rasterize import chosen, rasterize
from gaussians.types import Camera, Splats

#: What ratios are to.
BASELINE = "gsplat_torch"

#: Two correct images differ where rounding moves an alpha across 1/255 or swaps equal depths.
_MAX_DIFFERENCE, _MEAN_DIFFERENCE = 0.05, 1e-4

Row = dict[str, Any]


class Cell(NamedTuple):
    """One scene, counted and sized.

    rows: Keys implementation, n, size, forward_ms, forward_backward_ms, peak_mb, compile_s.
    differences: Largest difference of each image to the first one's.
    failures: Why each peer that is missing from the rows did not run.
    """

    rows: list[Row]
    differences: dict[str, float]
    failures: dict[str, str]


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is neither one of `gaussians.rasterize` nor a peer."""
    for name in names:
        if name not in PEERS:
            try:
                chosen(name)
            except ValueError as error:
                peers = ", ".join(PEERS)
                raise ValueError(f"{str(error).rstrip('.')}, or a peer: {peers}.") from None


def run(
    names: Sequence[str], kind: str, n: int, size: int, *, repeats: int, seconds: float
) -> Cell:
    """Measures implementations and peers on one scene.

    Times are least milliseconds of calls taken in turn in this process (`measure.in_turn`). Memory
    and compilation are those of a process of their own, which runs `forward_backward` once.

    Args:
        names: what to run; peers that cannot run are left out.
        kind: of scene, a key of `scenes.RADII`.
        n: number of splats.
        size: image width and height in pixels.
        repeats: most rounds.
        seconds: no round starts later than this.

    Raises:
        ValueError: an implementation of ours draws another image than the first one.
    """
    scene = scenes.ball(kind, n, size)
    candidates: dict[str, Candidate] = {}
    compile_and_peak, differences, failures = {}, {}, {}
    image = None
    for name in names:
        try:
            capacity = None if name in PEERS else _capacity(name, scene)
            candidate = _prepare(name, scene, capacity)
            drawn = np.asarray(candidate.forward())
            image = drawn if image is None else image
            differences[name] = _difference(name, drawn, image)
            candidate.forward_backward()
            compile_and_peak[name] = measure.in_fresh_process(
                _compile_and_peak, name, kind, n, size, capacity
            )
        except Exception as error:
            if name not in PEERS:
                raise
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}."
        else:
            candidates[name] = candidate
    calls = {
        (name, key): getattr(candidate, key)
        for key in ("forward", "forward_backward")
        for name, candidate in candidates.items()
    }
    times = measure.in_turn(calls, repeats=repeats, seconds=seconds)
    rows = []
    for name in candidates:
        compile_s, peak_mb = compile_and_peak[name]
        figures = {
            "forward_ms": times[name, "forward"],
            "forward_backward_ms": times[name, "forward_backward"],
            "peak_mb": peak_mb,
            "compile_s": compile_s,
        }
        rounded = {key: value and round(value, 4) for key, value in figures.items()}
        rows.append({"implementation": name, "n": n, "size": size, **rounded})
    return Cell(rows, differences, failures)


def table(rows: Sequence[Row]) -> str:
    """A markdown table; the columns "x" say how many times faster than `BASELINE` a row is."""
    baseline = {(row["n"], row["size"]): row for row in rows if row["implementation"] == BASELINE}

    def faster(row: Row, key: str) -> str:
        base = baseline.get((row["n"], row["size"]))
        return "-" if base is None else number(base[key] / row[key])

    lines = [
        "| splats | pixels | implementation | forward (ms) | x | forward + backward (ms) | x"
        " | peak (MB) | compile (s) |",
        "|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [
            f"{row['n']:,}",
            f"{row['size']}²",
            f"`{row['implementation']}`",
            number(row["forward_ms"]),
            faster(row, "forward_ms"),
            number(row["forward_backward_ms"]),
            faster(row, "forward_backward_ms"),
            number(row["peak_mb"]),
            number(row["compile_s"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _prepare(name: str, scene: scenes.Scene, capacity: int | None) -> Candidate:
    if name in PEERS:
        return PEERS[name](scene)
    return compiled(lambda *seen: _draw(name, scene, capacity, *seen).rgb, scene)


def _draw(
    name: str, scene: scenes.Scene, capacity: int | None, splats: Splats, camera: Camera
) -> Any:
    return rasterize(splats, camera, scene.background, implementation=name, capacity=capacity)


def _capacity(name: str, scene: scenes.Scene) -> int:
    """The least power of two with which nothing is missing, as a driver finds it."""
    capacity = pair_capacity(len(scene.splats))
    while True:
        missing = jax.jit(lambda *seen, c=capacity: _draw(name, scene, c, *seen).overflow)
        overflow = int(missing(scene.splats, scene.camera))
        if not overflow:
            return capacity
        capacity = pair_capacity(capacity + overflow)


def _difference(name: str, image: np.ndarray, expected: np.ndarray) -> float:
    difference = np.abs(image - expected)
    largest, mean = float(difference.max()), float(difference.mean())
    if not (largest <= _MAX_DIFFERENCE and mean <= _MEAN_DIFFERENCE):
        raise ValueError(
            f"{name} draws another image than the first implementation: they differ by up to"
            f" {largest:.2g}, {mean:.2g} on average."
        )
    return largest


def _compile_and_peak(
    name: str, kind: str, n: int, size: int, capacity: int | None
) -> tuple[float | None, float | None]:
    """Seconds to compile the gradient, and MB that its first run needs."""
    jax.config.update("jax_enable_compilation_cache", False)
    candidate = _prepare(name, scenes.ball(kind, n, size), capacity)
    return candidate.compile_s, measure.peak_mb(
        candidate.forward_backward, on_host=candidate.on_host
    )
