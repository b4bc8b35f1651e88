"""Metric writers with the signatures of clu.metric_writers, without its TensorFlow import."""

import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from d4d_jax import media
from d4d_jax.typing import MetricWriter

_LOGGER = logging.getLogger(__name__)


class LogWriter:
    """Writes one readable log line per call."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Logs `[step] name=value, ...` with four significant digits."""
        text = ", ".join(f"{name}={float(value):.4g}" for name, value in scalars.items())
        _LOGGER.info("[%d] %s", step, text)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Logs the names of the images."""
        _LOGGER.info("[%d] images: %s", step, ", ".join(images))

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Nothing is open."""


class JsonlWriter:
    """Appends scalars to `DIRECTORY/metrics.jsonl`, one JSON object a line, images beside it.

    Each line holds `step` and the scalars, for example `{"step": 50, "loss": 0.41}`; a value
    that is not finite is written as null, which keeps every line standard JSON. Images
    (`h w 3`, in [0, 1]) become `DIRECTORY/images/NAME_STEP.png`.
    """

    def __init__(self, directory: str | os.PathLike[str], *, restored_step: int = 0):
        """Opens the file for appending.

        Args:
            directory: created when missing.
            restored_step: step that the run continues from. Lines of later steps, and a line cut
                short by a crash, are dropped first, so that no step occurs twice.
        """
        self._directory = pathlib.Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / "metrics.jsonl"
        if path.exists():
            _drop_lines_after(path, restored_step)
        self._file = path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Appends one line."""
        values = {name: _finite_or_none(value) for name, value in scalars.items()}
        self._file.write(json.dumps({"step": int(step), **values}) + "\n")

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Writes each image as a PNG; `/` in a name becomes `_`."""
        folder = self._directory / "images"
        folder.mkdir(exist_ok=True)
        for name, image in images.items():
            path = folder / f"{name.replace('/', '_')}_{step:07d}.png"
            media.write_image(path, np.asarray(image, np.float32))

    def flush(self) -> None:
        """Hands buffered lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class MultiWriter:
    """Passes every call on to several writers, in order."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Passes the scalars on."""
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Passes the images on."""
        for writer in self._writers:
            writer.write_images(step, images)

    def flush(self) -> None:
        """Flushes all."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes all."""
        for writer in self._writers:
            writer.close()


def default_writer(directory: str | os.PathLike[str], *, restored_step: int = 0) -> MultiWriter:
    """Returns the log writer and the JSONL writer of a workdir as one."""
    return MultiWriter([LogWriter(), JsonlWriter(directory, restored_step=restored_step)])


def _finite_or_none(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _drop_lines_after(path: pathlib.Path, step: int) -> None:
    """Rewrites the file with its complete lines up to `step`, through a temporary file."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
