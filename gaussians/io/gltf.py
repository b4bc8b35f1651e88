"""Binary glTF with the ratified Khronos extension KHR_gaussian_splatting."""

import json
import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import expit

from gaussians import sh as spherical_harmonics
from gaussians.io.cloud import Cloud
from gaussians.io.files import replace_file
from gaussians.types import Splats

_EXTENSION = "KHR_gaussian_splatting"
_COMPONENTS = {"float32": 5126, "uint16": 5123}
_TYPES = {1: "SCALAR", 3: "VEC3", 4: "VEC4"}


def write_glb(path: str | os.PathLike, splats: Splats) -> None:
    """Writes the active splats as one mesh of points with KHR_gaussian_splatting.

    Axes are glTF's: y is up and our front faces +z. Positions, rotations and harmonics are turned
    themselves, as the specification advises exporters to do, not by a node. As there, scales are
    standard deviations and opacities lie in [0, 1], all in float32. Programs that do not know the
    extension show points in the colours of COLOR_0.

    The extension knows no time: a glTF animation moves nodes and blends morph targets of positions,
    but nothing in it turns, stretches or fades single splats. So a file holds one timestamp; see
    `export_sequence` for several.

    Raises:
        ValueError: no splat is active, or an active one is not finite.
    """
    attributes = _attributes(Cloud.of(splats, path).y_up())
    accessors, views, binary = _layout(attributes)
    primitive = {
        "mode": 0,  # points
        "attributes": {name: i for i, name in enumerate(attributes)},
        "extensions": {
            _EXTENSION: {
                "kernel": "ellipse",
                "colorSpace": "srgb_rec709_display",
                "projection": "perspective",
                "sortingMethod": "cameraDistance",
            }
        },
    }
    document = {
        "asset": {"version": "2.0", "generator": "d4d_jax"},
        "extensionsUsed": [_EXTENSION],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "accessors": accessors,
        "bufferViews": views,
        "buffers": [{"byteLength": len(binary)}],
    }
    replace_file(path, lambda file: file.write(_glb(document, binary)))


def _attributes(cloud: Cloud) -> dict[str, np.ndarray]:
    """Vertex attributes by their semantic, (n, 1), (n, 3) or (n, 4)."""
    opacity = expit(cloud.opacity_logits)[:, None]
    attributes = {
        "POSITION": cloud.means,
        "COLOR_0": _fallback_colour(cloud.sh[:, 0], opacity),
        f"{_EXTENSION}:ROTATION": np.roll(cloud.quaternions, -1, axis=1),  # x y z w
        f"{_EXTENSION}:SCALE": np.exp(cloud.log_scales),
        f"{_EXTENSION}:OPACITY": opacity,
    }
    for degree in range(spherical_harmonics.degree_of(cloud.sh.shape[1]) + 1):
        for n in range(2 * degree + 1):
            name = f"{_EXTENSION}:SH_DEGREE_{degree}_COEF_{n}"
            attributes[name] = cloud.sh[:, degree**2 + n]
    return attributes


def _layout(attributes: Mapping[str, np.ndarray]) -> tuple[list, list, bytes]:
    """Accessors, the views they read, and the buffer below: one attribute after the other."""
    accessors, views, binary = [], [], b""
    for name, values in attributes.items():
        block = values.astype(values.dtype.newbyteorder("<")).tobytes()
        view = {"buffer": 0, "byteOffset": len(binary), "byteLength": len(block)}
        accessor: dict[str, Any] = {
            "bufferView": len(views),
            "componentType": _COMPONENTS[values.dtype.name],
            "normalized": values.dtype.kind == "u",
            "count": len(values),
            "type": _TYPES[values.shape[1]],
        }
        if name == "POSITION":
            accessor |= {"min": values.min(0).tolist(), "max": values.max(0).tolist()}
        accessors.append(accessor)
        views.append({**view, "target": 34962})  # vertex attributes
        binary += block
    return accessors, views, binary


def _fallback_colour(constant: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Linear RGBA for COLOR_0, in steps of 1/65535, from coefficients of degree 0 in sRGB."""
    encoded = np.clip(spherical_harmonics.C0 * constant + 0.5, 0, 1)
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.rint(65535 * np.concatenate([linear, opacity], axis=1)).astype(np.uint16)


def _glb(document: dict[str, Any], binary: bytes) -> bytes:
    """The container of glTF 2.0, section 4.4; `binary` has a multiple of 4 bytes."""
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    chunks = [
        part
        for kind, content in ((b"JSON", text), (b"BIN\0", binary))
        for part in (struct.pack("<I4s", len(content), kind), content)
    ]
    length = 12 + sum(map(len, chunks))
    return struct.pack("<4sII", b"glTF", 2, length) + b"".join(chunks)
