"""Turns a clip into a moving 3D asset.

    python -m experiments.reconstruct --clip=DIR --workdir=OUT

fits deforming Gaussians to the dynamic and the static orbit in DIR (the published folder layout)
and writes into OUT: `asset.npz` (everything, for `gaussians.io.load_asset`), `viewer.html` (the
moving asset for any browser, one file), `point_cloud.ply` (the splats at t = 0), `orbit.mp4` (along
the orbit while time runs), `novel.mp4` (from the side), `comparison.png` (frames above their
renders) and `report.json`. Front frames in DIR are never trained on: they are held out to judge the
motion by. `--export=spz,glb` writes the splats in further formats, `--frames=ply` those of all
timestamps (`frames/0000.ply`, ...).

Ctrl-C and SIGTERM save `snapshot.npz` first, as every few hundred steps do; the same command then
goes on from there, and ends with the asset that an uninterrupted run would have made.
"""

import dataclasses
import json
import math
import os
import sys
import time
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags, logging

from d4d_jax import media, metrics
from d4d_jax.cameras import Camera
from d4d_jax.clips import OrbitClip, read_clip
from d4d_jax.metrics import Lpips, load_lpips, load_stlpips
from experiments import cli
from gaussians import datasets, io
from gaussians.asset import Asset
from gaussians.captures import Capture, of_clip
from gaussians.evaluation import Rendered, render_views, score
from gaussians.reconstruct import Progress, ReconstructConfig, reconstruct
from gaussians.snapshot import FileKeeper, Interrupted, Keeper
from gaussians.viewer import write_viewer

_VIEWS = ("dynamic", "static", "front")
_COLUMNS = 8


def main() -> None:
    """Reconstructs the clip of the command line."""
    options = flags.FLAGS
    size = (options.size, options.size) if options.size else None
    source = read_source(options.clip, size, options.layout)
    config = to_config(options.config)
    perceptual = load_perceptual(options.perceptual)
    check_perceptual(config, perceptual)
    formats = [f".{name}" for name in options.export]
    frames = f".{options.frames}" if options.frames else None
    for suffix in [*formats, *filter(None, [frames])]:
        io.check_format(suffix)
    further = [*(f"point_cloud{suffix}" for suffix in formats), *(["frames"] if frames else [])]
    names = (*outputs(), *further)
    snapshot = Path(options.workdir) / "snapshot.npz"
    resumes = snapshot.exists() and not options.overwrite  # what lies there is to be replaced
    workdir = cli.claim_workdir(options.workdir, names, overwrite=options.overwrite or resumes)
    cli.log_devices()
    with cli.profile(workdir), cli.stop_requests() as stop_signal:
        keeper = FileKeeper(snapshot, options.snapshot_every, lambda: stop_signal() > 0)
        if options.overwrite:
            keeper.discard()
        try:
            asset, seconds = fit(source, config, options.seed, keeper, perceptual)
        except Interrupted as stop:
            without = ", without --overwrite," if options.overwrite else ""
            logging.warning("%s The same command%s goes on from there.", stop, without)
            sys.exit(128 + stop_signal())
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error} The state before is kept in {snapshot}; --overwrite starts anew."
            ) from error
    if isinstance(source, OrbitClip):
        capture, title = of_clip(source, asset.meta["static_time"]), source.caption
    else:
        capture, title = source, Path(options.clip).stem
    (workdir / "report.json").unlink(missing_ok=True)  # It stands for a complete set of files.
    for suffix in formats:
        io.export(workdir / f"point_cloud{suffix}", asset)
    if frames:
        times = capture.instants
        io.export_sequence(workdir / "frames", asset, times, suffix=frames, overwrite=True)
    report = write_results(asset, capture, workdir, seconds=seconds, title=title)
    keeper.discard()
    logging.info("Wrote %s: %s", workdir, json.dumps(report))


def read_source(
    path: str, size: tuple[int, int] | None, layout: str | None = None
) -> OrbitClip | Capture:
    """What `reconstruct` takes: a clip, or a capture of another layout.

    Raises:
        FileNotFoundError, ValueError: there is nothing that can be read.
    """
    if os.path.exists(path) and (layout or datasets.find_layout(path)) != "clip":
        capture = datasets.read_capture(path, size=size, layout=layout)
        logging.info(
            "%d frames of %d instants; the world is moved by %s and scaled by %.4g.",
            len(capture.moving),
            len(capture.instants),
            [-round(float(x), 4) for x in capture.centre],
            capture.scale,
        )
        return capture
    return read_clip(path, size=size)


