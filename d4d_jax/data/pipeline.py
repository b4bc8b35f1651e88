"""Training batches of orbital clips, through grain.

The order of the stream is a function of the seed alone: every epoch shuffles all clips anew, the
stream repeats for ever, and process k of n takes elements k, k + n, k + 2n ... of it. So a batch
can be asked for again by its number, an iterator resumes from `get_state()` alone, and the
processes of a run read disjoint parts of one stream, also when their number changes.
"""

import copy
import functools
import logging
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import grain
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError

from d4d_jax import clips, motion
from d4d_jax.data import records
from d4d_jax.typing import AnyArray

_LOGGER = logging.getLogger(__name__)

#: What reading a damaged clip raises, in Pillow, msgpack, zlib and our own checks.
_UNREADABLE = (ValueError, KeyError, TypeError, EOFError, OSError, zlib.error)

#: A clip as the network sees it; the keys are described in `element`.
Element = dict[str, Any]


def make_dataset(
    source: "str | os.PathLike | Sequence[clips.OrbitClip] | records.Records | ClipSource",
    *,
    batch_size: int,
    seed: int = 0,
    size: int | None = None,
    static_probability: float = 0.0,
    random_start: bool = False,
    background: clips.Color | Literal["random"] = clips.WHITE,
    keys: bool = False,
    shuffle: bool = True,
    num_epochs: int | None = None,
    shard_index: int = 0,
    shard_count: int = 1,
    cache_bytes: int = 2**30,
    num_threads: int = 2,
) -> grain.IterDataset:
    """An endless dataset of batches. `iter()` of it has `get_state()` and `set_state()`.

    A batch is a dict: `dynamic` and `static` (b, t, h, w, 4) in [-1, 1], `camera` (b, t, 4, 4),
    `motion` (b,), all float32, and `caption` (b,), strings. See `element` for their meaning. Of a
    source of latents, `dynamic_latents` and `static_latents` (b, t, h, w, c) stand for the frames.

    Args:
        source: a folder whose subfolders are clips, the folder of a data set (its split "train"),
            an open data set, or clips. All clips need dynamic and static frames with alpha, of one
            size and number. Or a `ClipSource`, whose decoded clips are shared with other users of
            it; its own `size` and `cache_bytes` hold then.
        batch_size: clips a batch of this process; every batch is full.
        seed: of the order and of the choice of static samples.
        size: pixels to resize to, square; by default the clips keep their common size.
        static_probability: how often a clip stands still instead: `dynamic` becomes its static
            orbit and `motion` 0. The paper trains on such static samples beside the moving ones.
        random_start: let the orbit of samples that stand still begin at a random view: frames and
            cameras roll together. Moving samples keep their start, since their views are tied to
            timestamps; render them from random azimuths instead.
        background: colour in [0, 1] behind the object, or "random", drawn anew for every sample.
        keys: add `key` (b, 2) uint32, a random key of every sample, for what the training step
            draws, such as the dropout of conditions: `jax.random.wrap_key_data(batch["key"])`.
        shuffle: False keeps the order of the folder names, or of the clips.
        num_epochs: passes over the clips; None repeats for ever.
        shard_index: which part of the stream to read, usually `jax.process_index()`.
        shard_count: the number of parts, usually `jax.process_count()`.
        cache_bytes: clips are kept decoded in memory up to this total; 0 decodes every time.
        num_threads: that decode ahead, in this process.

    Raises:
        FileNotFoundError: the folder is missing or holds no clips.
        ValueError: a clip lacks frames or differs in size, or an argument is out of its range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if not 0 <= static_probability <= 1:
        raise ValueError(f"static_probability must lie in [0, 1]; got {static_probability}.")
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"There is no shard {shard_index} of {shard_count}; count from 0.")
    if isinstance(source, ClipSource):
        if size is not None:
            raise ValueError(f"Give size={size} to the ClipSource, which decodes the clips.")
        clip_source = source
    else:
        clip_source = ClipSource(source, size=size, cache_bytes=cache_bytes)

    if background != clips.WHITE and clip_source.latents is not None:
        raise ValueError(f"Latents are those of frames on white, not on background={background!r}.")
    if random_start and any(clip_source.further):
        raise ValueError(
            "random_start would leave the entries of `extended` at the old first view."
        )

    vary = functools.partial(
        _vary,
        static_probability=static_probability,
        random_start=random_start,
        background=background,
        keys=keys,
    )
    dataset = grain.MapDataset.source(_Stored(clip_source)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat(num_epochs).random_map(vary)
    dataset = dataset[shard_index::shard_count]
    if len(dataset) < batch_size:
        raise ValueError(
            f"Shard {shard_index} of {shard_count} holds {len(dataset)} clips, fewer than"
            f" batch_size={batch_size}; lower it or raise num_epochs={num_epochs}."
        )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    # The frames of a batch are converted together: 8 bits are quicker to move than floats.
    dataset = dataset.batch(batch_size, drop_remainder=True).map(_finish)
    return dataset.to_iter_dataset(options)


def element(clip: clips.OrbitClip) -> Element:
    """A clip as the network sees it.

    Args:
        clip: with dynamic and static frames and their alpha, on any background.

    Returns:
        `dynamic`, `static`: (t, h, w, 4) float32 in [-1, 1]: the colours on white, then alpha.
        `camera`: (t, 4, 4) float32 camera-to-world, OpenGL axes.
        `motion`: float32 scalar, the magnitude m of Eq. 1 times 100, on the colours.
        `caption`: a string as a numpy scalar array.

    Raises:
        ValueError: frames or alpha are missing.
    """
    views = {}
    for view in ("dynamic", "static"):
        frames, alpha = getattr(clip, view), getattr(clip, f"{view}_alpha")
        if frames is None or alpha is None:
            lacks = f"{view} frames" if frames is None else f"alpha of the {view} frames"
            raise ValueError(f"A clip for training needs its {lacks}.")
        views[view] = _model_space(frames, alpha, clip.background)
    magnitude = motion.motion_magnitude(views["dynamic"][..., :3], views["static"][..., :3])
    return {
        **views,
        "camera": np.asarray(clip.camera.opengl_camera_to_world, np.float32),
        "motion": np.float32(magnitude),
        "caption": np.asarray(clip.caption),
    }


def record_element(record: records.Record, *, size: int | None = None) -> Element:
    """A record of a data set as the network sees it: see `element`.

    Args:
        record: with dynamic and static frames.
        size: pixels to resize to, square (area averaging when shrinking).

    Raises:
        ValueError: it lacks frames.
    """
    return _to_model_space(_stored_element(record, size))


def roll(sample: Element, views: int) -> Element:
    """A still sample whose orbit begins so many views later, round and round, with its cameras.

    The last view of a closed orbit is the first one again, also afterwards.

    Raises:
        ValueError: the sample moves, so that its views are tied to timestamps.
    """
    if sample["motion"] != 0:
        raise ValueError("Only samples that stand still can begin at another view.")
    count = len(sample["camera"])
    if np.allclose(sample["camera"][0], sample["camera"][-1], atol=1e-4):
        order = (np.arange(count) + views) % (count - 1)
    else:
        order = (np.arange(count) + views) % count
    names = {"dynamic", "static", *records.LATENTS, "camera"} & sample.keys()
    return {**sample, **{name: sample[name][order] for name in names}}


class ClipSource:
    """Random access to the elements of a folder of clips, a data set, or a sequence of clips.

    The clips of a folder come in the order of their names. Decoded elements stay in memory up to
    `cache_bytes`; treat them as read-only. `len()` and `[i]` are what grain needs.

    Attributes:
        num_frames: the number t of frames, the same for all clips.
        corrupt: why clips were left out, by their index.
        latents: what the data set says of its latents when these are read instead of frames, which
            takes an open one, `Records(path, split, views=records.LATENTS)`; else None.
    """

    def __init__(
        self,
        source: str | os.PathLike | Sequence[clips.OrbitClip] | records.Records,
        *,
        size: int | None = None,
        cache_bytes: int = 2**30,
        max_corrupt: float | int = 0.0,
    ):
        """Finds the clips and checks, from file names and headers, that they fit together.

        Of the folder of a data set the split "train" is taken.

        Args:
            size, cache_bytes: as for `make_dataset`.
            max_corrupt: share of the clips that may be unreadable, in [0, 1). Each is logged once,
                and the next readable clip takes its place, so that the order of the others and the
                position of an iterator stay what they were.

        Raises:
            FileNotFoundError, ValueError: as `make_dataset`; or more clips cannot be read.
        """
        if not 0 <= max_corrupt < 1:
            raise ValueError(f"max_corrupt must lie in [0, 1), but it is {max_corrupt}.")
        self._max_corrupt = max_corrupt
        self.corrupt: dict[int, str] = {}
        if isinstance(source, (str, os.PathLike)) and records.is_dataset(source):
            source = records.Records(source)
        self.latents = source.latents if isinstance(source, records.Records) else None
        if self.latents is not None and size not in (None, self.latents["size"]):
            raise ValueError(
                f"The latents are those of frames of {self.latents['size']} pixels, not of {size}."
            )
        self._clips: Sequence[Path | clips.OrbitClip | records.Record]
        if isinstance(source, records.Records):
            self._clips = source
            shapes = {f"{source!r}, shape {i}": shape for i, shape in enumerate(source.shapes)}
        elif isinstance(source, (str, os.PathLike)):
            paths = find_clips(source)
            self._clips, shapes = paths, {}
            for i, path in enumerate(paths):
                try:
                    shapes[str(path)] = _probe(path)
                except ValueError as error:
                    self._note_corrupt(i, error)
        else:
            if not source:
                raise ValueError("The sequence of clips is empty; give at least one.")
            self._clips = list(source)
            shapes = {f"clip {i}": _shape(clip) for i, clip in enumerate(source)}
        _check_equal(shapes, any_size=size is not None)
        self.num_frames = next(iter(shapes.values()))[0]
        self._size = size
        self._cache: dict[int, Element] = {}
        self._room = cache_bytes
        self.further: Sequence[Element] = [{}] * len(self)

    def extended(self, further: Sequence[Element]) -> "ClipSource":
        """The same clips with further entries in their elements, such as embeddings of captions.

        Args:
            further: entries for every clip.

        Raises:
            ValueError: there are not as many as clips.
        """
        if len(further) != len(self):
            raise ValueError(f"There are {len(self)} clips, but entries for {len(further)}.")
        other = copy.copy(self)
        other.further = list(further)
        return other

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> Element:
        return _to_model_space(self.stored(index))

    def stored(self, index: int) -> Element:
        """An element whose frames may still be in 8 bits, straight RGBA."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self!r} has no clip {index}.")
        index %= len(self)
        for i in (*range(index, len(self)), *range(index)):
            if i in self.corrupt:
                continue
            try:
                return {**self._decoded(i), **self.further[i]}
            except _UNREADABLE as error:
                self._note_corrupt(i, error)
        raise AssertionError("the last readable clip cannot have been counted out")

    def _note_corrupt(self, index: int, error: Exception) -> None:
        count = len(self.corrupt) + 1
        if not self._max_corrupt:
            raise error
        if count > self._max_corrupt * len(self):
            raise ValueError(
                f"{count} of {len(self)} clips cannot be read, more than a share of"
                f" max_corrupt={self._max_corrupt}; the last one: {error}"
            ) from error
        self.corrupt[index] = str(error)
        _LOGGER.warning(
            "Clip %d is left out, the %d. of %d that cannot be read: %s",
            *(index, count, len(self), error),
        )

    def _decoded(self, index: int) -> Element:
        if index in self._cache:
            return self._cache[index]
        clip = self._clips[index]
        name = f"clip {index}"
        if isinstance(clip, Path):
            name, clip = str(clip), records.read_folder(clip)
        try:
            if isinstance(clip, clips.OrbitClip):
                clip = clip if self._size is None else clip.resized(self._size, self._size)
                record = element(clip)
            else:
                record = _stored_element(clip, self._size)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
        need = sum(value.nbytes for value in record.values())
        if need <= self._room:
            self._room -= need
            self._cache[index] = record
        return record

    def __repr__(self) -> str:
        """The same for the same clips in every process: it has no memory addresses."""
        return f"ClipSource({len(self)} clips, size={self._size})"


