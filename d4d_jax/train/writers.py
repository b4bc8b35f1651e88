"""Metric writers with the signatures of clu.metric_writers, without its TensorFlow import.

The log and the files of a workdir are always written; TensorBoard and Weights & Biases by name.
"""

import html
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
        if images:
            _LOGGER.info("[%d] images: %s", step, ", ".join(images))

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Logs the names of the videos."""
        if videos:
            _LOGGER.info("[%d] videos: %s", step, ", ".join(videos))

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Nothing is open."""


class JsonlWriter:
    """Appends scalars to `DIRECTORY/metrics.jsonl`, one JSON object a line; pictures beside it.

    Each line holds `step` and the scalars, for example `{"step": 50, "loss": 0.41}`; a value
    that is not finite is written as null, which keeps every line standard JSON. Images become
    `DIRECTORY/images/NAME_STEP.png`, videos `NAME_STEP.mp4` there, and `DIRECTORY/samples.html`
    shows all of them, the newest first.
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
        for name, image in images.items():
            media.write_image(self._path(name, step, "png"), np.asarray(image, np.float32))
        self._write_index()

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Writes each video as an MP4, named like the images."""
        for name, frames in videos.items():
            media.write_video(self._path(name, step, "mp4"), np.asarray(frames, np.float32))
        self._write_index()

    def _path(self, name: str, step: int, suffix: str) -> pathlib.Path:
        folder = self._directory / "images"
        folder.mkdir(exist_ok=True)
        return folder / f"{name.replace('/', '_')}_{step:07d}.{suffix}"

    def _write_index(self) -> None:
        folder = self._directory / "images"
        files = [*folder.glob("*.png"), *folder.glob("*.mp4")] if folder.is_dir() else []
        by_step: dict[str, list[str]] = {}
        for path in sorted(files):
            by_step.setdefault(path.stem.rpartition("_")[2], []).append(path.name)
        parts = ["<!doctype html><meta charset=utf-8><title>Samples</title>"]
        for step in sorted(by_step, reverse=True):
            parts.append(f"<h2>Step {int(step)}</h2>")
            for name in by_step[step]:
                address = html.escape(f"images/{name}")
                parts.append(
                    f'<img src="{address}" alt="{address}">'
                    if name.endswith(".png")
                    else f'<video src="{address}" controls loop muted autoplay></video>'
                )
        (self._directory / "samples.html").write_text("\n".join(parts) + "\n", encoding="utf-8")

    def flush(self) -> None:
        """Hands buffered lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """Writes event files into `DIRECTORY/tensorboard`, through tensorboardX."""

    def __init__(self, directory: str | os.PathLike[str], *, restored_step: int = 0):
        """Opens an event file; what earlier ones say of later steps than that is hidden.

        Raises:
            ImportError: tensorboardX is not installed.
        """
        from tensorboardX import SummaryWriter

        folder = pathlib.Path(directory) / "tensorboard"
        self._writer = SummaryWriter(str(folder), purge_step=restored_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds the scalars."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Adds the images."""
        for name, image in images.items():
            self._writer.add_image(name, np.asarray(image, np.float32), step, dataformats="HWC")

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Adds each video as a contact sheet: moving ones would need an encoder of their own."""
        sheets = {name: media.contact_sheet([np.asarray(v)]) for name, v in videos.items()}
        self.write_images(step, sheets)

    def flush(self) -> None:
        """Writes what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class WandbWriter:
    """Logs to Weights & Biases, offline or to a server as its environment variables say."""

    def __init__(self, directory: str | os.PathLike[str], *, restored_step: int = 0):
        """Starts a run, or goes on with the one whose id an earlier start left in the workdir.

        Raises:
            ImportError: wandb is not installed.
        """
        import wandb  # pyright: ignore[reportMissingImports]

        path = pathlib.Path(directory) / "wandb_id"
        known = path.read_text().strip() if restored_step and path.exists() else None
        self._run = wandb.init(dir=str(directory), id=known, resume="allow")
        path.write_text(self._run.id + "\n")
        self._wandb = wandb

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Logs the scalars."""
        self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Logs the images."""
        values = {n: self._wandb.Image(media.to_uint8(image)) for n, image in images.items()}
        self._run.log(values, step=step)

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Logs each video as a contact sheet."""
        sheets = {name: media.contact_sheet([np.asarray(v)]) for name, v in videos.items()}
        self.write_images(step, sheets)

    def flush(self) -> None:
        """wandb sends by itself."""

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


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

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Passes the videos on."""
        for writer in self._writers:
            writer.write_videos(step, videos)

    def flush(self) -> None:
        """Flushes all."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes all."""
        for writer in self._writers:
            writer.close()


#: What can be written besides the log and the files of a workdir, by name.
FURTHER = {"tensorboard": TensorBoardWriter, "wandb": WandbWriter}


def default_writer(
    directory: str | os.PathLike[str], *, restored_step: int = 0, further: Sequence[str] = ()
) -> MultiWriter:
    """Returns the log writer, the JSONL writer of a workdir, and further ones, as one.

    Args:
        directory: the workdir.
        restored_step: step that the run continues from.
        further: names in `FURTHER`.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
    """
    chosen: list[MetricWriter] = []
    for name in further:
        if name not in FURTHER:
            raise ValueError(f"A writer is one of {', '.join(FURTHER)}, not {name!r}.")
        try:
            chosen.append(FURTHER[name](directory, restored_step=restored_step))
        except ImportError as error:
            raise ValueError(
                f"The writer {name!r} needs the package {error.name}: pip install {error.name}."
            ) from error
    files = JsonlWriter(directory, restored_step=restored_step)
    return MultiWriter([LogWriter(), files, *chosen])


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
