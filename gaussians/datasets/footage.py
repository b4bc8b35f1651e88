"""Frames from images and videos, as a capture keeps them: composited, resized, and thinned out."""

import dataclasses
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageSequence

from d4d_jax.clips import WHITE, Color, read_image, resize

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif")

_BLACK: Color = (0.0, 0.0, 0.0)

#: No mask is dimmer all over, unless it counts from 0 to 1 instead of 255.
_DARK = 0.1


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How frames are read.

    Attributes:
        background: colour in [0, 1] on which frames with alpha are composited.
        size: (width, height) in pixels to resize all frames to; by default that of the files.
        stride: every so many instants are read.
        limit: at most so many instants, the earliest; held-out frames after them are left out.
        normalise: moves and scales the world so that the object stands around the origin, see
            `gaussians.datasets.normalisation`; otherwise it stays that of the files.
    """

    background: Color = WHITE
    size: tuple[int, int] | None = None
    stride: int = 1
    limit: int | None = None
    normalise: bool = True

    def __post_init__(self):
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise ValueError(f"size must be (width, height) in pixels; got {self.size!r}.")
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1; got {self.stride}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 instant, or None; got {self.limit}.")

    @property
    def slice(self) -> slice:
        """The instants to read, out of all of them in their order."""
        return slice(None, None if self.limit is None else self.limit * self.stride, self.stride)

    def choose(
        self, times: Float[np.ndarray, "n"], until: float | None = None
    ) -> Bool[np.ndarray, "n"]:
        """Which frames of a set to read, by the times of all of them.

        Args:
            times: of the frames; several may be at the same time.
            until: for held-out sets, the last instant of the training frames. It takes the place of
                `limit`.
        """
        instants = np.unique(times)
        if until is None:
            return np.isin(times, instants[self.slice])
        chosen = np.isin(times, instants[:: self.stride])
        return chosen & (times <= until) if self.limit is not None else chosen


@dataclasses.dataclass(frozen=True)
class Picture:
    """One frame.

    Attributes:
        name: what errors call it.
        rgb: (h, w, 3) in [0, 1], composited.
        alpha: (h, w) in [0, 1], or None without an alpha channel.
        width, height: in the file, before any resizing.
    """

    name: str
    rgb: np.ndarray
    alpha: np.ndarray | None
    width: int
    height: int


def read_picture(path: Path, options: ReadOptions) -> Picture:
    """Reads one image file.

    Raises:
        FileNotFoundError, ValueError: as `d4d_jax.clips.read_image` does.
    """
    return _picture(read_image(path), repr(str(path)), options)


def read_sequence(source: Path, options: ReadOptions) -> tuple[list[Picture], int, float | None]:
    """Reads the chosen frames of a folder of images, or of a video.

    Returns:
        The frames, how many there are in all, and the frames per second where the file tells.

    Raises:
        FileNotFoundError: there is no such folder or video.
        ValueError: it holds no frames, or they cannot be decoded or put in order.
    """
    if source.is_dir():
        paths = _numbered(source)
        return [read_picture(path, options) for path in paths[options.slice]], len(paths), None
    if not source.is_file():
        raise FileNotFoundError(f"There is no video {str(source)!r}.")
    wanted, pictures, count = options.slice, [], 0
    frames, fps = _decode_gif(source) if source.suffix.lower() == ".gif" else _decode_video(source)
    for frame in frames:
        if count % wanted.step == 0 and (wanted.stop is None or count < wanted.stop):
            name = f"Frame {count} of {str(source)!r}"
            pictures.append(_picture(frame.astype(np.float32) / 255, name, options))
        count += 1
    if not count:
        raise ValueError(f"{str(source)!r} holds no frames.")
    return pictures, count, fps


def read_mask(path: Path, options: ReadOptions) -> Picture:
    """Reads an image that is white where the object is."""
    return read_picture(path, dataclasses.replace(options, background=_BLACK))


def masked(picture: Picture, mask: Picture, background: Color) -> Picture:
    """A frame with a mask as its alpha, composited on the background.

    Raises:
        ValueError: the frame has alpha already, or the mask has another size or no white.
    """
    if picture.alpha is not None:
        raise ValueError(f"{picture.name} has an alpha channel and a mask; remove one of them.")
    if (picture.width, picture.height) != (mask.width, mask.height):
        raise ValueError(
            f"{picture.name} is {picture.width} x {picture.height} pixels, but its mask"
            f" {mask.name} is {mask.width} x {mask.height}."
        )
    alpha = mask.rgb.mean(-1)
    if 0 < alpha.max() < _DARK:
        raise ValueError(
            f"The mask {mask.name} is at most {round(255 * float(alpha.max()))} of 255; it must be"
            " white where the object is."
        )
    rgb = picture.rgb * alpha[..., None]
    rgb += (1 - alpha[..., None]) * np.asarray(background, np.float32)
    return dataclasses.replace(picture, rgb=rgb, alpha=alpha)


def masked_sequence(
    pictures: list[Picture], count: int, source: Path, options: ReadOptions
) -> list[Picture]:
    """The chosen frames of a sequence of `count`, with the masks that `source` holds for it.

    Raises:
        FileNotFoundError, ValueError: as `read_sequence` and `masked` do, or the numbers differ.
    """
    masks, found, _ = read_sequence(source, dataclasses.replace(options, background=_BLACK))
    if found != count:
        raise ValueError(f"{str(source)!r} holds {found} masks for {count} frames; give one each.")
    pairs = zip(pictures, masks, strict=True)
    return [masked(picture, mask, options.background) for picture, mask in pairs]


def _picture(image: np.ndarray, name: str, options: ReadOptions) -> Picture:
    height, width = image.shape[:2]
    rgb, alpha = image[..., :3], None
    if image.shape[-1] == 4:
        cover = image[..., 3:]
        rgb = rgb * cover + (1 - cover) * np.asarray(options.background, np.float32)
        alpha = image[..., 3].copy()  # A view would keep all of the image.
    if options.size not in (None, (width, height)):
        rgb = resize(rgb[None], *options.size)[0]
        alpha = None if alpha is None else resize(alpha[None, ..., None], *options.size)[0, ..., 0]
    return Picture(name, rgb, alpha, width, height)


def _numbered(folder: Path) -> list[Path]:
    """The images of a folder in the order of the numbers that their names end in."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGES]
    if not paths:
        raise ValueError(f"{str(folder)!r} holds no frames (0000.png, 0001.png, ...).")
    numbers = {}
    for path in paths:
        match = re.search(r"(\d+)$", path.stem)
        if match is None:
            raise ValueError(f"The name of the frame {str(path)!r} does not end in its number.")
        if int(match.group(1)) in numbers:
            twin = numbers[int(match.group(1))].name
            raise ValueError(f"{path.name} and {twin} in {str(folder)!r} have the same number.")
        numbers[int(match.group(1))] = path
    order = sorted(numbers)
    steps = np.diff(order)
    if len(set(steps.tolist())) > 1:
        wrong = int(np.argmax(steps))
        raise ValueError(
            f"The frames in {str(folder)!r} are not evenly numbered: {numbers[order[wrong]].name}"
            f" is followed by {numbers[order[wrong + 1]].name}."
        )
    return [numbers[i] for i in order]


