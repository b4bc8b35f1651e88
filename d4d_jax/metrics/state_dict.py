"""Reads files of named arrays, those of torch included, without torch and without running them.

torch writes a state dict as a pickle, and a pickle may call any function by name. Here names are
resolved by a table that holds the few which files of dense tensors consist of, and none of them
does more than to note a tensor's place in the file; anything else is refused.
"""

import collections
import os
import pathlib
import pickle
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_MAGIC = 0x1950A86A20F9469CFC6C


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a .pth, .npz or .safetensors file by name.

    Both layouts of torch are known: the zip archive and the older sequence of pickles. Their arrays
    are views of the mapped file, so that those nobody asks for are never read from the disk. Those
    of nested dicts get names with dots, as "state_dict.features.0.weight"; numbers and texts beside
    them are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of these formats, is damaged, holds no named dense arrays, or names a
            function that a state dict has no use for.
        ImportError: a .safetensors file without the package safetensors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weight file {path}.")
    if path.suffix == ".safetensors":
        try:
            from safetensors.numpy import load_file
        except ImportError as error:
            raise ImportError(
                f"Reading {path} needs the package safetensors: pip install safetensors."
            ) from error
        read = load_file
    elif path.suffix == ".npz":
        read = _read_npz
    else:
        read = _read_torch
    try:
        return read(path)
    except Exception as error:  # a damaged or hostile file may fail anywhere
        raise ValueError(f"{path} cannot be read as a file of named arrays: {error}") from error


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


class _Tensor(NamedTuple):
    """A place in the file; offset, shape and strides count elements."""

    storage: str
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        archived = file.read(4) == b"PK\3\4"
        file.seek(0)
        tensors, places = (_archive if archived else _sequence)(file)
    named = dict(_named(tensors))
    if not named:
        raise ValueError("it holds no dict of tensors.")
    data = np.memmap(path, np.uint8, "r")

    def view(tensor: _Tensor) -> np.ndarray:
        begin, size = places[tensor.storage]
        if not 0 <= begin <= begin + size <= len(data):
            raise ValueError("it is shorter than its tensors.")
        item = tensor.dtype.itemsize
        strides = tuple(item * stride for stride in tensor.strides)
        # ndarray checks that nothing reaches beyond the buffer.
        buffer = data[begin : begin + size]
        return np.ndarray(tensor.shape, tensor.dtype, buffer, item * tensor.offset, strides)

    return {name: view(tensor) for name, tensor in named.items()}


def _named(value: Any, name: str = "") -> Iterator[tuple[str, _Tensor]]:
    """The tensors of nested dicts by their keys, joined with dots."""
    if isinstance(value, _Tensor) and name:
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _named(inner, f"{name}.{key}" if name else str(key))


def _archive(file: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The tensors and the storages' (begin, size) in bytes, of a zip archive."""
    archive = zipfile.ZipFile(file)
    entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in entries:
        raise ValueError("it is a zip archive, but not one that torch.save has written.")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise ValueError("it was written on a big-endian machine.")
    with archive.open(entries["data.pkl"]) as pickled:
        tensors = _Unpickler(pickled).load()
    places = {}
    for name, info in entries.items():
        if name.startswith("data/"):
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError("its storages are compressed, which torch.save never does.")
            file.seek(info.header_offset + 26)
            lengths = struct.unpack("<2H", file.read(4))  # of the name and of the extra field
            begin = info.header_offset + 30 + sum(lengths)
            places[name.removeprefix("data/")] = (begin, info.file_size)
    return tensors, places


def _sequence(file: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The same of the older layout: five pickles, then every storage behind its length."""
    if _Unpickler(file).load() != _MAGIC:
        raise ValueError("it was not written by torch.save.")
    _Unpickler(file).load()  # version of the format
    if not _Unpickler(file).load().get("little_endian", True):
        raise ValueError("it was written on a big-endian machine.")
    unpickler = _Unpickler(file)
    tensors = unpickler.load()
    places = {}
    begin = 0
    for key in _Unpickler(file).load():
        begin = file.tell() + 8
        size = struct.unpack("<q", file.read(8))[0] * unpickler.dtypes[key].itemsize
        places[key] = (begin, size)
        file.seek(begin + size)
    return tensors, places


class _Ignored:
    """Takes the place of what checkpoints hold beside tensors; does nothing."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


#: What Lightning's checkpoints, as those of Stable Diffusion, refer to beside tensors.
_IGNORED = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)


class _Unpickler(pickle.Unpickler):
    """Resolves the names of `self.known` only. Nothing in it is shared with other files."""

    def __init__(self, file):
        super().__init__(file, encoding="utf-8")
        self.dtypes: dict[str, np.dtype] = {}

        def tensor(storage, offset, shape, strides, *_):
            return _Tensor(storage, self.dtypes[storage], offset, shape, strides)

        self.known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor": tensor,  # before torch 0.4, as in torchvision's VGG16
            "torch._utils._rebuild_tensor_v2": tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            **{f"torch.{name}": name for name in _DTYPES},
            **dict.fromkeys(_IGNORED, _Ignored),
        }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.known:
            raise ValueError(
                f"it refers to {module}.{name}, which a state dict of dense tensors has no use"
                " for; nothing of it was run."
            )
        return self.known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> str:
        kind, storage, key, _, _, *view = pid
        if kind != "storage" or any(view):
            raise ValueError("it has shared storages of an old form; save it anew with torch >= 1.")
        self.dtypes[key] = _DTYPES[storage]
        return key