def check_perceptual(config: ReconstructConfig, perceptual: Lpips | None) -> None:
    """Raises ValueError unless --perceptual and the weights of the loss lpips go together."""
    stages = (config.warmup, config.coarse, config.fine)
    weighted = any((stage.weights or config.weights).lpips > 0 for stage in stages)
    if weighted and perceptual is None:
        raise ValueError("config.weights.lpips is above 0: say which network with --perceptual.")
    if perceptual is not None and not weighted:
        raise ValueError("--perceptual has no part in the loss: set --config.weights.lpips=0.1.")


def load_perceptual(choice: str | None) -> Lpips | None:
    """The distance that --perceptual names: "stlpips", or BACKBONE:FILE with torchvision weights.

    Raises:
        FileNotFoundError, ValueError: it is neither, or the weights cannot be read.
    """
    if choice is None:
        return None
    if choice == "stlpips":
        return load_stlpips()
    backbone, colon, path = choice.partition(":")
    if not colon:
        raise ValueError(f"--perceptual is stlpips or BACKBONE:FILE, not {choice!r}.")
    return load_lpips(backbone, path)


def fit(
    source: OrbitClip | Capture,
    config: ReconstructConfig,
    seed: int,
    keeper: Keeper | None = None,
    perceptual: Lpips | None = None,
) -> tuple[Asset, float]:
    """Reconstructs with progress shown; returns the asset and the seconds this process took."""
    begin = time.monotonic()
    key, shown = jax.random.key(seed), ProgressLine()
    asset = reconstruct(source, config, key, shown, keeper=keeper, perceptual=perceptual)
    return asset, time.monotonic() - begin


def outputs(orbit: str = "orbit.mp4") -> tuple[str, ...]:
    """The names of the files that `write_results` writes."""
    files = ("asset.npz", "point_cloud.ply", "viewer.html", "novel.mp4", "comparison.png")
    return (*files, orbit, "report.json")


def to_config(config: ml_collections.ConfigDict) -> ReconstructConfig:
    """The library's configuration from `experiments/configs/reconstruct.py` or one like it.

    Raises:
        ValueError: a key is no field of the configuration, or a value is out of its range.
    """
    return _to_dataclass(ReconstructConfig, config.to_dict())


