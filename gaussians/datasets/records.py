"""Cameras as JSON files write them down: poses, intrinsics, and what is wrong with them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from d4d_jax import cameras

#: Any of these holds a pose; `convention` says whose axes the last two use.
POSE_KEYS = ("transform_matrix", "matrix_world", "origin", "camera_to_world", "world_to_camera")

#: Lens distortion as nerfstudio, COLMAP and OpenCV name it.
_DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2", "distortion", "distortion_params")

_PINHOLE = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as JSON: {error}.") from error


def entries(document: Any, path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The records in the list that a document holds under one of `keys`.

    What stands beside the list holds for every record that does not say otherwise. A document may
    also be the bare list, or a single record.

    Raises:
        ValueError: there is no such list, it is empty, or a record is none.
    """
    shared, found = {}, document
    if isinstance(document, Mapping):
        key = next((key for key in keys if key in document), None)
        found = [document] if key is None and _has_pose(document) else document.get(key)
        shared = {k: v for k, v in document.items() if k != key and k not in POSE_KEYS}
    if not isinstance(found, list) or not found:
        wanted = " or ".join(repr(key) for key in keys)
        raise ValueError(f"{str(path)!r} needs a list under {wanted} with at least one record.")
    for i, record in enumerate(found):
        if not isinstance(record, Mapping):
            raise ValueError(f"Record {i} in {str(path)!r} holds {_brief(record)}, not fields.")
    return [{**shared, **record} for record in found]


def pose_of(record: Mapping[str, Any], name: str) -> Float[np.ndarray, "4 4"]:
    """The camera-to-world matrix with OpenCV axes, float64, exactly rigid.

    `transform_matrix` is camera-to-world with OpenGL axes, as in NeRF's files. `camera_to_world` or
    `world_to_camera` need a `convention` beside them, "opencv" (x right, y down, z forward) or
    "opengl" (x right, y up, z backward). The published format is read by `cameras.from_json`.

    Args:
        record: the fields.
        name: what errors call the camera.

    Raises:
        ValueError: there is no pose, or it is none.
    """
    if "transform_matrix" in record:
        return _to_opencv(_rigid(record["transform_matrix"], name))
    if _is_published(record):
        return np.asarray(_published(record, 1, 1, name).camera_to_world, float)
    key = next((key for key in ("camera_to_world", "world_to_camera") if key in record), None)
    if key is None:
        raise ValueError(
            f"{name} has no pose: give camera_to_world with a convention, or transform_matrix."
        )
    convention = record.get("convention")
    if convention not in ("opengl", "opencv"):
        raise ValueError(
            f'{name} needs "convention": "opengl" or "opencv", the axes of its {key}; got'
            f" {convention!r}."
        )
    pose = _rigid(record[key], name)
    if key == "camera_to_world":
        return _to_opencv(pose) if convention == "opengl" else pose
    flip = np.diag([1.0, -1.0, -1.0, 1.0]) if convention == "opengl" else np.eye(4)
    return np.asarray(cameras.invert(flip @ pose))


def intrinsics_of(
    record: Mapping[str, Any], width: int, height: int, name: str
) -> Float[np.ndarray, "3 3"]:
    """The pinhole intrinsics in pixels, for a frame of the given size.

    Focal lengths are `fl_x`, `fl_y` or `fx`, `fy` in pixels, or else `camera_angle_x` (and
    `camera_angle_y`) in radians across the width (and height). What is not given for y is as for x;
    the principal point `cx`, `cy` is the middle of the frame.

    Raises:
        ValueError: a number is missing or out of range, the lens distorts, or the record speaks of
            another size.
    """
    _check_size(record, width, height, name)
    _check_pinhole(record, name)
    if _is_published(record):
        return np.asarray(_published(record, width, height, name).intrinsics)
    focal = _focal(record, "x", width, name)
    if focal is None:
        raise ValueError(
            f"{name} has no focal length: give fl_x or fx in pixels, or camera_angle_x in radians."
        )
    other = _focal(record, "y", height, name) or focal
    middle = [
        _number(record.get(key, size / 2), key, name)
        for key, size in (("cx", width), ("cy", height))
    ]
    return np.array([[focal, 0, middle[0]], [0, other, middle[1]], [0, 0, 1]], np.float32)


