"""Render one animation of a .glb asset as an orbital clip, with Blender's Cycles.

This file runs as a script in an interpreter that has `bpy` (GPL, and it pins NumPy 1), never in
the library's own process, so it imports nothing of d4d_jax and nothing at module top beyond the
standard library:

    python d4d_jax/data/blender.py --asset fox.glb --action Gallop --out clips/fox

It writes the published folder layout: `multi_frame{i}.png` (orbit and motion),
`multi_static_frame{i}.png` (the same orbit, the pose frozen at the first frame of the action),
`front_frame{i}.png` (view 0, motion), 8-bit straight-alpha RGBA on a transparent film, and the
cameras `multi{i}.json`, `static{i}.json`, `front.json`. With `--transforms FILE`, further views at
times of their own, listed as in the D-NeRF datasets (`camera_angle_x`; `file_path`, `time` in
[0, 1] and `transform_matrix` of every frame), are rendered into the same folder beside a copy of
the list.

Camera, lights and sampling follow the renderer of Diffusion4D (Liang et al., 2024; the
`rendering/` folder of its repository), except that the light energies are fixed instead of drawn
per run, the object is normalised by its evaluated vertices (the bounding box of a skinned mesh is
that of its rest pose), and the whole action is resampled to the frames instead of taking its
first second.
"""

import argparse
import contextlib
import json
import math
import os
import re
import sys
from pathlib import Path

LENS_MM = 50.0
SENSOR_MM = 36.0
FOV = 2.0 * math.atan(SENSOR_MM / (2.0 * LENS_MM))  # 0.6911112 rad on both axes
DISTANCE = 2.0
MAX_DEPTH = 5.0
FORMAT_VERSION = 6
WORLD_GREY = 0.0509
# Sun lamps without shadow: name, Euler XYZ in radians, energy in W/m^2 (the middle of the range
# from which the published renderer draws).
LIGHTS = (
    ("key", (0.785398, 0.0, -0.785398), 4.0),
    ("fill", (0.785398, 0.0, 2.356194), 3.0),
    ("rim", (-0.785398, 0.0, -3.926991), 4.0),
    ("bottom", (math.pi, 0.0, 0.0), 2.0),
)
VIEWS = ("dynamic", "static", "front")
FRAME_NAME = {
    "dynamic": "multi_frame{}.png",
    "static": "multi_static_frame{}.png",
    "front": "front_frame{}.png",
}
CAMERA_NAME = {"dynamic": "multi{}.json", "static": "static{}.json", "front": "front.json"}


class RenderError(Exception):
    """A mistake of the user; its message is one sentence."""


# --------------------------------------------------------------------------------------------
# Pure functions (no bpy)


