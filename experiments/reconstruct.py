"""Turns a clip into a moving 3D asset.

    python -m experiments.reconstruct --clip=DIR --workdir=OUT

fits deforming Gaussians to the dynamic and the static orbit in DIR (the published folder layout)
and writes into OUT: `asset.npz` (everything, for `gaussians.io.load_asset`), `viewer.html` (the
moving asset for any browser, one file), `point_cloud.ply` (the splats at t = 0), `orbit.mp4` (along
the orbit while time runs), `depth.mp4` (the same as depth), `novel.mp4` (from the side),
`comparison.png` (frames above their renders), `curves.png` and `curves.jsonl` (loss and PSNR of
every step) and `report.json`. Front frames in DIR are never trained on: they are held out to judge
the motion by. `--export=spz,glb` writes the splats in further formats, `--frames=ply` those of all
timestamps (`frames/0000.ply`, ...).

`--preset=fast` gives a usable asset of a 256 x 256 clip in less than 90 seconds on two cores,
`--preset=quality` takes longer than the default. `--viewer` shows the splats in a browser while
they are fitted.

Ctrl-C and SIGTERM save `snapshot.npz` first, as every few hundred steps do; the same command then
goes on from there, and ends with the asset that an uninterrupted run would have made.
"""

import contextlib
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
from absl import flags, logging

from d4d_jax.clips import OrbitClip, read_clip
from d4d_jax.metrics import Lpips, load_lpips, load_stlpips
from experiments import cli
from experiments.curves import CurveFile, Recent
from experiments.live import LiveViewer
from experiments.results import CURVE, further_outputs, outputs, write_results
from gaussians import datasets, io
from gaussians.asset import Asset
from gaussians.captures import Capture, of_clip
from gaussians.reconstruct import Progress, ReconstructConfig, reconstruct
from gaussians.snapshot import FileKeeper, Interrupted, Keeper

#: Sizes of a run: words of `experiments/configs/reconstruct.py`.
PRESETS = ("fast", "default", "quality")


def main() -> None:
    """Reconstructs the clip of the command line."""
    options = flags.FLAGS
    size = (options.size, options.size) if options.size else None
    source = read_source(options.clip, size, options.layout)
    config = to_config(options.config)
    perceptual = load_perceptual(options.perceptual)
    check_perceptual(config, perceptual)
    extra = {"formats": options.export, "frames": options.frames}
    for suffix in [*options.export, *filter(None, [options.frames])]:
        io.check_format(f".{suffix}")
    names = (*outputs(), *further_outputs(**extra))
    snapshot = Path(options.workdir) / "snapshot.npz"
    resumes = snapshot.exists() and not options.overwrite  # what lies there is to be replaced
    workdir = cli.claim_workdir(options.workdir, names, overwrite=options.overwrite or resumes)
    cli.log_devices()
    with contextlib.ExitStack() as stack:
        shown = options.viewer or options.viewer_hold
        viewer = stack.enter_context(start_viewer(source)) if shown else None
        with cli.profile(workdir), cli.stop_requests() as stop_signal:
            keeper = FileKeeper(snapshot, options.snapshot_every, lambda: stop_signal() > 0)
            if options.overwrite:
                keeper.discard()
            try:
                asset, seconds = fit(
                    source, config, options.seed, workdir, keeper, perceptual, viewer
                )
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
        report = write_results(asset, capture, workdir, seconds=seconds, title=title, **extra)
        keeper.discard()
        logging.info("Wrote %s: %s", workdir, json.dumps(report))
        if viewer is not None and options.viewer_hold:
            logging.info("The live viewer stays until Ctrl-C.")
            viewer.wait()


def start_viewer(source: OrbitClip | Capture) -> LiveViewer:
    """The live viewer that the command line asks for, looking from the first camera.

    Raises:
        ValueError: viser is not installed.
    """
    camera = source.camera if isinstance(source, OrbitClip) else source.moving.camera
    options = flags.FLAGS
    viewer = LiveViewer(host=options.viewer_host, port=options.viewer_port, camera=camera[0])
    logging.info("The live viewer is at http://%s:%d.", options.viewer_host, viewer.port)
    return viewer


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
    weighted = needs_perceptual(config)
    if weighted and perceptual is None:
        raise ValueError("config.weights.lpips is above 0: say which network with --perceptual.")
    if perceptual is not None and not weighted:
        raise ValueError("--perceptual has no part in the loss: set --config.weights.lpips=0.1.")


def needs_perceptual(config: ReconstructConfig) -> bool:
    """Whether the loss lpips has a weight in any stage."""
    stages = (config.warmup, config.nodes, config.coarse, config.fine)
    return any((stage.weights or config.weights).lpips > 0 for stage in stages)


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
    workdir: Path,
    keeper: Keeper | None = None,
    perceptual: Lpips | None = None,
    viewer: LiveViewer | None = None,
) -> tuple[Asset, float]:
    """Reconstructs with progress shown and written down as `results.CURVE` in the workdir.

    Returns:
        The asset, and the seconds that this process took.
    """
    begin, key = time.monotonic(), jax.random.key(seed)
    with contextlib.closing(CurveFile(workdir / CURVE)) as curve:
        told = [ProgressLine(), curve, *filter(None, [viewer])]

        def tell(progress: Progress) -> None:
            for callback in told:
                callback(progress)

        asset = reconstruct(source, config, key, tell, keeper=keeper, perceptual=perceptual)
    return asset, time.monotonic() - begin


def to_config(config: ml_collections.ConfigDict) -> ReconstructConfig:
    """The library's configuration from `experiments/configs/reconstruct.py` or one like it.

    Raises:
        ValueError: a key is no field of the configuration, or a value is out of its range.
    """
    return _to_dataclass(ReconstructConfig, config.to_dict())


class ProgressLine:
    """Shows progress: on a terminal one line that is rewritten, elsewhere a log line now and then.

    The loss and PSNR shown are means over the last views, since single views differ a lot.
    """

    def __init__(self, interval: float = 20.0):
        self._terminal = sys.stderr.isatty()
        self._interval = 0.5 if self._terminal else interval
        self._shown = -math.inf
        self._recent = Recent()

    def __call__(self, progress: Progress) -> None:
        """Takes note of a step; shows it when the last showing is long enough ago."""
        loss, psnr = self._recent(progress)
        last = progress.step == progress.total
        if time.monotonic() - self._shown < self._interval and not last:
            return
        self._shown = time.monotonic()
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
    flags.DEFINE_bool("viewer", False, "Show the splats in a browser while they are fitted.")
    flags.DEFINE_string("viewer_host", "127.0.0.1", "Address of the viewer; 0.0.0.0 for any.")
    flags.DEFINE_integer("viewer_port", 8080, "Port of the viewer, or the next free one.")
    flags.DEFINE_bool("viewer_hold", False, "Like --viewer, which then stays until Ctrl-C.")
    flags.DEFINE_integer("snapshot_every", 500, "Steps between two snapshots.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Places the first splats and orders the views.")
    flags.DEFINE_integer(
        "size", 0, "Pixels a side to resize the clip to; 0 keeps its size.", lower_bound=0
    )
    cli.define_config("reconstruct.py")
    cli.define_preset(PRESETS)
    cli.run(main)