def _focal(record: Mapping[str, Any], axis: str, size: int, name: str) -> float | None:
    for key in (f"fl_{axis}", f"f{axis}"):
        if key in record:
            return _number(record[key], key, name, upper=math.inf)
    key = f"camera_angle_{axis}"
    if key not in record:
        return None
    return size / (2 * math.tan(_number(record[key], key, name, upper=math.pi) / 2))


def _number(value: Any, key: str, name: str, upper: float | None = None) -> float:
    """A finite number; with `upper` one between 0 and that."""
    if isinstance(value, int | float) and math.isfinite(value):
        if upper is None or 0 < value < upper:
            return float(value)
    wanted = "a finite number"
    if upper is not None:
        wanted = "above 0" if math.isinf(upper) else "an angle between 0 and pi radians"
    raise ValueError(f"{key} of {name} must be {wanted}; got {_brief(value)}.")


def _check_size(record: Mapping[str, Any], width: int, height: int, name: str) -> None:
    for keys, found in ((("w", "width"), width), (("h", "height"), height)):
        for key in keys:
            if key in record and record[key] != found:
                raise ValueError(
                    f"{name} has frames of {width} x {height} pixels, but its {key} is"
                    f" {_brief(record[key])}; give the intrinsics of the frames as they are."
                )


def _check_pinhole(record: Mapping[str, Any], name: str) -> None:
    model = record.get("camera_model", "PINHOLE")
    if str(model).upper() not in _PINHOLE:
        raise ValueError(
            f"{name} has the camera model {model!r}, but only pinhole cameras are supported;"
            " undistort the frames first."
        )
    for key in _DISTORTION:
        try:
            distorts = bool(np.any(np.asarray(record.get(key) or 0, float)))
        except (TypeError, ValueError):
            distorts = True
        if distorts:
            raise ValueError(
                f"{name} has lens distortion ({key} = {_brief(record[key])}), which is not"
                " supported; undistort the frames first."
            )


def _is_published(record: Mapping[str, Any]) -> bool:
    return "matrix_world" in record or "origin" in record


def _published(record: Mapping[str, Any], width: int, height: int, name: str) -> cameras.Camera:
    try:
        return cameras.from_json(record, width, height)
    except ValueError as error:
        raise ValueError(f"{name} has no camera of the published format: {error}") from error


def _rigid(values: Any, name: str) -> Float[np.ndarray, "4 4"]:
    """A checked 3 x 4 or 4 x 4 pose with the rounding of its file taken out of the rotation."""
    try:
        matrix = np.asarray(values, float)
    except (TypeError, ValueError):
        matrix = np.zeros(0)
    if matrix.shape not in ((3, 4), (4, 4)) or not np.isfinite(matrix).all():
        raise ValueError(f"The pose of {name} must be 4 x 4 finite numbers; got {_brief(values)}.")
    rotation = matrix[:3, :3]
    determinant = float(np.linalg.det(rotation))
    if not np.allclose(rotation.T @ rotation, np.eye(3), atol=1e-2) or determinant < 0:
        raise ValueError(
            f"The pose of {name} is not rigid: the determinant of its 3 x 3 part is"
            f" {determinant:.3g}, that of a rotation 1; take scale, shear and mirroring out of it."
        )
    if len(matrix) == 4 and not np.allclose(matrix[3], [0, 0, 0, 1], atol=1e-6):
        raise ValueError(
            f"The last row of the pose of {name} is {matrix[3].tolist()} instead of 0 0 0 1; it may"
            " be transposed."
        )
    left, _, right = np.linalg.svd(rotation)
    pose = np.eye(4)
    pose[:3] = np.concatenate([left @ right, matrix[:3, 3:]], 1)
    return pose


def _to_opencv(pose: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    return np.asarray(cameras.opengl_to_opencv(pose))


def _has_pose(record: Mapping[str, Any]) -> bool:
    return any(key in record for key in POSE_KEYS)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