def _decode_gif(path: Path) -> tuple[Iterator[np.ndarray], float | None]:
    try:
        file = Image.open(path)
        milliseconds = file.info.get("duration", 0)
    except (OSError, ValueError, SyntaxError) as error:
        raise _undecodable(path, error) from error

    def frames() -> Iterator[np.ndarray]:
        with file:
            try:
                for frame in ImageSequence.Iterator(file):
                    clear = "transparency" in file.info
                    yield np.asarray(frame.convert("RGBA" if clear else "RGB"))
            except (OSError, ValueError, SyntaxError) as error:
                raise _undecodable(path, error) from error

    return frames(), 1000 / milliseconds if milliseconds else None


def _decode_video(path: Path) -> tuple[Iterator[np.ndarray], float | None]:
    import imageio_ffmpeg  # Imported here: images do without it.

    # For files that ffmpeg refuses, that hold no video, or that end too early.
    errors = (OSError, RuntimeError, ValueError, IndexError, AttributeError, StopIteration)
    reader: Iterator[Any] = imageio_ffmpeg.read_frames(str(path))
    try:
        with warnings.catch_warnings():
            # JAX warns about forks; this one only starts ffmpeg.
            warnings.filterwarnings("ignore", message=r"os\.fork", category=RuntimeWarning)
            facts = next(reader)
        (width, height), fps = facts["size"], facts["fps"] or None
    except errors as error:
        raise _undecodable(path, error) from error

    def frames() -> Iterator[np.ndarray]:
        try:
            for data in reader:
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        except errors as error:
            raise _undecodable(path, error) from error

    return frames(), fps


def _undecodable(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return ValueError(f"The video {str(path)!r} cannot be decoded ({reason}); it may be truncated.")
