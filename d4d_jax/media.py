"""Pictures and videos on disk: png, gif, mp4, contact sheets. Frames are in [0, 1]."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from d4d_jax.typing import AnyArray


def to_uint8(frames: AnyArray) -> np.ndarray:
    """Rounds values in [0, 1] (clipped to that range) to 8 bits.

    Raises:
        ValueError: a value is not finite.
    """
    frames = np.asarray(frames, np.float32)
    if not np.isfinite(frames).all():
        raise ValueError("The frames hold NaN or infinite values and cannot be written.")
    return np.round(255 * np.clip(frames, 0, 1)).astype(np.uint8)


def write_image(path: str | os.PathLike, image: AnyArray) -> None:
    """Writes (h, w), (h, w, 3) or (h, w, 4) in [0, 1] as PNG (or by the suffix of `path`)."""
    _prepare(path)
    Image.fromarray(to_uint8(image)).save(path)


def write_video(
    path: str | os.PathLike, frames: AnyArray, *, fps: int = 8, min_size: int = 256
) -> None:
    """Writes (t, h, w, 3) in [0, 1] as .mp4 (H.264) or .gif, looping for .gif.

    Frames smaller than `min_size` pixels are enlarged by a whole factor, without smoothing, since
    players blur or refuse tiny videos.

    Raises:
        ValueError: the suffix is neither .mp4 nor .gif.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".mp4", ".gif"):
        raise ValueError(f"A video is written as .mp4 or .gif; got {str(path)!r}.")
    frames = to_uint8(frames)
    factor = max(1, -(-min_size // max(frames.shape[1:3])))
    frames = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    _prepare(path)
    if suffix == ".gif":
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=1000 // fps, loop=0)
        return
    import imageio.v3 as iio  # Imported here: it starts slowly and most users of media need no mp4.

    even = [(0, n % 2) for n in frames.shape[1:3]]  # H.264 in 4:2:0 wants even sizes.
    frames = np.pad(frames, [(0, 0), *even, (0, 0)], mode="edge")
    with warnings.catch_warnings():
        # JAX warns about forks; this one only starts ffmpeg.
        warnings.filterwarnings("ignore", message=r"os\.fork", category=RuntimeWarning)
        iio.imwrite(
            Path(path),
            frames,
            plugin="FFMPEG",
            fps=fps,
            codec="libx264",
            quality=None,
            macro_block_size=1,
            # One thread and no version string: the same frames give the same bytes.
            output_params=["-crf", "14", "-threads", "1", "-fflags", "+bitexact"],
        )


def contact_sheet(rows: Sequence[AnyArray], columns: int = 8) -> np.ndarray:
    """One picture of several videos, one below the other, each showing `columns` of its frames.

    Args:
        rows: videos (t, h, w, 3) in [0, 1] with equal frame sizes; t may differ.
        columns: frames shown of each, evenly spaced from the first to the last.

    Returns:
        (len(rows) h, columns w, 3) in [0, 1].

    Raises:
        ValueError: no videos, or their frame sizes differ.
    """
    sizes = sorted({tuple(np.shape(video)[1:]) for video in rows})
    if len(sizes) != 1:
        raise ValueError(f"A contact sheet needs videos of one frame size; got {sizes}.")
    strips = []
    for video in rows:
        video = np.asarray(video, np.float32)
        picks = np.round(np.linspace(0, len(video) - 1, columns)).astype(int)
        strips.append(np.concatenate(list(video[picks]), axis=1))
    return np.concatenate(strips, axis=0)


def _prepare(path: str | os.PathLike) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