def write_results(
    asset: Asset,
    capture: Capture,
    workdir: Path,
    *,
    seconds: float,
    title: str = "",
    orbit: str = "orbit.mp4",
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the files of `outputs`; the report comes last.

    Args:
        asset: what was reconstructed.
        capture: what it was reconstructed from.
        workdir: an existing folder.
        seconds: that the fit took.
        title: of the viewer page.
        orbit: file name of the video along the orbit.
        facts: further entries of the report.

    Returns:
        The report. `psnr` (dB) and `ssim` are means over the frames of a view set, None for a set
        that the capture lacks. `alpha_iou` compares silhouettes and `floaters` is the share of the
        rendered alpha outside the true ones, where the frames have alpha.
        `front_unseen` judges the motion: PSNR over the front frames that are no frames of the
        orbit (a closed orbit ends where it began), and what the first static frame held still
        reaches on them, the best that an asset without motion could do.
    """
    (workdir / "report.json").unlink(missing_ok=True)
    io.save_asset(workdir / "asset.npz", asset)
    io.write_ply(workdir / "point_cloud.ply", asset.at(0.0))
    write_viewer(workdir / "viewer.html", asset, title=title or "Asset")
    sets, moving = capture.sets, capture.moving
    renders = {name: render_views(asset, views) for name, views in sets.items()}
    media.write_video(workdir / orbit, renders["dynamic"].rgb)
    side = _repeated(moving.camera, (len(moving) - 1) // 4, len(capture.instants))
    media.write_video(workdir / "novel.mp4", asset.render_video(side, capture.instants))
    alike = [name for name, views in sets.items() if views.rgb.shape[1:] == moving.rgb.shape[1:]]
    rows = [rgb for name in alike for rgb in (sets[name].rgb, renders[name].rgb)]
    media.write_image(workdir / "comparison.png", media.contact_sheet(rows, _COLUMNS))
    scores = {name: score(renders[name], views) for name, views in sets.items()}
    report = {
        **{key: _means(scores, key) for key in ("psnr", "ssim", "alpha_iou", "floaters")},
        "front_unseen": _front_unseen(capture, renders.get("front")),
        "centre": [float(x) for x in capture.centre],
        "scale": float(capture.scale),
        "seconds": round(seconds, 1),
        "splats": asset.meta["splats"],
        "steps": asset.meta["steps"],
        "implementation": asset.meta["implementation"],
        **(facts or {}),
    }
    text = json.dumps(report, indent=1, allow_nan=False)
    (workdir / "report.json").write_text(text + "\n", encoding="utf-8")
    return report


class ProgressLine:
    """Shows progress: on a terminal one line that is rewritten, elsewhere a log line now and then.

    The loss and PSNR shown are means over the last views, since single views differ a lot.
    """

    def __init__(self, interval: float = 20.0, window: int = 48):
        self._terminal = sys.stderr.isatty()
        self._interval = 0.5 if self._terminal else interval
        self._window = window
        self._shown = -math.inf
        self._recent: list[tuple[float, float]] = []

    def __call__(self, progress: Progress) -> None:
        """Takes note of a step; shows it when the last showing is long enough ago."""
        self._recent = [*self._recent, (progress.loss, progress.psnr)][-self._window :]
        last = progress.step == progress.total
        if time.monotonic() - self._shown < self._interval and not last:
            return
        self._shown = time.monotonic()
        loss, psnr = np.mean(self._recent, axis=0)
        text = (
            f"{progress.stage} {progress.step}/{progress.total}  loss {loss:.4f}"
            f"  PSNR {psnr:.1f} dB  {progress.splats} splats  ETA {progress.eta:.0f} s"
        )
        if self._terminal:
            print(f"\r{text}\x1b[K", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            logging.info("%s", text)


def _to_dataclass(kind: type, values: Mapping[str, Any]) -> Any:
    """A frozen dataclass from a nested dict."""
    kinds = typing.get_type_hints(kind)
    for name in values:
        if name not in kinds:
            raise ValueError(f"{name!r} is no field of {kind.__name__}; it has {', '.join(kinds)}.")
    kinds = {k: _without_none(kind) for k, kind in kinds.items()}
    nested = {
        k: v for k, v in values.items() if dataclasses.is_dataclass(kinds[k]) and v is not None
    }
    return kind(**values | {k: _to_dataclass(kinds[k], v) for k, v in nested.items()})


def _without_none(kind: Any) -> Any:
    """X of `X | None`, any other type as it is."""
    members = [member for member in typing.get_args(kind) if member is not type(None)]
    return members[0] if len(members) == 1 and type(None) in typing.get_args(kind) else kind


def _repeated(camera: Camera, index: int, times: int) -> Camera:
    one = jax.tree.map(np.asarray, camera[index])
    return jax.tree.map(lambda leaf: np.repeat(leaf[None], times, axis=0), one)


def _means(scores: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, float | None]:
    """The mean of one score over the frames of every view set; None where there is none."""
    views = dict.fromkeys([*_VIEWS, *scores])
    return {
        view: _mean(scores[view][key]) if key in scores.get(view, {}) else None for view in views
    }


def _mean(values: Any) -> float:
    """The mean, rounded.

    Raises:
        ValueError: it is not finite.
    """
    mean = float(np.mean(values))
    if not math.isfinite(mean):
        raise ValueError(f"A score is {mean}: the asset or the clip holds numbers that are not.")
    return round(mean, 4)


def _front_unseen(capture: Capture, render: Rendered | None) -> dict[str, float] | None:
    """PSNR of the front frames from which no orbit frame was taken; None without such frames."""
    if render is None or "static" not in capture.sets or len(render.rgb) != len(capture.moving):
        return None
    poses = np.asarray(capture.moving.camera.world_to_camera)
    unseen = ~np.isclose(poses, poses[0], atol=1e-5).all(axis=(1, 2))
    if not unseen.any():
        return None
    truth = np.asarray(capture.held_out["front"].rgb)[unseen]
    still = np.broadcast_to(np.asarray(capture.still.rgb)[:1], truth.shape)
    scores = {"psnr": render.rgb[unseen], "hold_still": still}
    return {name: _mean(metrics.psnr(frames, truth)) for name, frames in scores.items()}


if __name__ == "__main__":
    flags.DEFINE_string(
        "clip", None, "Folder of the clip, or another capture (gaussians.datasets).", required=True
    )
    flags.DEFINE_enum("layout", None, datasets.LAYOUTS, "Of --clip, where it is not clear.")
    flags.DEFINE_string(
        "perceptual", None, "For config.weights.lpips: stlpips, or BACKBONE:FILE of torchvision."
    )
    flags.DEFINE_string("workdir", None, "Folder for the results.", required=True)
    flags.DEFINE_bool("overwrite", False, "Start anew and replace the results of an earlier run.")
    flags.DEFINE_list("export", [], "Further formats of the splats at t = 0: spz, glb.")
    flags.DEFINE_enum(
        "frames", None, ["ply", "spz", "glb"], "Also writes every timestamp into WORKDIR/frames."
    )
    flags.DEFINE_integer("snapshot_every", 500, "Steps between two snapshots.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Places the first splats and orders the views.")
    flags.DEFINE_integer(
        "size", 0, "Pixels a side to resize the clip to; 0 keeps its size.", lower_bound=0
    )
    cli.define_config("reconstruct.py")
    cli.run(main)
