"""An asset at one timestamp, or at many, in the format that the file name asks for."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float

from d4d_jax.typing import AnyArray
from gaussians.asset import Asset
from gaussians.deformation import Timestamp
from gaussians.io import spz
from gaussians.io.gltf import write_glb
from gaussians.io.ply import write_ply

_WRITERS: dict[str, Callable[..., None]] = {
    ".ply": write_ply,
    ".spz": spz.write_spz,
    ".glb": write_glb,
}
_FORMAT = "d4d_jax frames 1"
_INDEX = "frames.json"
_FRAME = re.compile(r"\d{4,}\.(ply|spz|glb)")


def export(path: str | os.PathLike, asset: Asset, t: Timestamp = 0.0) -> None:
    """Writes the splats at timestamp t in [0, 1] as `.ply`, `.spz` or `.glb`, by the suffix.

    Raises:
        ValueError: as in `check_format`, t outside [0, 1], or splats that cannot be written.
    """
    suffix = Path(path).suffix.lower()
    check_format(suffix)
    _WRITERS[suffix](path, asset.at(t))


def check_format(suffix: str) -> None:
    """Passes if files with this suffix can be written here: ask before a long computation.

    Raises:
        ValueError: it is none of `.ply`, `.spz`, `.glb`, or its library is not installed.
    """
    if suffix.lower() not in _WRITERS:
        raise ValueError(
            f"Splats are written as {', '.join(_WRITERS)}, not as {suffix!r} (a whole asset is"
            " saved by `save_asset`)."
        )
    if suffix.lower() == ".spz":
        spz.library()


def export_sequence(
    folder: str | os.PathLike,
    asset: Asset,
    timestamps: Sequence[Timestamp] | Float[AnyArray, "t"],
    *,
    suffix: str = ".ply",
    overwrite: bool = False,
) -> None:
    """Writes `0000.ply`, `0001.ply`, ... and `frames.json`, which lists files and timestamps.

    All frames are made before the first one appears in the folder, and `frames.json` appears last:
    where it is, the sequence is complete.

    Args:
        folder: is made if needed. Files of other names in it are left alone.
        asset: moves every frame.
        timestamps: in [0, 1], one per frame, in any order.
        suffix: `.ply`, `.spz` or `.glb`.
        overwrite: removes the numbered frames of an earlier sequence, of any format and length.

    Raises:
        FileExistsError: the folder holds a sequence and `overwrite` is not set.
        ValueError: as in `export`, or no timestamps.
    """
    folder, suffix = Path(folder), suffix.lower()
    check_format(suffix)
    times = [float(t) for t in timestamps]
    if not times:
        raise ValueError(f"There are no timestamps to write to {folder}.")
    present = sorted(folder.iterdir()) if folder.exists() else []
    earlier = [path for path in present if path.name == _INDEX or _FRAME.fullmatch(path.name)]
    if earlier and not overwrite:
        raise FileExistsError(
            f"{folder} already holds {earlier[0].name}: choose another folder or overwrite it."
        )
    files = [f"{i:04d}{suffix}" for i in range(len(times))]
    index: dict[str, Any] = {"format": _FORMAT}
    index["frames"] = [{"file": f, "t": t} for f, t in zip(files, times, strict=True)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
        for name, t in zip(files, times, strict=True):
            _WRITERS[suffix](Path(made, name), asset.at(t))
        text = json.dumps(index, indent=1) + "\n"
        Path(made, _INDEX).write_text(text, encoding="utf-8")
        folder.mkdir(exist_ok=True)
        for path in sorted(earlier, key=lambda path: path.name != _INDEX):  # The index goes first.
            path.unlink()
        for name in [*files, _INDEX]:
            os.replace(Path(made, name), folder / name)
