"""The data set `orbit_clips` of TensorFlow Datasets; neither building nor reading needs TensorFlow.

    builder = OrbitClips(records="DATASET", data_dir="TFDS")
    builder.download_and_prepare()
    source = tfds.data_source("orbit_clips", split="train", data_dir="TFDS")

Its features are the entries of a record (`d4d_jax.data.records`) and its splits those of the data
set of ArrayRecord files it is made from. View sets that a clip lacks are all zero, and named in the
feature `absent`.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from d4d_jax.data import records


class OrbitClips(tfds.core.GeneratorBasedBuilder):
    """Orbital clips of moving objects, in ArrayRecord files."""

    VERSION = tfds.core.Version(records.VERSION)
    RELEASE_NOTES = {records.VERSION: "First version."}  # noqa: RUF012 (of the base class)
    name = "orbit_clips"

    def __init__(
        self,
        *,
        records: str | os.PathLike | None = None,
        file_format: str = "array_record",
        **kwargs,
    ):
        """Describes the data set of a folder of `d4d_jax.data.shards`.

        Args:
            records: the folder. Its clips need one length and size. None reads what is prepared.
            file_format: of the files; "array_record" is the one that is read without TensorFlow.
            **kwargs: of `tfds.core.DatasetBuilder`, such as `data_dir`.

        Raises:
            FileNotFoundError: there is no such data set.
            ValueError: its clips differ in length or size.
        """
        self._folder = None if records is None else Path(records)
        self._index = {} if records is None else _read_index(Path(records))
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        if self._folder is not None:
            described = features(*self._index["shapes"][0])
        elif (prepared := Path(self.data_dir)).is_dir():
            described = tfds.features.FeaturesDict.from_config(str(prepared))
        else:
            raise FileNotFoundError(
                f"There is no data set in {str(prepared)!r}; OrbitClips(records=FOLDER) makes one."
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Orbital clips of moving and of still objects, after Diffusion4D.",
            features=described,
            homepage="https://arxiv.org/abs/2405.16645",
            disable_shuffling=True,  # the files are mixed already
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Any]]]:
        del dl_manager
        if self._folder is None:
            raise ValueError("There is nothing to prepare; give OrbitClips(records=FOLDER).")
        return {
            split: self._generate_examples(self._folder, split) for split in self._index["splits"]
        }

    def _generate_examples(self, folder: Path, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        (shape,) = self._index["shapes"]
        for i, record in enumerate(records.Records(folder, split, views=records.VIEWS)):
            absent = [view for view in records.VIEWS if view not in record]
            empty = {view: np.zeros((*shape, 4), np.uint8) for view in absent}
            yield i, {**record, **empty, "absent": " ".join(absent)}


def features(num_frames: int, height: int, width: int) -> tfds.features.FeaturesDict:
    """The features of clips of that length and size."""
    frames = tfds.features.Tensor(
        shape=(num_frames, height, width, 4), dtype=np.uint8, encoding=tfds.features.Encoding.ZLIB
    )
    return tfds.features.FeaturesDict(
        {
            **dict.fromkeys(records.VIEWS, frames),
            "camera": tfds.features.Tensor(shape=(num_frames, 4, 4), dtype=np.float32),
            "intrinsics": tfds.features.Tensor(shape=(num_frames, 3, 3), dtype=np.float32),
            "motion": tfds.features.Scalar(np.float32),
            **dict.fromkeys(records.TEXTS, tfds.features.Text()),
            "absent": tfds.features.Text(),
        }
    )


def open_split(
    path: str | os.PathLike, split: str, views: Sequence[str]
) -> tuple[Any, tuple[int, int, int]]:
    """A split of a prepared data set, of its folder with the version: the source and the shape.

    Raises:
        ValueError: the data set has no such split.
    """
    builder: Any = tfds.builder_from_directory(str(path))
    if split not in builder.info.splits:
        raise ValueError(
            f"{str(path)!r} has no split {split!r}, only {', '.join(builder.info.splits)}."
        )
    skipped = {view: tfds.decode.SkipDecoding() for view in records.VIEWS if view not in views}
    source = builder.as_data_source(split=split, decoders=skipped)
    return source, builder.info.features["dynamic"].shape[:3]


def to_record(example: dict[str, Any]) -> records.Record:
    """The record of an example, without the view sets that were not decoded."""
    absent = example["absent"].decode().split()
    views = [v for v in records.VIEWS if v not in absent and isinstance(example[v], np.ndarray)]
    texts = {name: example[name].decode() for name in records.TEXTS}
    arrays = {name: example[name] for name in (*views, *records.ARRAYS)}
    return arrays | {"motion": float(example["motion"])} | texts


def _read_index(folder: Path) -> dict[str, Any]:
    index = records.read_index(folder)
    if len(index["shapes"]) != 1:
        raise ValueError(
            f"The clips of {str(folder)!r} have the shapes {index['shapes']}; a TFDS data set"
            " needs clips of one length and size."
        )
    return index
