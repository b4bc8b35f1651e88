"""The course of an optimization: loss and training PSNR of every step, as a file and as a picture.

The file has one JSON object a line and is written while the run goes on, so it survives any end of
the process; a run that is resumed goes on in the same file.
"""

import collections
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from gaussians.reconstruct import Progress

#: Steps that a mean is taken over: single views differ a lot.
WINDOW = 48

_KEYS = ("stage", "step", "loss", "psnr", "splats")


class CurveFile:
    """A callback of `gaussians.reconstruct.reconstruct` that writes a line for every step.

    What the file holds of that step and later ones, as after a run that was resumed from an earlier
    snapshot, is removed first.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        self._file: TextIO | None = None

    def __call__(self, progress: Progress) -> None:
        """Writes down a step."""
        if self._file is None:
            before = [row for row in read_curve(self._path) if row["step"] < progress.step]
            self._path.write_text("".join(map(_line, before)), encoding="utf-8")
            self._file = open(self._path, "a", buffering=1, encoding="utf-8")
        self._file.write(_line({key: getattr(progress, key) for key in _KEYS}))

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class Recent:
    """Running means of loss and PSNR over the last `WINDOW` steps."""

    def __init__(self):
        self._values: collections.deque[tuple[float, float]] = collections.deque(maxlen=WINDOW)

    def __call__(self, progress: Progress) -> tuple[float, float]:
        """Takes note of a step; returns the means of loss and PSNR (dB)."""
        self._values.append((progress.loss, progress.psnr))
        loss, psnr = np.mean(self._values, axis=0)
        return float(loss), float(psnr)


def read_curve(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The steps in a file of `CurveFile`, in their order; none without a file.

    Lines that are cut off, as by the end of the machine, end the curve.
    """
    rows = []
    path = Path(path)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append({key: json.loads(line)[key] for key in _KEYS})
        except (ValueError, KeyError, TypeError):
            break
    return rows


def plot_curve(rows: Sequence[dict[str, Any]], path: str | os.PathLike) -> None:
    """Draws loss (logarithmic) and PSNR over the steps, raw and as running means, stages shaded.

    Means are taken within a stage, since stages differ in resolution and views.
    """
    from matplotlib.figure import Figure  # Imported here: it starts slowly.

    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    for number, stage in enumerate(dict.fromkeys(row["stage"] for row in rows)):
        part = [row for row in rows if row["stage"] == stage]
        steps = np.array([row["step"] for row in part])
        for panel, key in zip(panels, ("loss", "psnr"), strict=True):
            values = np.array([row[key] for row in part], float)
            panel.axvspan(steps[0] - 0.5, steps[-1] + 0.5, color=f"C{number}", alpha=0.12, lw=0)
            panel.plot(steps, values, color="0.6", lw=0.5)
            panel.plot(steps, smoothed(values), color=f"C{number}", lw=1.5, label=stage)
    panels[0].set(yscale="log", ylabel="loss")
    panels[1].set(xlabel="step", ylabel="PSNR of the step's views (dB)")
    panels[1].legend(loc="lower right")
    figure.savefig(path, dpi=100)


def smoothed(values: np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Centred running means; at the ends over the part of the window that there is."""
    window = min(window, len(values))
    sums = np.convolve(values, np.ones(window), mode="same")
    return sums / np.convolve(np.ones(len(values)), np.ones(window), mode="same")


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"
