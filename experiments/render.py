"""Renders animated assets (.glb, .gltf) into clip folders, each asset in a Blender of its own.

    python -m experiments.render --setup=BLENDER_ENV
    python -m experiments.render --assets=GLB --out=OUT --blender_python=BLENDER_ENV/bin/python

The first makes a virtual environment with Blender as a Python module (`bpy`, GPL, which the library
never imports) and prints the path of its interpreter. The second renders every animation of every
asset below the folder GLB, or of a list (a tab-separated file with the column `asset` and, as
wanted, `action`, `clip`, `caption`, `source`, `licence`): OUT/CLIP are folders in the layout of
`d4d_jax.clips` with `caption.txt` and `clip.json`, OUT/manifest.tsv lists them, and
OUT/failures.tsv says what failed and why. A `manifest.tsv` beside the assets, with the columns
`file`, `source` and `licence`, is read. The same command again goes on where it was stopped, and
tries again what failed.

The defaults are quick, 128 pixels and 8 samples; as published: --resolution=256 --samples=128
--denoise --compat. Exit code 0: all was rendered. 3: some of it failed, and the rest is there.
1: a mistake in the command, or nothing could be rendered. 2: a flag is wrong.
"""

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

from absl import flags, logging

from d4d_jax.data import captions, render, render_list, render_process
from d4d_jax.data.render_settings import Settings
from experiments import cli

_SETTINGS = dataclasses.fields(Settings)


def main() -> None:
    """Renders the assets of the command line, or makes the environment for it."""
    options = flags.FLAGS
    if options.setup:
        print(render_process.setup(options.setup))
        return
    for name in ("assets", "out", "blender_python"):
        if not getattr(options, name):
            raise ValueError(f"--{name} is missing (or --setup=FOLDER, to make Blender's Python).")
    # Blender's processes end with this one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    renderer = make_renderer(options)
    table = captions.read_table(options.captions) if options.captions else None
    assets = render_list.find_assets(
        options.assets, root=options.root, licence=options.licence, captions=table
    )
    logging.info("%d assets go to %s.", len(assets), options.out)
    count, failures = render.render(
        assets,
        renderer,
        workers=options.workers,
        beam=options.beam,
        overwrite=options.overwrite,
    )
    logging.info("%d clips are in %s.", count, options.out)
    if failures:
        asset, action, reason = failures[0]
        first = f"{asset} {action}".strip()
        summary = (
            f"{len(failures)} failures are in {options.out}/failures.tsv, first {first}: {reason}"
        )
        if not count:
            raise ValueError(summary)
        logging.warning(summary)
        sys.exit(3)


def make_renderer(options: Any) -> render.Renderer:
    """The renderer that the flags describe; raises ValueError for values that cannot be."""
    settings = {field.name: getattr(options, field.name) for field in _SETTINGS}
    if settings["transforms"]:
        settings["transforms"] = str(Path(settings["transforms"]).absolute())
    return render.Renderer(
        out=str(Path(options.out).absolute()),
        command=tuple(render_process.blender_command(options.blender_python)),
        settings=Settings(**settings),
        at_most=options.clips_per_asset,
        time_limit=options.time_limit,
        memory_limit=options.memory_limit,
        max_megabytes=options.max_megabytes,
        threads=options.threads,
        captioner=options.captioner,
    )


if __name__ == "__main__":
    flags.DEFINE_string("assets", None, "Folder of .glb and .gltf files, or a list of them.")
    flags.DEFINE_string("root", None, "Folder that the paths of a list are relative to.")
    flags.DEFINE_string("out", None, "Folder of the clips.")
    flags.DEFINE_string("setup", None, "Make an environment with bpy there, and stop.")
    flags.DEFINE_string("blender_python", None, "A Python that has bpy, or a Blender executable.")
    flags.DEFINE_string("licence", "", "Only assets whose licence has this regular expression.")
    flags.DEFINE_bool("overwrite", False, "Replace clips that were made with other settings.")
    flags.DEFINE_integer("clips_per_asset", 0, "At most so many, drawn by the seed; 0 is all.")
    flags.DEFINE_string("captions", None, "Table of captions as of Cap3D: uid,caption.")
    flags.DEFINE_string("captioner", None, "package.module:function that writes the captions.")
    flags.DEFINE_integer("workers", 1, "Assets at a time, on this machine.", lower_bound=1)
    flags.DEFINE_multi_string("beam", None, "Option of an Apache Beam pipeline to render with.")
    flags.DEFINE_float("time_limit", 600, "Seconds for an import or a clip; 0 is no limit.")
    flags.DEFINE_float("memory_limit", 8, "GiB that Blender may use; 0 is no limit.")
    flags.DEFINE_float("max_megabytes", 128, "Size of the largest asset; 0 is no limit.")
    flags.DEFINE_integer("threads", 0, "Of each Blender; 0 is one a core.")
    flags.DEFINE_integer("resolution", 128, "Pixels a side.")
    flags.DEFINE_integer("supersample", 1, "Render so many times larger, and average.")
    flags.DEFINE_integer("samples", 8, "Samples a pixel.")
    flags.DEFINE_integer("frames", 24, "Timestamps of a clip.")
    flags.DEFINE_string("views", "dynamic,static,front", "Also right, back, left; fixed is all 4.")
    flags.DEFINE_string("passes", "", "depth,mask")
    flags.DEFINE_string("transforms", "", "D-NeRF list of further views to render.")
    flags.DEFINE_string("elevation", "0", "Degrees, or LOW,HIGH to draw it for each clip.")
    flags.DEFINE_float("azimuth", 0, "Degrees of view 0, counter-clockwise from the front.")
    flags.DEFINE_bool("azimuth_augmentation", False, "Draw the azimuth for each clip.")
    flags.DEFINE_bool("compat", False, "The published angles, lights and times, quirks included.")
    flags.DEFINE_enum("normalise", "first", ("first", "action"), "What fills the unit cube.")
    flags.DEFINE_float("loop_threshold", 0.01, "Share of the size that a loop may miss by.")
    flags.DEFINE_bool("open_loops", False, "Leave out the frame of a loop that is the first again.")
    flags.DEFINE_enum("engine", "cycles", ("cycles", "eevee"), "Blender's renderer.")
    flags.DEFINE_float("filter_width", 0.01, "Pixels; the published one, with hard edges.")
    flags.DEFINE_bool("denoise", False, "Open Image Denoise.")
    flags.DEFINE_integer("seed", 0, "Of all that is drawn.")
    cli.run(main)
