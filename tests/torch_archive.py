"""Writes state dicts as torch does, without torch, so that the tests load what people have."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def archive(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """A file as of `torch.save`, with the float32 tensors `arrays`."""
    entries = b"".join(_entry(i, *item) for i, item in enumerate(arrays.items()))
    storages = {str(i): np.ascontiguousarray(array) for i, array in enumerate(arrays.values())}
    return raw_archive(path, b"\x80\x02}" + entries + b".", storages)


def raw_archive(path: Path, pickled: bytes, storages: Mapping[str, np.ndarray]) -> Path:
    """The same with any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{path.stem}/data.pkl", pickled)
        file.writestr(f"{path.stem}/byteorder", b"little")
        for name, storage in storages.items():
            file.writestr(f"{path.stem}/data/{name}", storage.tobytes())
    return path


def sequence(path: Path, pickled: bytes) -> Path:
    """A file of torch's older layout with any pickle, and no storages."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    path.write_bytes(b"".join(pickle.dumps(value, 2) for value in head) + pickled + _dumps([]))
    return path


def tensor(index: int, size: int, offset: int, shape: tuple, strides: tuple) -> bytes:
    """The pickle of one tensor in the storage `index`, without head and stop."""
    storage = _value("storage") + b"ctorch\nFloatStorage\n" + _value(str(index)) + _value("cpu")
    place = b"(" + storage + _value(size) + b"tQ"
    place += _value(offset) + _value(shape) + _value(strides) + _value(False)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + place + b"ccollections\nOrderedDict\n)RtR"


def _entry(index: int, name: str, array: np.ndarray) -> bytes:
    strides = tuple(s // 4 for s in np.ascontiguousarray(array).strides)
    return _value(name) + tensor(index, array.size, 0, array.shape, strides) + b"s"


def _dumps(value) -> bytes:
    return pickle.dumps(value, protocol=2)


def _value(value) -> bytes:
    return _dumps(value)[2:-1]
