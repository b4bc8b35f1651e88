"""Writes captures of a known scene in the layouts of others, in a world of their own."""

import json
import math

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from d4d_jax import cameras, media
from d4d_jax.data import synthetic

SCENE = synthetic.make_scene(3)
SIZE = 48
FOCAL = 60.0
FLIP = np.diag([1.0, -1.0, -1.0, 1.0])

#: The world of the files from that of the scene: p_file = SCALE * TURN @ p + SHIFT.
TURN = Rotation.from_euler("xyz", [0.7, -1.1, 2.0]).as_matrix()
SCALE, SHIFT = 3.7, np.array([11.0, -5.0, 2.5])


def ring(count, *, height=0.6, start=0.0, distance=2.0, size=SIZE, wider=0):
    """Cameras around the origin of the scene, looking at it from above."""
    angle = start + 2 * np.pi * np.arange(count) / count
    level = math.sqrt(distance**2 - height**2)
    eye = np.stack([level * np.sin(angle), -level * np.cos(angle), np.full(count, height)], -1)
    width = size + wider
    intrinsics = np.array([[FOCAL, 0, width / 2], [0, FOCAL, size / 2], [0, 0, 1]], np.float32)
    pose = cameras.look_at(eye)
    return cameras.Camera(pose, np.tile(intrinsics, (count, 1, 1)), width=width, height=size)


def rgba(camera, times):
    """(t, h, w, 4) in [0, 1], straight colour."""
    rgb, alpha = synthetic.render(SCENE, camera, times, background=(0.0, 0.0, 0.0))
    return np.concatenate([rgb / np.maximum(alpha, 1e-6)[..., None], alpha[..., None]], -1)


def file_poses(camera, turn=TURN, scale=SCALE, shift=SHIFT):
    """Camera-to-world matrices (OpenCV axes, float64) in the world of the files."""
    poses = np.linalg.inv(np.asarray(camera.world_to_camera, float))
    poses[:, :3, :3] = turn @ poses[:, :3, :3]
    poses[:, :3, 3] = scale * poses[:, :3, 3] @ turn.T + shift
    return poses


def write_json(path, document):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def edit_json(path, change):
    """Applies `change` to the document in a file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    write_json(path, document)


def write_transforms(folder, sets, **world):
    """D-NeRF's layout; `sets` maps train, val, test to (camera, times); times may be None."""
    for name, (camera, times) in sets.items():
        images = rgba(camera, np.zeros(len(camera)) if times is None else times)
        frames = []
        for i, pose in enumerate(file_poses(camera, **world)):
            media.write_image(folder / name / f"r_{i:03d}.png", images[i])
            frame = {"file_path": f"./{name}/r_{i:03d}", "rotation": 0.1}
            frame["transform_matrix"] = (pose @ FLIP).tolist()
            frames.append(frame if times is None else {**frame, "time": float(times[i])})
        angle = 2 * math.atan(camera.width / (2 * FOCAL))
        document = {"camera_angle_x": angle, "frames": frames}
        write_json(folder / f"transforms_{name}.json", document)
    return folder


def write_images(folder, images, first=0):
    for i, image in enumerate(images):
        media.write_image(folder / f"{first + i:04d}.png", image)


def write_multiview(folder, camera, moments, *, kind="images", fps=10, **extra):
    """A rig of resting cameras cam00, cam01, ..., each with a folder of images or a video."""
    records = []
    for i, pose in enumerate(file_poses(camera)):
        name = f"cam{i:02d}"
        one = cameras.stack([camera[i]] * len(moments))
        images = rgba(one, moments)
        if kind == "images":
            write_images(folder / name, images, first=1)
        else:
            white = images[..., :3] * images[..., 3:] + 1 - images[..., 3:]
            media.write_video(folder / f"{name}.{kind}", white, fps=fps, min_size=1)
        size = {"width": camera.width, "height": camera.height}
        record = {"name": name, "camera_to_world": pose.tolist(), "fx": FOCAL, "fy": FOCAL}
        records.append({**record, **size})
    rate = {"fps": fps} if kind == "images" else {}
    write_json(
        folder / "cameras.json", {"convention": "opencv", "cameras": records, **rate, **extra}
    )
    return folder


def write_video(folder, camera, times, *, fps=12, kind="mp4"):
    """One moving camera: a video on white, and a pose for every frame."""
    images = rgba(camera, times)
    white = images[..., :3] * images[..., 3:] + 1 - images[..., 3:]
    media.write_video(folder / f"clip.{kind}", white, fps=fps, min_size=1)
    records = [{"transform_matrix": (pose @ FLIP).tolist()} for pose in file_poses(camera)]
    write_json(folder / "clip.json", {"fl_x": FOCAL, "frames": records})
    return folder / f"clip.{kind}"


def read_png(path):
    return np.asarray(Image.open(path), np.float32) / 255


def surface_points(time, count=1500):
    """Points on the surfaces of the scene at a time, in the world of the files."""
    directions = np.random.default_rng(0).normal(size=(count, 1, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    points = (SCENE.centres_at(time) + directions * SCENE.half_axes).reshape(-1, 3)
    return SCALE * points @ TURN.T + SHIFT


def to_here(points, capture):
    return (points - np.asarray(capture.centre)) * capture.scale


def project(camera, points):
    """Pixel coordinates (n, 2), by the definition of the camera."""
    pose, intrinsics = np.asarray(camera.world_to_camera), np.asarray(camera.intrinsics)
    x, y, z = intrinsics @ (points @ pose[:3, :3].T + pose[:3, 3]).T
    return np.stack([x / z, y / z], -1)


def assert_seen(views, capture, moments):
    """The frames show the scene at `moments` (its own times) where their cameras project it."""
    assert len(views) == len(moments) == len(views.camera)
    for i, moment in enumerate(moments):
        mask = np.abs(views.rgb[i] - 1).max(-1) > 0.12
        if views.alpha is not None:
            mask = views.alpha[i] > 0.1
        rows, columns = np.nonzero(mask)
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        points = project(views.camera[i], to_here(surface_points(moment), capture))
        found = np.concatenate([points.min(0), points.max(0)])
        np.testing.assert_allclose(found, box, atol=1.6, err_msg=f"frame {i}")
        cells = np.clip(points.astype(int), 0, np.array(mask.shape[::-1]) - 1)
        cover = np.zeros_like(mask)
        cover[cells[:, 1], cells[:, 0]] = True
        assert (cover & mask).sum() / (cover | mask).sum() > 0.85, f"frame {i}"
