"""Files of named arrays: read piece by piece, written piece by piece, and never half.

Of a checkpoint no more than one tensor is in memory at a time. Pickles are read by
`d4d_jax.metrics.state_dict`, which runs nothing of them.
"""

import contextlib
import json
import math
import mmap
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from d4d_jax.conversion.matching import Arrays, flatten, nest, shapes_of
from d4d_jax.metrics.state_dict import read_state_dict

Path = str | os.PathLike[str]

_DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(jnp.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_STEMS = (
    "diffusion_pytorch_model",
    "model",
    "open_clip_model",
    "open_clip_pytorch_model",
    "pytorch_model",
)
_ENDINGS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".fp16.safetensors",
    ".fp16.bin",
)
_ORBAX = "_CHECKPOINT_METADATA"
_ORBAX_FILE = 2**26  # bytes that Orbax gathers in memory before it writes them
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the format's own library


def read(path: Path, subfolder: str = "") -> Arrays:
    """The arrays of a file or of a folder by name.

    A folder is an Orbax checkpoint of parameters, or what `save_pretrained` of diffusers and
    transformers writes, whole or in shards; of a pipeline the part in `subfolder` is taken.

    Raises:
        FileNotFoundError: there is no such file, or nothing of this kind in the folder.
        ValueError: a file is damaged, of another kind, or a pickle that is more than data.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        return _loading(_mapped(path))
    if (path / _ORBAX).exists():
        return _restored(path)
    if subfolder and (path / subfolder).is_dir():
        path = path / subfolder
    names = [stem + ending for ending in _ENDINGS for stem in _STEMS]
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"There are no weights in the folder {path}: name the file, or a folder with one of"
            f" {', '.join(f'{stem}.safetensors' for stem in _STEMS[:3])}."
        )
    if found.suffix != ".json":
        return _loading(_mapped(found))
    tensors: dict[str, np.ndarray] = {}
    for shard in _shards(found):
        tensors |= _mapped(path / shard)
    return _loading(tensors)


def read_metadata(path: Path) -> dict[str, str]:
    """The remarks in the head of a .safetensors file; none of any other file."""
    path = pathlib.Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    return _header(path)[0].get("__metadata__", {})


def write_safetensors(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes float32 arrays one by one; the file appears when it is complete."""
    head: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes_of(arrays).items():
        begin, end = end, end + 4 * math.prod(shape)
        head[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in arrays:
            file.write(np.ascontiguousarray(arrays[name], "<f4").data)


def write_torch(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes a state dict with torch, by way of a temporary file as large as the result.

    Raises:
        ImportError: torch is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"Writing {path} needs torch: pip install torch, or choose a .safetensors file."
        ) from error
    path = pathlib.Path(path)
    with replacing(path) as partial:
        mapped = partial.with_name(partial.name + ".safetensors")
        try:
            write_safetensors(mapped, arrays, {})
            tensors = {name: torch.from_numpy(array) for name, array in _mapped(mapped).items()}
            torch.save(tensors, partial)
        finally:
            mapped.unlink(missing_ok=True)


def write_orbax(path: Path, arrays: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Writes nested parameters as a checkpoint that Orbax's `StandardCheckpointer` restores.

    Raises:
        FileExistsError: `path` is there, and is not such a checkpoint or not to be replaced.
    """
    import orbax.checkpoint as ocp

    path = pathlib.Path(path).absolute()
    if path.exists() and not (overwrite and (path / _ORBAX).exists()):
        raise FileExistsError(f"{path} exists and is no checkpoint to replace: choose another one.")
    # Orbax wants the whole tree: it gets one whose arrays are pages of a file, with no copy of it.
    types = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
    mapped = path.with_name(path.name + ".partial.safetensors")
    try:
        write_safetensors(mapped, arrays, {})
        saved = ocp.args.PyTreeSave(nest(_mapped(mapped)), ocdbt_target_data_file_size=_ORBAX_FILE)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(path, saved, force=overwrite)
    finally:
        mapped.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[pathlib.Path]:
    """Gives a name to write to, which becomes `path` at the end, or is removed after an error."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _loading(mapped: Mapping[str, np.ndarray]) -> Arrays:
    """Copies of the arrays, each read from its file when it is asked for."""

    def load(name: str) -> np.ndarray:
        tensor = np.array(mapped[name])
        base: Any = mapped[name]
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)  # or the pages that were read stay in memory
        return tensor

    return Arrays(shapes_of(mapped), load)


def _mapped(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Views of a file's arrays."""
    if path.suffix != ".safetensors":
        return read_state_dict(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weight file {path}.")
    head, begin = _header(path)
    head.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "c")[begin:]
    arrays = {}
    try:
        for name, entry in head.items():
            first, last = entry["data_offsets"]
            shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
            if not 0 <= first <= last <= len(data):
                raise ValueError(f"{name} is beyond its end")
            arrays[name] = data[first:last].view(dtype).reshape(shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of a kind not known here: {error}.") from error
    return arrays


def _header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """The head of a .safetensors file, and where the data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LONGEST_HEADER, path.stat().st_size):
            raise ValueError(f"{path} is no .safetensors file, or it is damaged.")
        try:
            head = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is no .safetensors file, or it is damaged.") from error
    if not isinstance(head, dict):
        raise ValueError(f"{path} is no .safetensors file, or it is damaged.")
    return head, 8 + length


def _shards(index: pathlib.Path) -> Sequence[str]:
    """Names of the files that an index lists; all of them are in its folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of weight files: {error}.") from error
    for name in names:
        if pathlib.PurePath(name).name != name:
            raise ValueError(f"{index} lists {name!r}, which is not in its folder.")
    return names


def _restored(path: pathlib.Path) -> Arrays:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        leaves = flatten(checkpointer.restore(path.absolute()))
    return Arrays(shapes_of(leaves), lambda name: np.asarray(leaves[name]))