def parse_args(argv=None):
    """Parse the command line; a wrong value ends in one sentence and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--asset", required=True, help="a .glb (or self-contained .gltf) file")
    parser.add_argument("--action", help="name of the animation; may be left out if there is one")
    parser.add_argument("--out", help="folder to write; created")
    parser.add_argument("--resolution", type=_positive, default=256, help="pixels, square")
    parser.add_argument("--samples", type=_positive, default=128, help="Cycles samples per pixel")
    parser.add_argument("--frames", type=_positive, default=24)
    parser.add_argument("--views", type=_views, default=VIEWS, help="comma-separated subset")
    parser.add_argument("--transforms", help="transforms_*.json with further views to render")
    parser.add_argument("--elevation", type=float, default=0.0, help="degrees above the equator")
    parser.add_argument(
        "--azimuth", type=float, default=0.0, help="degrees of view 0, counter-clockwise from -y"
    )
    parser.add_argument(
        "--filter_width",
        type=float,
        default=0.01,
        help="pixel filter in pixels: 0.01 is the published one (hard edges), 1.5 Blender's own",
    )
    parser.add_argument("--denoise", action="store_true", help="Open Image Denoise, 1.4 s a frame")
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--overwrite", action="store_true", help="replace the views in --out")
    parser.add_argument("--list_actions", action="store_true", help="print the names and stop")
    args = parser.parse_args(argv)
    if args.out is None and not args.list_actions:
        parser.error("--out names the folder to write and is missing.")
    if not -89.0 <= args.elevation <= 89.0:
        parser.error(f"--elevation={args.elevation:g} is outside [-89, 89] degrees.")
    return args


def _positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _views(text):
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in VIEWS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r} is not a subset of {','.join(VIEWS)}")
    return tuple(view for view in VIEWS if view in names)


def camera_to_world(view, num_views, elevation=0.0, azimuth=0.0, distance=DISTANCE):
    """Pose of one view of the orbit as nested lists (4, 4), OpenGL axes, angles in radians.

    View `i` of `n` looks at the origin from azimuth + 2 pi i / (n - 1): view 0 from (0, -d, 0),
    then counter-clockwise seen from above (+z), and the last view is the first again.
    """
    turn = azimuth + 2.0 * math.pi * view / max(num_views - 1, 1)
    sin_a, cos_a = math.sin(turn), math.cos(turn)
    sin_e, cos_e = math.sin(elevation), math.cos(elevation)
    right = (cos_a, sin_a, 0.0)
    up = (-sin_a * sin_e, cos_a * sin_e, cos_e)
    back = (sin_a * cos_e, -cos_a * cos_e, sin_e)
    rows = [[right[k], up[k], back[k], distance * back[k]] for k in range(3)]
    return [*rows, [0.0, 0.0, 0.0, 1.0]]


def resample_frames(start, end, count):
    """Frame times (whole frame, fraction in [0, 1)) that spread `count` frames over an action.

    The first is `start` and the last is `end`, so that a looping action closes as the orbit does.
    """
    step = (end - start) / max(count - 1, 1)
    times = []
    for i in range(count):
        time = end if i == count - 1 and count > 1 else start + i * step
        whole = math.floor(time + 1e-6)
        times.append((whole, max(time - whole, 0.0)))
    return times


def camera_json(pose, bbox):
    """The published per-view camera record: pose in Blender axes plus its OpenCV axes."""
    column = [[pose[row][k] for row in range(3)] for k in range(4)]
    return {
        "matrix_world": pose,
        "format_version": FORMAT_VERSION,
        "max_depth": MAX_DEPTH,
        "bbox": bbox,
        "origin": column[3],
        "x_fov": FOV,
        "y_fov": FOV,
        "x": column[0],
        "y": [-value for value in column[1]],
        "z": [-value for value in column[2]],
    }


def read_transforms(path):
    """The further views of a D-NeRF list: horizontal field of view, and the frames.

    Raises RenderError unless every frame has a relative `file_path`, a `time` in [0, 1] and a
    `transform_matrix` of 4 x 4 numbers.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        angle = float(record["camera_angle_x"])
        frames = [
            (str(frame["file_path"]), float(frame["time"]), frame["transform_matrix"])
            for frame in record["frames"]
        ]
    except OSError as error:
        raise RenderError(f"--transforms={path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RenderError(f"{path} is no list of views: {error!r}.") from error
    for name, time, pose in frames:
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        square = [len(row) for row in pose] == [4] * 4
        if not (inside and 0.0 <= time <= 1.0 and square):
            raise RenderError(
                f"Frame {name!r} of {path} needs a path within the folder, a time in [0, 1] and a"
                f" pose of 4 x 4; its time is {time:g}."
            )
    return angle, frames


def pick_action(names, wanted):
    """Resolve `wanted` among the animation names: exactly, or by its last `|` part if unique."""
    if wanted is None:
        if len(names) == 1:
            return names[0]
        raise RenderError(f"--action is missing; the asset has {', '.join(sorted(names))}.")
    if wanted in names:
        return wanted
    tails = [name for name in names if name.rsplit("|", 1)[-1] == wanted]
    if len(tails) == 1:
        return tails[0]
    raise RenderError(
        f"The asset has no animation named {wanted!r}; it has {', '.join(sorted(names))}."
    )


# --------------------------------------------------------------------------------------------
# Blender


def load_asset(path):
    """Import the asset into an empty scene, without the importer's bone-shape meshes."""
    import bpy

    bpy.ops.wm.read_factory_settings(use_empty=True)
    try:
        bpy.ops.import_scene.gltf(filepath=str(path), disable_bone_shape=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RenderError(f"{path} cannot be imported as glTF: {reason}") from error
    if not any(obj.type == "MESH" for obj in bpy.data.objects):
        raise RenderError(f"{path} holds no mesh.")


def animated_ids():
    """The objects and shape keys that carry animation tracks."""
    import bpy

    owners = [*bpy.data.objects, *bpy.data.shape_keys]
    return [o for o in owners if o.animation_data and o.animation_data.nla_tracks]


def list_actions():
    """Animation name -> (first frame, last frame), in the order of the file."""
    ranges = {}
    for owner in animated_ids():
        for track in owner.animation_data.nla_tracks:
            for strip in track.strips:
                start, end = strip.action.frame_range
                low, high = ranges.get(track.name, (start, end))
                ranges[track.name] = (min(low, start), max(high, end))
    return ranges


def play_action(name):
    """Make `name` the only animation: mute every track and assign its action and slot."""
    for owner in animated_ids():
        data = owner.animation_data
        data.action = None
        for track in data.nla_tracks:
            track.mute = True
            if track.name == name and track.strips:
                strip = track.strips[0]
                data.action = strip.action
                if hasattr(strip, "action_slot"):
                    data.action_slot = strip.action_slot


def set_time(time):
    """Put the scene at a (whole frame, fraction) time."""
    import bpy

    bpy.context.scene.frame_set(time[0], subframe=time[1])


def scene_bbox():
    """Corners (min, max) of all evaluated mesh vertices at the current time, world space."""
    import bpy
    import numpy as np

    graph = bpy.context.evaluated_depsgraph_get()
    points = []
    for obj in bpy.context.scene.objects:
        if obj.type != "MESH":
            continue
        posed = obj.evaluated_get(graph)
        mesh = posed.to_mesh()
        vertices = np.empty(3 * len(mesh.vertices), np.float32)
        mesh.vertices.foreach_get("co", vertices)
        pose = np.array(posed.matrix_world, np.float32)
        points.append(vertices.reshape(-1, 3) @ pose[:3, :3].T + pose[:3, 3])
        posed.to_mesh_clear()
    cloud = np.concatenate(points)
    return cloud.min(axis=0), cloud.max(axis=0)


def normalise():
    """Scale and centre the scene, as posed now, into the unit cube around the origin."""
    import bpy

    low, high = scene_bbox()
    size = float((high - low).max())
    if not size > 0.0:
        raise RenderError("The asset has no extent at the first frame of the action.")
    roots = [obj for obj in bpy.context.scene.objects if obj.parent is None]
    holder = bpy.data.objects.new("normalise", None)
    bpy.context.scene.collection.objects.link(holder)
    for root in roots:
        root.parent = holder
    holder.scale = (1.0 / size,) * 3
    holder.location = tuple(float(-(a + b) / (2.0 * size)) for a, b in zip(low, high, strict=True))
    bpy.context.view_layer.update()
    low, high = scene_bbox()
    return [[float(value) for value in low], [float(value) for value in high]]


def add_stage():
    """Replace the asset's own cameras and lights by the published ones and a grey world."""
    import bpy

    scene = bpy.context.scene
    for obj in [obj for obj in scene.objects if obj.type in ("CAMERA", "LIGHT")]:
        bpy.data.objects.remove(obj, do_unlink=True)
    for name, rotation, energy in LIGHTS:
        lamp = bpy.data.lights.new(name, "SUN")
        lamp.energy = energy
        lamp.use_shadow = False
        obj = bpy.data.objects.new(name, lamp)
        obj.rotation_euler = rotation
        scene.collection.objects.link(obj)
    world = bpy.data.worlds.new("grey")
    world.use_nodes = True
    world.node_tree.nodes["Background"].inputs["Color"].default_value = (*(WORLD_GREY,) * 3, 1.0)
    scene.world = world
    lens = bpy.data.cameras.new("camera")
    lens.lens, lens.sensor_width, lens.sensor_fit = LENS_MM, SENSOR_MM, "AUTO"
    lens.clip_start, lens.clip_end = 0.1, 100.0
    camera = bpy.data.objects.new("camera", lens)
    scene.collection.objects.link(camera)
    scene.camera = camera
    return camera


def set_renderer(args):
    """Cycles on the CPU with the published bounces, filter, film and colour transform."""
    import bpy

    scene = bpy.context.scene
    render, cycles = scene.render, scene.cycles
    render.engine = "CYCLES"
    cycles.device = "CPU"
    cycles.samples = args.samples
    cycles.use_adaptive_sampling = False
    cycles.use_denoising = args.denoise
    cycles.diffuse_bounces = cycles.glossy_bounces = 1
    cycles.transparent_max_bounces = cycles.transmission_bounces = 3
    cycles.filter_width = max(args.filter_width, 0.01)
    cycles.seed = 0
    render.resolution_x = render.resolution_y = args.resolution
    render.resolution_percentage = 100
    render.film_transparent = True
    render.use_persistent_data = True
    render.image_settings.file_format = "PNG"
    render.image_settings.color_mode = "RGBA"
    render.image_settings.color_depth = "8"
    if args.threads > 0:
        render.threads_mode, render.threads = "FIXED", args.threads
    scene.view_settings.view_transform = "Filmic"
    scene.view_settings.look = "None"


def delete_views(out, views):
    """Delete the frames and cameras of these views, of any number, and nothing else."""
    for view in views:
        for name in (FRAME_NAME[view], CAMERA_NAME[view]):
            pattern = re.compile(re.escape(name).replace(r"\{\}", r"\d+"))
            for path in list(Path(out).iterdir()):
                if pattern.fullmatch(path.name):
                    path.unlink()


def render_frame(path):
    """Render what the camera sees now."""
    import bpy

    bpy.context.scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=True)


def render_transforms(args, camera, span):
    """Render the views of --transforms, whose times 0 and 1 are the ends of the action."""
    from mathutils import Matrix

    angle, frames = read_transforms(args.transforms)
    start, end = span
    camera.data.angle = angle
    for name, time, pose in frames:
        set_time(resample_frames(start + time * (end - start), end, 1)[0])
        camera.matrix_world = Matrix(pose)
        render_frame((Path(args.out) / name).with_suffix(".png"))
    source = Path(args.transforms)
    (Path(args.out) / source.name).write_bytes(source.read_bytes())


def render_clip(args, camera, times, bbox):
    """Render the asked views of the prepared scene and write their cameras."""
    from mathutils import Matrix

    out = Path(args.out)
    elevation, azimuth = math.radians(args.elevation), math.radians(args.azimuth)
    for view in args.views:
        for i in range(args.frames):
            set_time(times[0] if view == "static" else times[i])
            index = 0 if view == "front" else i
            pose = camera_to_world(index, args.frames, elevation, azimuth)
            camera.matrix_world = Matrix(pose)
            render_frame(out / FRAME_NAME[view].format(i))
            if view != "front" or i == 0:
                record = json.dumps(camera_json(pose, bbox))
                (out / CAMERA_NAME[view].format(i)).write_text(record + "\n")


@contextlib.contextmanager
def quiet():
    """Send Blender's own chatter on stdout, which it writes below Python, to nowhere."""
    sys.stdout.flush()
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)


