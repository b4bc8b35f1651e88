"""Files of Gaussians: the PLY of 3D Gaussian Splatting, and a checkpoint of a whole asset.

    write_ply("frame.ply", asset.at(0.5))    # opens in the common viewers and editors
    save_asset("asset.npz", asset)           # everything, bit for bit
    asset = load_asset("asset.npz")

Writing replaces a file only when the new one is complete.
"""

import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from d4d_jax import registry
from d4d_jax.typing import PyTree
from gaussians import sh as spherical_harmonics
from gaussians.asset import Asset
from gaussians.deformation import Deformation, build
from gaussians.types import Splats

_FORMAT = "d4d_jax gaussians 1"
_FIELDS = tuple(field.name for field in dataclasses.fields(Splats))
#: What NumPy, zipfile, JSON and the checks below raise on a file that is not what it should be.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)
_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2", "int32": "<i4"},
    **{"uint32": "<u4", "float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8"},
}


def write_ply(path: str | os.PathLike, splats: Splats) -> None:
    """Writes the active splats in the layout of the 3DGS reference, binary little-endian.

    Per splat, as float32: x y z, a zero normal, f_dc_0..2, f_rest_* (channel-major: all of red,
    then green, then blue; none for degree 0), the opacity's logit, log scales, and a unit
    quaternion w x y z. Axes are the world's, z up; many viewers expect y down and turn the object.

    Raises:
        ValueError: no splat is active, or an active one holds a number that is not finite.
    """
    active = np.asarray(splats.active)
    if not active.any():
        raise ValueError(f"There is no active splat to write to {os.fspath(path)}.")
    means, log_scales, quaternions, opacities, sh = (
        np.asarray(splats.parameters[name], np.float32)[active] for name in _FIELDS[:5]
    )
    quaternions = quaternions / np.linalg.norm(quaternions, axis=-1, keepdims=True)
    rest = sh[:, 1:].transpose(0, 2, 1).reshape(len(sh), -1)
    columns = [means, np.zeros_like(means), sh[:, 0], rest, opacities[:, None], log_scales]
    table = np.concatenate([*columns, quaternions], axis=1).astype("<f4")
    broken = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(broken):
        raise ValueError(
            f"{len(broken)} of the {len(table)} active splats hold numbers that are not finite (the"
            f" first is slot {np.flatnonzero(active)[broken[0]]}); deactivate them before writing"
            f" {os.fspath(path)}."
        )
    names = _ply_attributes(sh.shape[1], normals=True)
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in names] + ["end_header", ""]
    _replace_file(path, lambda file: file.write("\n".join(header).encode() + table.tobytes()))


