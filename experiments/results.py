"""What a reconstruction leaves in its folder: the asset as files, pictures, videos and figures."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from d4d_jax import media, metrics
from d4d_jax.cameras import Camera
from experiments.curves import plot_curve, read_curve
from gaussians import io
from gaussians.asset import Asset
from gaussians.captures import Capture, Views
from gaussians.evaluation import Rendered, render_views, score
from gaussians.viewer import write_viewer

#: The course of the optimization, written while it runs (`experiments.curves.CurveFile`).
CURVE = "curves.jsonl"

_VIEWS = ("dynamic", "static", "front")
_COLUMNS = 8
_FRAME = re.compile(r"\d{4,}\.(ply|spz|glb)")


def outputs(orbit: str = "orbit.mp4") -> tuple[str, ...]:
    """The names of the files that `write_results` writes."""
    files = ("asset.npz", "point_cloud.ply", "viewer.html", "novel.mp4", "depth.mp4")
    return (*files, "comparison.png", "curves.png", orbit, "report.json")


def further_outputs(formats: Sequence[str] = (), frames: str | None = None) -> tuple[str, ...]:
    """The names of what `write_results` writes where further formats are asked for."""
    return (*(f"point_cloud.{name}" for name in formats), *(["frames"] if frames else []))


def write_results(
    asset: Asset,
    capture: Capture,
    workdir: Path,
    *,
    seconds: float,
    title: str = "",
    orbit: str = "orbit.mp4",
    formats: Sequence[str] = (),
    frames: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the files of `outputs`; the report comes last.

    What an earlier run left in further formats is removed: it would show another asset. The curve
    is drawn of the `CURVE` in the folder, if it is there.

    Args:
        asset: what was reconstructed.
        capture: what it was reconstructed from.
        workdir: an existing folder.
        seconds: that the fit took.
        title: of the viewer page.
        orbit: file name of the video along the orbit.
        formats: in which the splats at t = 0 are written as well: "spz", "glb".
        frames: format of the splats of all instants, in the folder `frames`; None leaves them out.
        facts: further entries of the report.

    Returns:
        The report. `psnr` (dB) and `ssim` are means over the frames of a view set, None for a set
        that the capture lacks. `alpha_iou` compares silhouettes and `floaters` is the share of the
        rendered alpha outside the true ones, where the frames have alpha.
        `depth_range` is what the colours of `depth.mp4` span, in units of the asset's world.
        `front_unseen` judges the motion: PSNR over the front frames that are no frames of the
        orbit (a closed orbit ends where it began), and what the first static frame held still
        reaches on them, the best that an asset without motion could do.
    """
    (workdir / "report.json").unlink(missing_ok=True)  # It stands for a complete set of files.
    _remove_further(workdir)
    io.save_asset(workdir / "asset.npz", asset)
    for suffix in ("ply", *formats):
        io.export(workdir / f"point_cloud.{suffix}", asset)
    if frames is not None:
        io.export_sequence(
            workdir / "frames", asset, capture.instants, suffix=f".{frames}", overwrite=True
        )
    write_viewer(workdir / "viewer.html", asset, title=title or "Asset")
    renders = {name: render_views(asset, views) for name, views in capture.sets.items()}
    media.write_video(workdir / orbit, renders["dynamic"].rgb)
    depth_range = _write_further_views(asset, capture, renders, workdir)
    (workdir / "curves.png").unlink(missing_ok=True)
    if curve := read_curve(workdir / CURVE):
        plot_curve(curve, workdir / "curves.png")
    scores = {name: score(renders[name], views) for name, views in capture.sets.items()}
    report = {
        **{key: _means(scores, key) for key in ("psnr", "ssim", "alpha_iou", "floaters")},
        "front_unseen": _front_unseen(capture, renders.get("front")),
        "depth_range": depth_range,
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


def _remove_further(workdir: Path) -> None:
    """Removes point clouds and frames in further formats, but nothing that is not of ours."""
    for name in further_outputs(("spz", "glb")):
        (workdir / name).unlink(missing_ok=True)
    index = workdir / "frames" / "frames.json"
    try:
        frames = json.loads(index.read_text(encoding="utf-8"))["frames"]
        names = [str(frame["file"]) for frame in frames]
    except (OSError, ValueError, KeyError, TypeError):
        return  # There is no sequence.
    index.unlink()
    for name in filter(_FRAME.fullmatch, names):
        (index.parent / name).unlink(missing_ok=True)
    if not any(index.parent.iterdir()):
        index.parent.rmdir()


def _write_further_views(
    asset: Asset, capture: Capture, renders: Mapping[str, Rendered], workdir: Path
) -> list[float] | None:
    """Writes novel.mp4, depth.mp4 and comparison.png; returns the range of depth."""
    sets, moving = capture.sets, capture.moving
    side = _repeated(moving.camera, (len(moving) - 1) // 4, len(capture.instants))
    media.write_video(workdir / "novel.mp4", asset.render_video(side, capture.instants))
    depth, depth_range = depth_frames(asset, moving)
    media.write_video(workdir / "depth.mp4", depth)
    alike = [name for name, views in sets.items() if views.rgb.shape[1:] == moving.rgb.shape[1:]]
    rows = [rgb for name in alike for rgb in (sets[name].rgb, renders[name].rgb)]
    media.write_image(workdir / "comparison.png", media.contact_sheet(rows, _COLUMNS))
    return None if depth_range is None else [round(value, 4) for value in depth_range]


def depth_frames(
    asset: Asset, views: Views
) -> tuple[Float[np.ndarray, "v h w 3"], tuple[float, float] | None]:
    """Depth as colours, near red and far dark blue (turbo), fading into white with alpha.

    The colours span the 1st to the 99th percentile of what is mostly opaque in any of the views.

    Returns:
        The frames in [0, 1], and the nearest and farthest depth of the span, measured along the
        camera's axis; None where nothing is opaque.
    """
    from matplotlib import colormaps  # Imported here: it starts slowly.

    times = np.asarray(views.timestamps)
    renders = [asset.render(views.camera[i], float(times[i])) for i in range(len(views))]
    depth = np.stack([np.asarray(render.expected_depth) for render in renders])
    alpha = np.clip(np.stack([np.asarray(render.alpha) for render in renders]), 0, 1)
    if not (alpha > 0.5).any():
        return np.ones((*depth.shape, 3), np.float32), None
    near, far = (float(x) for x in np.percentile(depth[alpha > 0.5], (1, 99)))
    place = np.clip((far - depth) / max(far - near, 1e-6), 0, 1)
    colours = colormaps["turbo"](place)[..., :3].astype(np.float32)
    return colours * alpha[..., None] + 1 - alpha[..., None], (near, far)


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
