"""Make the shipped clips: render every row of a table with Blender and shrink the frames.

    python -m d4d_jax.data.render_assets --table=d4d_jax/assets/clips/clips.tsv \
        --assets=GLB_FOLDER --blender_python=PYTHON_WITH_BPY --out=OUT

Blender runs in a process of its own (`d4d_jax/data/blender.py`) for each row. Frames are rendered
larger and area-averaged with premultiplied colour, which removes most of the path tracer's noise.
Clips that are there already are kept, so an interrupted run continues.
"""

import argparse
import csv
import dataclasses
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d4d_jax import clips

COLUMNS = ("name", "caption", "asset", "action", "front", "source", "licence")


@dataclasses.dataclass(frozen=True)
class Row:
    """One clip to make.

    Attributes:
        name: of the clip's folder.
        caption: what the clip shows.
        asset: the .glb file, relative to the folder of assets.
        action: the animation's name in it.
        front: "yes" to keep the front frames too.
        source: where the asset comes from.
        licence: of the asset.
    """

    name: str
    caption: str
    asset: str
    action: str
    front: str
    source: str
    licence: str


def read_table(path: str | Path) -> list[Row]:
    """Reads a tab-separated table with the columns of `Row`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: other columns, an incomplete row, or a name twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no table {str(path)!r}.")
    with open(path, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{str(path)!r} needs the columns {', '.join(COLUMNS)};"
                f" it has {', '.join(reader.fieldnames or ())}."
            )
        lines = list(reader)
    names = set()
    for line in lines:
        if None in line or not all(line.values()):
            raise ValueError(f"{str(path)!r} has an incomplete row: {line['name']!r}.")
        if line["name"] in names:
            raise ValueError(f"{str(path)!r} has two rows named {line['name']!r}.")
        names.add(line["name"])
    return [Row(**line) for line in lines]


def render_row(
    row: Row,
    assets: Path,
    *,
    blender_python: str,
    resolution: int = 128,
    samples: int = 16,
    filter_width: float = 1.0,
    threads: int = 0,
) -> clips.OrbitClip:
    """Renders one row at `resolution` pixels and reads it back as a clip.

    Raises:
        RuntimeError: Blender failed; the message is the script's own.
    """
    script = Path(__file__).with_name("blender.py")
    views = "dynamic,static,front" if row.front == "yes" else "dynamic,static"
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "asset": assets / row.asset,
            "action": row.action,
            "out": folder,
            "resolution": resolution,
            "samples": samples,
            "filter_width": filter_width,
            "threads": threads,
            "views": views,
        }
        command = [blender_python, script, *(f"--{key}={value}" for key, value in options.items())]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise RuntimeError(f"{row.name}: {lines[-1]}")
        return dataclasses.replace(clips.read_clip(folder), caption=row.caption)


def border_alpha(clip: clips.OrbitClip) -> float:
    """The largest alpha on the image border of any frame: above 0 the object is cut off."""
    largest = 0.0
    for alpha in (clip.dynamic_alpha, clip.static_alpha, clip.front_alpha):
        if alpha is not None:
            frames = np.asarray(alpha)
            rows, columns = frames[:, [0, -1]], frames[:, :, [0, -1]]
            largest = max(largest, float(rows.max()), float(columns.max()))
    return largest


def write_small(clip: clips.OrbitClip, path: Path) -> None:
    """Writes a clip of the standard orbit without the camera files, which it does not need.

    The clip is written into a hidden folder beside `path`, which gets its name when it is
    complete: whatever stops this, `path` is there whole or not at all.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
    clips.write_clip(clip, partial)
    for camera in partial.glob("*.json"):
        camera.unlink()
    partial.rename(path)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--table", required=True, help="tab-separated, see Row")
    parser.add_argument("--assets", required=True, type=Path, help="folder of the .glb files")
    parser.add_argument("--blender_python", required=True, help="an interpreter that has bpy")
    parser.add_argument("--out", required=True, type=Path, help="folder of the clips to write")
    parser.add_argument("--size", type=int, default=64, help="pixels of the written frames")
    parser.add_argument("--resolution", type=int, default=128, help="pixels of the rendering")
    parser.add_argument("--samples", type=int, default=16, help="Cycles samples per pixel")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--only", help="comma-separated names of rows")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Makes the clips of the table; raises the errors of the functions above."""
    rows = read_table(args.table)
    if args.only:
        unknown = set(args.only.split(",")) - {row.name for row in rows}
        if unknown:
            raise ValueError(f"{args.table} has no row named {', '.join(sorted(unknown))}.")
        rows = [row for row in rows if row.name in args.only.split(",")]
    for row in rows:
        folder = args.out / row.name
        if folder.exists():
            print(f"{row.name}: kept, {folder} is there")
            continue
        large = render_row(
            row,
            args.assets,
            blender_python=args.blender_python,
            resolution=args.resolution,
            samples=args.samples,
            threads=args.threads,
        )
        write_small(large.resized(args.size, args.size), folder)
        cut = ", CUT OFF at the image border" if border_alpha(large) > 0 else ""
        print(f"{row.name}: motion {clips.read_clip(folder).motion:.2f}{cut}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse_args(argv))
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