def read_ply(path: str | os.PathLike, *, capacity: int | None = None) -> Splats:
    """Reads a 3DGS PLY by any writer: attributes may stand in any order, unknown ones are ignored.

    Args:
        path: of a binary little-endian file.
        capacity: slots of the result; by default as many as the file has splats.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a PLY, is cut off, lacks an attribute, or exceeds the capacity.
    """
    path = Path(path)
    content = path.read_bytes()
    count, record, start = _parse_ply_header(content, path)
    found = set(record.names or ())
    num_rest = sum(name.startswith("f_rest_") for name in found)
    try:
        spherical_harmonics.degree_of(num_rest // 3 + 1)
    except ValueError:
        raise ValueError(
            f"{path} has {num_rest} attributes f_rest_*; spherical harmonics of degree 0 to 3 have"
            " 0, 9, 24 or 45."
        ) from None
    wanted = _ply_attributes(num_rest // 3 + 1, normals=False)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{path} is not a PLY of Gaussians: it has no attribute {', '.join(missing)}."
        )
    if len(content) - start < count * record.itemsize:
        raise ValueError(
            f"{path} is cut off: {count} splats take {count * record.itemsize} bytes after the"
            f" header, but only {len(content) - start} are there."
        )
    rows = np.frombuffer(content, record, count, start)
    table = np.stack([rows[name].astype(np.float32) for name in wanted], axis=1)
    capacity = count if capacity is None else capacity
    if capacity < count:
        raise ValueError(f"{path} holds {count} splats, more than a capacity of {capacity}.")
    padding = np.zeros((capacity - count, table.shape[1]), np.float32)
    padding[:, -4] = 1  # the identity rotation
    table = np.concatenate([table, padding])
    rest = table[:, 6 : 6 + num_rest].reshape(capacity, 3, -1).transpose(0, 2, 1)
    return Splats(
        means=jnp.asarray(table[:, :3]),
        log_scales=jnp.asarray(table[:, -7:-4]),
        quaternions=jnp.asarray(table[:, -4:]),
        opacity_logits=jnp.asarray(table[:, -8]),
        sh=jnp.asarray(np.concatenate([table[:, None, 3:6], rest], axis=1)),
        active=jnp.arange(capacity) < count,
    )


def save_asset(path: str | os.PathLike, asset: Asset) -> None:
    """Writes an asset as one NumPy archive: arrays, and a JSON text that says how they belong.

    Raises:
        ValueError: the metadata cannot be written as JSON, or the field's parameters are not arrays
            in dicts with text keys, lists and tuples.
    """
    arrays: dict[str, np.ndarray] = {}
    description = {
        "format": _FORMAT,
        "splats": _describe(dict(vars(asset.splats)), "splats", arrays),
        "params": _describe(asset.params, "params", arrays),
        "deformation": _spec_of(asset.deformation),
        "background": [float(value) for value in asset.background],
        "meta": dict(asset.meta),
    }
    try:
        text = json.dumps(description)
    except TypeError as error:
        raise ValueError(f"The asset's metadata do not fit into JSON: {error}.") from None
    arrays["json"] = np.array(text)
    _replace_file(path, lambda file: np.savez_compressed(file, **arrays))  # pyright: ignore


def load_asset(path: str | os.PathLike, *, deformation: Deformation | None = None) -> Asset:
    """Reads what `save_asset` wrote. Nothing in the file is executed.

    Args:
        path: of the archive.
        deformation: the field, for a file whose field is not one of the library's own; by default
            it is built as the file says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not such an archive, is cut off, or names a field from elsewhere.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        description = json.loads(str(arrays["json"]))
        if description["format"] != _FORMAT:
            raise ValueError(f"its format is {description['format']!r}, not {_FORMAT!r}")
        splats = Splats(**_rebuild(description["splats"], arrays))
        params = _rebuild(description["params"], arrays)
        spec, meta = description["deformation"], description["meta"]
        background = tuple(description["background"])
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no asset {path}.") from None
    except _DAMAGE as error:
        raise ValueError(f"{path} is not a complete asset file: {error}.") from error
    if deformation is None:
        deformation = _build_own(spec, path)
    return Asset(splats, deformation, params, background, meta)


def _ply_attributes(num_coefficients: int, *, normals: bool) -> list[str]:
    names = ["x", "y", "z"] + ["nx", "ny", "nz"] * normals + [f"f_dc_{i}" for i in range(3)]
    names += [f"f_rest_{i}" for i in range(3 * (num_coefficients - 1))]
    names += ["opacity"] + [f"scale_{i}" for i in range(3)]
    return names + [f"rot_{i}" for i in range(4)]


def _parse_ply_header(content: bytes, path: Path) -> tuple[int, np.dtype, int]:
    """The number of vertices, the layout of one, and where the first one starts."""
    end = content.find(b"end_header")
    newline = content.find(b"\n", end)
    if not content.startswith(b"ply") or end < 0 or newline < 0:
        raise ValueError(f"{path} is not a PLY file: it lacks the header.")
    lines = content[:end].decode("ascii", "replace").split("\n")
    words = [line.split() for line in lines if line.strip()]
    file_format = next((line[1:2] for line in words if line[0] == "format"), [])
    if file_format != ["binary_little_endian"]:
        raise ValueError(
            f"{path} is a PLY of format {' '.join(file_format) or 'unknown'}; only"
            " binary_little_endian is read."
        )
    elements = [line for line in words if line[0] == "element"]
    if not elements or elements[0][1:2] != ["vertex"] or not elements[0][-1].isdigit():
        raise ValueError(f"{path} does not begin with vertices, as a PLY of Gaussians does.")
    stop = words.index(elements[1]) if len(elements) > 1 else len(words)
    properties = [line[1:] for line in words[:stop] if line[0] == "property"]
    unknown = [" ".join(p) for p in properties if len(p) != 2 or p[0] not in _PLY_TYPES]
    names = [p[-1] for p in properties]
    if unknown or len(set(names)) < len(names):
        raise ValueError(f"{path} has vertex properties that cannot be read: {unknown or names}.")
    record = np.dtype([(name, _PLY_TYPES[kind]) for kind, name in properties])
    return int(elements[0][-1]), record, newline + 1


def _describe(tree: PyTree, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Files the arrays of a tree under `name/...`; returns the tree's shape as JSON values."""
    if tree is None:
        return {"none": True}
    if isinstance(tree, Mapping):
        if not all(isinstance(key, str) and "/" not in key for key in tree):
            raise ValueError(f"The keys of {name} must be text without '/'; got {list(tree)}.")
        return {"dict": {k: _describe(v, f"{name}/{k}", arrays) for k, v in tree.items()}}
    if type(tree) in (list, tuple):
        kind = type(tree).__name__
        return {kind: [_describe(v, f"{name}/{i}", arrays) for i, v in enumerate(tree)]}
    values = np.asarray(tree)
    kind, dtype = values.dtype.kind, values.dtype.name
    if kind not in "biufc":
        # NumPy's format has no name for JAX's own floats, such as bfloat16: their bits are stored.
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise ValueError(
                f"{name} is a {type(tree).__name__}; an asset file holds arrays in dicts, lists and"
                " tuples."
            )
        values = values.view(f"u{values.dtype.itemsize}")
    arrays[name] = values
    return {"array": name, "dtype": dtype}


def _rebuild(description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> PyTree:
    ((kind, content),) = [item for item in description.items() if item[0] != "dtype"]
    if kind == "none":
        return None
    if kind == "dict":
        return {key: _rebuild(value, arrays) for key, value in content.items()}
    if kind in ("list", "tuple"):
        values = [_rebuild(value, arrays) for value in content]
        return values if kind == "list" else tuple(values)
    values, dtype = arrays[content], description["dtype"]
    return jnp.asarray(values if values.dtype.name == dtype else values.view(jnp.dtype(dtype)))


def _spec_of(field: Any) -> dict[str, Any]:
    """What `gaussians.deformation.build` needs to make this field again."""
    kind = type(field)
    name = f"{kind.__module__}:{kind.__qualname__}"
    for known in registry.names("deformation"):
        if registry.lookup("deformation", known) is kind:
            name = known
    sizes = {}
    if dataclasses.is_dataclass(field):
        for part in dataclasses.fields(field):
            value = getattr(field, part.name)
            sizes[part.name] = _spec_of(value) if dataclasses.is_dataclass(value) else value
    return {"name": name, **sizes}


def _build_own(spec: Mapping[str, Any], path: Path) -> Deformation:
    """Builds a registered field only: a file must not choose which code is imported."""

    def checked(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(checked(item) for item in value)  # JSON has no tuples
        if not isinstance(value, Mapping):
            return value
        if ":" in str(value.get("name", "")):
            raise ValueError(
                f"{path} was made with the deformation field {value['name']}, which is not part of"
                " the library; build it and pass it as `deformation`."
            )
        return {key: checked(item) for key, item in value.items()}

    return build(checked(spec))


def _replace_file(path: str | os.PathLike, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes beside the target and renames, so that the target is never half written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
