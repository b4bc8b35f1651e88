"""Scores an asset against the frames of a clip, view set by view set and frame by frame.

    python -m experiments.evaluate --asset=OUT/asset.npz --clip=DIR --workdir=EVAL

prints a table of means and writes into EVAL: `evaluation.json` (means and single frames),
`evaluation.png` (the single frames as curves) and `evaluation_NAME.png` per view set (frames above
their renders). The view sets are the dynamic orbit, the static orbit, and the front frames, which
no reconstruction is fitted to; of other captures, the frames to fit and each held-out set. The
column `still` is the PSNR of the asset holding its pose of the static orbit, or that of t = 0 where
there is none: what its motion has to beat.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags, logging

from d4d_jax import media, metrics
from d4d_jax.metrics import Lpips
from experiments import cli
from experiments.reconstruct import load_perceptual
from gaussians import datasets, io
from gaussians.asset import Asset
from gaussians.captures import Capture
from gaussians.evaluation import render_views, score

#: Of the table and the plot: key, heading, unit.
_COLUMNS = (
    ("psnr", "PSNR", "dB"),
    ("still", "still", "dB"),
    ("ssim", "SSIM", ""),
    ("lpips", "LPIPS", ""),
    ("alpha_iou", "IoU", ""),
    ("floaters", "floaters", ""),
)

Scores = Mapping[str, np.ndarray]


def main() -> None:
    """Evaluates the asset of the command line."""
    options = flags.FLAGS
    asset = io.load_asset(options.asset)
    size = (options.size, options.size) if options.size else None
    capture = datasets.read_capture(
        options.clip, size=size, background=asset.background, layout=options.layout
    )
    rest = asset.meta.get("static_time")
    if rest is not None and capture.still is not None:
        times = np.full(len(capture.still), rest, np.float32)
        still = dataclasses.replace(capture.still, timestamps=times)
        capture = dataclasses.replace(capture, still=still)
    perceptual = load_perceptual(options.perceptual)
    names = ["evaluation.json", "evaluation.png", *(f"evaluation_{n}.png" for n in capture.sets)]
    workdir = cli.claim_workdir(options.workdir, names, overwrite=options.overwrite)
    cli.log_devices()
    scores = evaluate(asset, capture, rest or 0.0, workdir, perceptual)
    write_report(scores, capture, workdir)
    print(table(scores))
    logging.info("Wrote %s.", workdir)


def evaluate(
    asset: Asset, capture: Capture, rest: float, workdir: Path, perceptual: Lpips | None = None
) -> dict[str, Scores]:
    """Scores per frame of every view set; writes a picture of each set.

    Args:
        asset: what is scored.
        capture: its view sets.
        rest: timestamp of the pose that the column `still` holds.
        workdir: an existing folder.
        perceptual: for the score `lpips`.
    """
    scores = {}
    for name, views in capture.sets.items():
        rendered = render_views(asset, views)
        held = metrics.psnr(render_views(asset, views, at=rest).rgb, views.rgb)
        scores[name] = score(rendered, views, perceptual) | {"still": np.minimum(held, 100.0)}
        sheet = media.contact_sheet([views.rgb, rendered.rgb], min(12, len(views)))
        media.write_image(workdir / f"evaluation_{name}.png", sheet)
    return scores


def write_report(scores: Mapping[str, Scores], capture: Capture, workdir: Path) -> None:
    """Writes `evaluation.json` and `evaluation.png`.

    Raises:
        ValueError: a score is not finite, as where a render equals its frame in every bit.
    """
    report: dict[str, Any] = {}
    for name, views in capture.sets.items():
        frames = {key: [round(float(v), 4) for v in values] for key, values in scores[name].items()}
        means = {key: round(float(np.mean(values)), 4) for key, values in scores[name].items()}
        times = [round(float(t), 4) for t in np.asarray(views.timestamps)]
        report[name] = {"mean": means, "frames": {"timestamp": times, **frames}}
    text = json.dumps(report, indent=1, allow_nan=False)
    (workdir / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    _plot(scores, capture, workdir / "evaluation.png")


def table(scores: Mapping[str, Scores]) -> str:
    """A markdown table of the means, one row a view set."""
    shown = _present(scores)
    headings = [f"{heading} ({unit})" if unit else heading for _, heading, unit in shown]
    lines = [
        f"| views | frames | {' | '.join(headings)} |",
        "|---" + "|--:" * (len(shown) + 1) + "|",
    ]
    for name, values in scores.items():
        cells = [f"{np.mean(values[key]):.4g}" if key in values else "-" for key, _, _ in shown]
        lines.append(f"| {name} | {len(values['psnr'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _present(scores: Mapping[str, Scores]) -> list[tuple[str, str, str]]:
    return [column for column in _COLUMNS if any(column[0] in s for s in scores.values())]


def _plot(scores: Mapping[str, Scores], capture: Capture, path: Path) -> None:
    """One panel a score, one curve a view set."""
    from matplotlib.figure import Figure  # Imported here: it starts slowly.

    columns = _present(scores)
    figure = Figure(figsize=(9, 2.2 * len(columns)), layout="constrained")
    panels = figure.subplots(len(columns), sharex=True)
    for panel, (key, heading, unit) in zip(panels, columns, strict=True):
        for name, views in capture.sets.items():
            if key in scores[name]:
                # Frames of one instant, as of the static orbit, are drawn side by side.
                order = np.argsort(np.asarray(views.timestamps), kind="stable")
                places = np.linspace(0, 1, len(views))
                panel.plot(places, scores[name][key][order], marker=".", label=name)
        panel.set_ylabel(f"{heading} ({unit})" if unit else heading)
    panels[0].legend()
    panels[-1].set_xlabel("frame, in the order of time, from first to last")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    flags.DEFINE_string("asset", None, "An asset.npz of a reconstruction.", required=True)
    flags.DEFINE_string(
        "clip", None, "Folder of the clip, or another capture (gaussians.datasets).", required=True
    )
    flags.DEFINE_enum("layout", None, datasets.LAYOUTS, "Of --clip, where it is not clear.")
    flags.DEFINE_string("perceptual", None, "Adds LPIPS: stlpips, or BACKBONE:FILE of torchvision.")
    flags.DEFINE_string("workdir", None, "Folder for the results.", required=True)
    flags.DEFINE_bool("overwrite", False, "Replace the results of an earlier evaluation.")
    flags.DEFINE_integer(
        "size", 0, "Pixels a side to resize the clip to; 0 keeps its size.", lower_bound=0
    )
    cli.run(main)