def find_clips(folder: str | os.PathLike) -> list[Path]:
    """The subfolders that hold dynamic frames, sorted by name; hidden ones (".name") are left out.

    Raises:
        FileNotFoundError: there is no such folder, or no clip in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder of clips {str(root)!r}.")
    found = sorted(path.parent for path in root.glob("[!.]*/multi_frame0.png"))
    if not found:
        hint = " is itself a clip; give its parent" if (root / "multi_frame0.png").exists() else ""
        raise FileNotFoundError(
            f"{str(root)!r}{hint or ' holds no clips: no subfolder has a multi_frame0.png'}."
        )
    return found


def _stored_element(record: records.Record, size: int | None) -> Element:
    """The element of a record, its frames still in 8 bits unless they are resized."""
    if records.LATENTS[0] in record:
        unused = {*records.VIEWS, "intrinsics"}
        arrays = {
            name: value
            for name, value in record.items()
            if isinstance(value, np.ndarray) and name not in unused
        }
        caption = np.asarray(record["caption"])
        return {**arrays, "motion": np.float32(record["motion"]), "caption": caption}
    for view in ("dynamic", "static"):
        if view not in record:
            raise ValueError(f"A clip for training needs its {view} frames.")
    sample = {
        "dynamic": record["dynamic"],
        "static": record["static"],
        "camera": record["camera"],
        "motion": np.float32(record["motion"]),
        "caption": np.asarray(record["caption"]),
    }
    if size is None or record["dynamic"].shape[1:3] == (size, size):
        return sample
    # On white the colours are premultiplied, up to a constant: averaging them is right.
    sample = _to_model_space(sample)
    views = {view: clips.resize(sample[view], size, size) for view in ("dynamic", "static")}
    colors = (frames[..., :3] for frames in views.values())
    return {**sample, **views, "motion": np.float32(motion.motion_magnitude(*colors))}


class _Stored:
    """The elements of a source with their frames as they are stored, for grain."""

    def __init__(self, source: ClipSource):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Element:
        return self._source.stored(index)

    def __repr__(self) -> str:
        return repr(self._source)


def _finish(batch: Element) -> Element:
    """Frames to model space, on the background that was drawn for each."""
    batch = _to_model_space(batch)
    if "background" not in batch:
        return batch
    batch = dict(batch)
    colors = batch.pop("background")
    for view in ("dynamic", "static"):
        batch[view] = batch[view].copy()
        for frames, color in zip(batch[view], colors, strict=True):
            clear = 1 - frames[..., 3]  # twice the share of the background
            for channel in range(3):
                frames[..., channel] += (color[channel] - 1) * clear
    return batch


def _to_model_space(sample: Element) -> Element:
    """A stored element, or a batch of them, with frames of 8 bits in model space."""
    views = {"dynamic", "static"} & sample.keys()
    stored = [view for view in views if sample[view].dtype == np.uint8]
    return {**sample, **{view: _bytes_to_model_space(sample[view]) for view in stored}}


def _bytes_to_model_space(rgba: UInt8[np.ndarray, "*b t h w 4"]) -> Float[np.ndarray, "*b t h w 4"]:
    """Straight 8-bit RGBA to colours on white, then alpha, in [-1, 1].

    Clip by clip, which stays in the cache; where the object never is, nothing is computed; and by
    channel, since numpy is slow where the inner axis is as short as 4.
    """
    frames = np.empty(rgba.shape, np.float32)
    shape = rgba.shape[-4:]
    clear = _clear(shape)
    for pixels, out in zip(rgba.reshape(-1, *shape), frames.reshape(-1, *shape), strict=True):
        out[:] = clear
        seen = pixels[..., 3].any(0)
        if not seen.any():
            continue
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        box = np.s_[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        pixels, out = pixels[box], out[box]
        alpha = pixels[..., 3] * np.float32(1 / 255)
        for channel in range(3):
            color = pixels[..., channel] * np.float32(2 / 255)
            color -= 2
            color *= alpha
            np.add(color, 1, out=out[..., channel])
        alpha *= 2
        np.subtract(alpha, 1, out=out[..., 3])
    return frames


@functools.lru_cache(4)
def _clear(shape: tuple[int, ...]) -> Float[np.ndarray, "t h w 4"]:
    """A clip of nothing, on white."""
    frames = np.ones(shape, np.float32)
    frames[..., 3] = -1
    frames.flags.writeable = False
    return frames


def _vary(
    sample: Element,
    rng: np.random.Generator,
    *,
    static_probability: float,
    random_start: bool,
    background: clips.Color | Literal["random"],
    keys: bool,
) -> Element:
    """A sample with what is drawn for it, as `make_dataset` describes."""
    if rng.random() < static_probability:
        sample = _freeze(sample)
        if random_start:
            sample = roll(sample, int(rng.integers(2**31)))
    if background != clips.WHITE:
        color = rng.random(3) if background == "random" else background
        sample = {**sample, "background": np.asarray(color, np.float32)}
    if keys:
        sample = {**sample, "key": rng.integers(2**32, size=2, dtype=np.uint32)}
    return sample


def _freeze(record: Element) -> Element:
    """The same object standing still: its static orbit, motion 0."""
    names = {"dynamic": "static", records.LATENTS[0]: records.LATENTS[1]}
    still = {name: record[names[name]] for name in names.keys() & record.keys()}
    return {**record, **still, "motion": np.float32(0)}


def _model_space(
    frames: Float[AnyArray, "t h w 3"],
    alpha: Float[AnyArray, "t h w"],
    background: tuple[float, float, float],
) -> Float[np.ndarray, "t h w 4"]:
    """Colours moved from their background onto white, then alpha; [0, 1] to [-1, 1]."""
    cover = np.asarray(alpha, np.float32)[..., None]
    to_white = 1 - np.asarray(background, np.float32)
    on_white = np.asarray(frames, np.float32) + (1 - cover) * to_white
    return 2 * np.concatenate([on_white, cover], -1) - 1


def _probe(path: Path) -> tuple[int, int, int]:
    """Frames, height and width of a clip folder, from file names and the first frame's header."""
    names = os.listdir(path)
    counts = {
        stem: sum(re.fullmatch(rf"{stem}\d+\.png", name) is not None for name in names)
        for stem in ("multi_frame", "multi_static_frame")
    }
    if counts["multi_static_frame"] != counts["multi_frame"]:
        raise ValueError(
            f"{str(path)!r} has {counts['multi_frame']} dynamic and"
            f" {counts['multi_static_frame']} static frames; training needs as many of both."
        )
    first = path / "multi_frame0.png"
    try:
        with Image.open(first) as file:
            return counts["multi_frame"], file.height, file.width
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{str(first)!r} cannot be decoded ({error}).") from error


def _shape(clip: clips.OrbitClip) -> tuple[int, int, int]:
    return clip.num_frames, clip.camera.height, clip.camera.width


def _check_equal(shapes: dict[str, tuple[int, int, int]], *, any_size: bool) -> None:
    """Raises ValueError at the first clip that does not batch with the first one."""
    (first, (frames, height, width)), *others = shapes.items()
    for name, (t, h, w) in others:
        if t != frames or (not any_size and (h, w) != (height, width)):
            raise ValueError(
                f"{name!r} has {t} frames of {w} x {h}, but {first!r} has {frames} of"
                f" {width} x {height}; clips of a batch need one length and size"
                " (the option `size` resizes them)."
            )