def check_paths(args):
    """Everything that can be wrong before Blender starts."""
    asset = Path(args.asset)
    if not asset.is_file():
        raise RenderError(f"There is no asset file {asset}.")
    if asset.suffix.lower() not in (".glb", ".gltf"):
        raise RenderError(f"{asset} is not a .glb or .gltf file.")
    if asset.suffix.lower() == ".glb":
        with asset.open("rb") as stream:
            if stream.read(4) != b"glTF":
                raise RenderError(f"{asset} is named .glb but does not hold binary glTF.")
    if args.list_actions:
        return
    if args.transforms:
        read_transforms(args.transforms)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise RenderError(f"--out={out} is a file, not a folder.")
    if out.is_dir() and any(out.iterdir()) and not args.overwrite:
        raise RenderError(f"{out} already holds files; give --overwrite or another --out.")


def run(args):
    """Render as the parsed arguments say; raises RenderError on a mistake of the user."""
    check_paths(args)
    try:
        import bpy  # noqa: F401
    except ImportError as error:
        raise RenderError(
            "This interpreter has no bpy; make an environment of its own and `pip install bpy`."
        ) from error
    with quiet():
        load_asset(args.asset)
        actions = list_actions()
    if not actions:
        raise RenderError(f"{args.asset} has no animation.")
    if args.list_actions:
        for name, (start, end) in actions.items():
            print(f"{name}\t{end - start:g} frames")
        return
    name = pick_action(list(actions), args.action)
    times = resample_frames(*actions[name], args.frames)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with quiet():
        play_action(name)
        set_time(times[0])
        bbox = normalise()
        camera = add_stage()
        set_renderer(args)
        delete_views(args.out, args.views)  # --overwrite may have asked for fewer frames
        render_clip(args, camera, times, bbox)
        if args.transforms:
            render_transforms(args, camera, actions[name])
    print(f"Rendered {name} of {args.asset} to {args.out}.")


def main(argv=None):
    try:
        run(parse_args(argv))
    except RenderError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
