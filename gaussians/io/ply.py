"""PLY files: that of 3D Gaussian Splatting, which the common viewers and editors open; points."""

import io
import os
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gaussians import sh as spherical_harmonics
from gaussians.io.cloud import Cloud
from gaussians.io.files import replace_file
from gaussians.types import Splats

_PLY_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2", "int32": "<i4"},
    **{"uint32": "<u4", "float": "<f4", "float32": "<f4", "double": "<f8", "float64": "<f8"},
}

_ORDERS: dict[str, Literal["<", ">", "="]] = {
    "binary_little_endian": "<",
    "binary_big_endian": ">",
    "ascii": "=",
}


def write_ply(path: str | os.PathLike, splats: Splats) -> None:
    """Writes the active splats in the layout of the 3DGS reference, binary little-endian.

    Per splat, as float32: x y z, a zero normal, f_dc_0..2, f_rest_* (channel-major: all of red,
    then green, then blue; none for degree 0), the opacity's logit, log scales, and a unit
    quaternion w x y z. Axes are the world's, z up; many viewers expect y down and turn the object.

    Raises:
        ValueError: no splat is active, or an active one holds a number that is not finite.
    """
    cloud = Cloud.of(splats, path)
    rest = cloud.sh[:, 1:].transpose(0, 2, 1).reshape(len(cloud.sh), -1)
    columns = [cloud.means, np.zeros_like(cloud.means), cloud.sh[:, 0], rest]
    columns += [cloud.opacity_logits[:, None], cloud.log_scales, cloud.quaternions]
    table = np.concatenate(columns, axis=1).astype("<f4")
    names = _ply_attributes(cloud.sh.shape[1], normals=True)
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in names] + ["end_header", ""]
    replace_file(path, lambda file: file.write("\n".join(header).encode() + table.tobytes()))


def read_ply(path: str | os.PathLike, *, capacity: int | None = None) -> Splats:
    """Reads a 3DGS PLY by any writer: attributes may stand in any order, unknown ones are ignored.

    Args:
        path: of the file, binary or text.
        capacity: slots of the result; by default as many as the file has splats.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a PLY, is cut off, lacks an attribute, or exceeds the capacity.
    """
    path, rows = Path(path), read_vertices(path)
    found, count = set(rows.dtype.names or ()), len(rows)
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


def read_vertices(path: str | os.PathLike) -> np.ndarray:
    """The vertices of any PLY whose first element they are: one field per property.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such PLY, or is cut off.
    """
    path = Path(path)
    content = path.read_bytes()
    count, record, start, is_text = _parse_ply_header(content, path)
    if is_text:
        text = io.StringIO(content[start:].decode("ascii", "replace"))
        try:
            rows = np.loadtxt(text, record, comments=None, max_rows=count, ndmin=1)
        except ValueError as error:
            raise ValueError(
                f"{path} is a PLY of format ascii that cannot be read: {error}."
            ) from None
        if len(rows) < count:
            raise ValueError(f"{path} is cut off: it holds {len(rows)} of {count} vertices.")
        return rows
    if len(content) - start < count * record.itemsize:
        raise ValueError(
            f"{path} is cut off: {count} vertices take {count * record.itemsize} bytes after the"
            f" header, but only {len(content) - start} are there."
        )
    return np.frombuffer(content, record, count, start)


def points_of(
    vertices: np.ndarray, path: str | os.PathLike
) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, "n 3"] | None]:
    """Positions, and colours in [0, 1] where there are any, of what `read_vertices` returned.

    Integer colours are fractions of their largest value; `path` is for the message.

    Raises:
        ValueError: x, y or z is missing.
    """
    names = vertices.dtype.names or ()
    if not {"x", "y", "z"} <= set(names):
        raise ValueError(f"{os.fspath(path)} holds no points: its vertices lack x, y or z.")
    points = np.stack([vertices[name] for name in "xyz"], axis=1).astype(np.float32)
    channels = ("red", "green", "blue")
    if not set(channels) <= set(names):
        return points, None
    colours = np.stack([vertices[name] for name in channels], axis=1)
    largest = np.iinfo(colours.dtype).max if colours.dtype.kind in "iu" else 1
    return points, np.clip(colours.astype(np.float32) / largest, 0, 1)


def _ply_attributes(num_coefficients: int, *, normals: bool) -> list[str]:
    names = ["x", "y", "z"] + ["nx", "ny", "nz"] * normals + [f"f_dc_{i}" for i in range(3)]
    names += [f"f_rest_{i}" for i in range(3 * (num_coefficients - 1))]
    names += ["opacity"] + [f"scale_{i}" for i in range(3)]
    return names + [f"rot_{i}" for i in range(4)]


def _parse_ply_header(content: bytes, path: Path) -> tuple[int, np.dtype, int, bool]:
    """The number of vertices, the layout of one, where the first one starts, whether it is text."""
    end = content.find(b"end_header")
    newline = content.find(b"\n", end)
    if not content.startswith(b"ply") or end < 0 or newline < 0:
        raise ValueError(f"{path} is not a PLY file: it lacks the header.")
    lines = content[:end].decode("ascii", "replace").split("\n")
    words = [line.split() for line in lines if line.strip()]
    file_format = next((line[1:2] for line in words if line[0] == "format"), [])
    if file_format not in [[known] for known in _ORDERS]:
        raise ValueError(
            f"{path} is a PLY of format {' '.join(file_format) or 'unknown'}, which is none of"
            f" {', '.join(_ORDERS)}."
        )
    elements = [line for line in words if line[0] == "element"]
    if not elements or elements[0][1:2] != ["vertex"] or not elements[0][-1].isdigit():
        raise ValueError(f"{path} does not begin with vertices, as a PLY of points does.")
    stop = words.index(elements[1]) if len(elements) > 1 else len(words)
    properties = [line[1:] for line in words[:stop] if line[0] == "property"]
    unknown = [" ".join(p) for p in properties if len(p) != 2 or p[0] not in _PLY_TYPES]
    names = [p[-1] for p in properties]
    if unknown or len(set(names)) < len(names):
        raise ValueError(f"{path} has vertex properties that cannot be read: {unknown or names}.")
    record = np.dtype([(name, _PLY_TYPES[kind]) for kind, name in properties])
    record = record.newbyteorder(_ORDERS[file_format[0]])
    return int(elements[0][-1]), record, newline + 1, file_format == ["ascii"]
