"""Reconstructs several clips in several ways and tabulates the scores of held-out views.

    python -m experiments.ablate --clips=DIR --clips=DIR --words=default --words=hexplane \\
        --seeds=3 --workdir=OUT

runs `reconstruct` for every clip, every configuration (words of
experiments/configs/reconstruct.py, see there) and every seed, and writes
`OUT/WORDS/CLIP/SEED.json` with the means of every view set, and beside it the held-out frames above
their renders (`SEED.png`). Runs that are there already are not repeated, so the table grows, and an
interrupted one goes on. `OUT/table.md`, which is also printed, has one row for each words: means
over the clips, of the views held out (`transforms_test.json` of a clip where it has one, else its
front frames), and what holding the static pose still scores there.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from d4d_jax import media, metrics
from d4d_jax.metrics import Lpips
from experiments import cli
from experiments.configs import reconstruct as configs
from experiments.reconstruct import load_perceptual, needs_perceptual, to_config
from gaussians import datasets
from gaussians.captures import Capture
from gaussians.evaluation import render_views, score
from gaussians.reconstruct import ReconstructConfig, reconstruct

_HELD_OUT = ("test", "front")
_SHEET_FRAMES = 16


def main() -> None:
    """Runs what is missing and prints the table."""
    options = flags.FLAGS
    variants = {words: to_config(configs.get_config(words)) for words in options.words}
    perceptual = load_perceptual(options.perceptual)
    for words, config in variants.items():
        if perceptual is None and needs_perceptual(config):
            raise ValueError(f"The words {words!r} weigh the loss lpips: pass --perceptual, too.")
    size = (options.size, options.size) if options.size else None
    clips = {Path(path).name: path for path in options.clips}
    if len(clips) < len(options.clips):
        raise ValueError("Two of the --clips have the same folder name; rename one.")
    for path in options.clips:
        if datasets.find_layout(path) != "clip":
            raise ValueError(f"{path} is no clip folder (multi_frame0.png, ...).")
        # A mistake is told before hours of work, not after.
        held_out_of(datasets.read_capture(path, size=(8, 8)).sets)
    workdir = Path(options.workdir)
    cli.log_devices()
    for seed in range(options.seeds):
        for words, config in variants.items():
            for name, path in clips.items():
                target = workdir / words / name / f"{seed}.json"
                if target.exists():
                    continue
                capture = datasets.read_capture(path, size=size)
                report = run_once(capture, config, seed, target.with_suffix(".png"), perceptual)
                write_json(target, report)
                logging.info("%s, %s, seed %d: %s", words, name, seed, json.dumps(report))
    text = table(read_reports(workdir, list(variants), list(clips)))
    (workdir / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def run_once(
    capture: Capture,
    config: ReconstructConfig,
    seed: int,
    picture: Path,
    perceptual: Lpips | None = None,
) -> dict[str, Any]:
    """One reconstruction: its seconds, its splats, and the mean scores of every view set.

    `perceptual` is scored, and part of the loss where its weight is above 0. `still` among the
    scores is the PSNR of the static pose held still.
    """
    begin = time.monotonic()
    in_loss = perceptual if needs_perceptual(config) else None
    asset = reconstruct(capture, config, jax.random.key(seed), perceptual=in_loss)
    jax.block_until_ready(asset.params)
    seconds = time.monotonic() - begin
    rest = asset.meta["static_time"] or 0.0
    report: dict[str, Any] = {"seconds": round(seconds, 1), "splats": asset.meta["splats"]}
    picture.parent.mkdir(parents=True, exist_ok=True)
    for name, views in capture.sets.items():
        rendered = render_views(asset, views)
        still = metrics.psnr(render_views(asset, views, at=rest).rgb, views.rgb)
        scores = score(rendered, views, perceptual) | {
            "still": np.minimum(np.asarray(still), 100.0)
        }
        report[name] = {key: round(float(np.mean(v)), 4) for key, v in scores.items()}
        if name == held_out_of(capture.sets):
            step = max(1, len(views) // _SHEET_FRAMES)
            rows = [np.asarray(views.rgb)[::step], rendered.rgb[::step]]
            media.write_image(picture, media.contact_sheet(rows, _SHEET_FRAMES))
    return report


def held_out_of(sets: Mapping[str, Any]) -> str:
    """The view set that decides: "test", else "front".

    Raises:
        ValueError: there is neither.
    """
    for name in _HELD_OUT:
        if name in sets:
            return name
    raise ValueError("The clip has no views to judge by: no transforms_test.json, no front frames.")


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Writes a report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_reports(
    workdir: Path, variants: Sequence[str], clips: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """All finished reports of the named variants on the named clips, of any seed."""
    return {
        words: [
            json.loads(path.read_text(encoding="utf-8")) | {"clip": clip, "seed": path.stem}
            for clip in clips
            for path in sorted((workdir / words / clip).glob("*.json"))
        ]
        for words in variants
    }


def table(reports: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: a row for each variant, and the spread of its mean over seeds where it has more."""
    columns = (
        "runs | PSNR (dB) | over still (dB) | SSIM | LPIPS | IoU | floaters | dynamic (dB) | s"
    )
    lines = [f"| words | {columns} |", "|---" + "|--:" * 9 + "|"]
    for words, runs in reports.items():
        sets = [run[held_out_of(run)] for run in runs]
        common = set.intersection(*map(set, sets))
        mean = {key: float(np.mean([s[key] for s in sets])) for key in common}
        dynamic = np.mean([run["dynamic"]["psnr"] for run in runs])
        by_seed = [
            np.mean([s["psnr"] for s, run in zip(sets, runs, strict=True) if run["seed"] == seed])
            for seed in sorted({run["seed"] for run in runs})
        ]
        spread = f" ± {np.std(by_seed, ddof=1):.2f}" if len(by_seed) > 1 else ""
        cells = [
            f"{len(runs)}",
            f"{mean['psnr']:.2f}{spread}",
            f"{mean['psnr'] - mean['still']:+.2f}",
            f"{mean['ssim']:.3f}",
            f"{mean['lpips']:.3f}" if "lpips" in mean else "-",
            f"{mean['alpha_iou']:.3f}" if "alpha_iou" in mean else "-",
            f"{100 * mean['floaters']:.1f} %" if "floaters" in mean else "-",
            f"{dynamic:.2f}",
            f"{np.median([run['seconds'] for run in runs]):.0f}",
        ]
        lines.append(f"| `{words}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    flags.DEFINE_multi_string("clips", None, "A clip folder; may be repeated.", required=True)
    flags.DEFINE_multi_string(
        "words", ["default"], "Words of experiments/configs/reconstruct.py; may be repeated."
    )
    flags.DEFINE_string("perceptual", None, "Scores LPIPS, too: as in experiments.reconstruct.")
    flags.DEFINE_integer("seeds", 1, "Runs of each, with seeds from 0.", lower_bound=1)
    flags.DEFINE_integer("size", 0, "Pixels a side; 0 keeps the clips' size.", lower_bound=0)
    flags.DEFINE_string("workdir", None, "Folder for the reports.", required=True)
    cli.run(main)
