"""Blender's renderer: its settings, and one picture with its depth and mask.

Read by `blender.py` in Blender's own Python; imports nothing of the library, and bpy only within.
"""

import struct
import zlib
from pathlib import Path

import numpy as np

if __package__:
    from d4d_jax.data import blender_plan as plan
else:
    import blender_plan as plan


def set_renderer(args):
    """The engine with the published bounces, filter, film and colour transform."""
    import bpy

    scene = bpy.context.scene
    render = scene.render
    if args.engine == "cycles":
        _set_cycles(scene.cycles, args)
        render.engine = "CYCLES"
    else:
        engines = render.bl_rna.properties["engine"].enum_items.keys()
        render.engine = next(name for name in engines if name.startswith("BLENDER_EEVEE"))
        scene.eevee.taa_render_samples = args.samples
    render.filter_size = max(args.filter_width, 0.01)
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
    if args.passes:
        _add_depth_output(scene)


def _set_cycles(cycles, args):
    cycles.device = "CPU"
    cycles.samples = args.samples
    cycles.use_adaptive_sampling = False
    cycles.use_denoising = args.denoise
    cycles.diffuse_bounces = cycles.glossy_bounces = 1
    cycles.transparent_max_bounces = cycles.transmission_bounces = 3
    cycles.filter_width = max(args.filter_width, 0.01)
    cycles.seed = 0


def _add_depth_output(scene):
    """Have every rendering write its depth, in a file of floats beside the picture."""
    import bpy

    if not hasattr(scene, "node_tree"):
        raise plan.RenderError(f"--passes needs Blender 4; this is {bpy.app.version_string}.")
    bpy.context.view_layer.use_pass_z = True
    scene.use_nodes = True
    tree = scene.node_tree
    tree.nodes.clear()
    layers = tree.nodes.new("CompositorNodeRLayers")
    picture = tree.nodes.new("CompositorNodeComposite")
    tree.links.new(layers.outputs["Image"], picture.inputs["Image"])
    depth = tree.nodes.new("CompositorNodeOutputFile")
    depth.name = "depth"
    depth.format.file_format, depth.format.color_depth = "OPEN_EXR", "32"
    depth.format.color_mode = "BW"
    tree.links.new(layers.outputs["Depth"], depth.inputs[0])


def render_frame(camera, pose, path, passes=()):
    """Render what the camera sees from `pose` into `path`, and the passes into files beside it."""
    import bpy
    from mathutils import Matrix

    scene = bpy.context.scene
    camera.matrix_world = Matrix(pose)
    scene.render.filepath = str(path)
    if passes:
        output = scene.node_tree.nodes["depth"]
        output.base_path, output.file_slots[0].path = str(path.parent), ".depth"
    bpy.ops.render.render(write_still=True)
    strip_notes(path)
    if not passes:
        return
    (floats,) = path.parent.glob(".depth*.exr")
    depth = _read_floats(floats)
    floats.unlink()
    seen = depth < plan.MAX_DEPTH
    if "depth" in passes:
        scaled = np.where(seen, np.round(65535.0 * depth / plan.MAX_DEPTH), 0.0)
        write_grey(path.with_name(plan.pass_name(path.name, "depth")), scaled.astype(np.uint16))
    if "mask" in passes:
        mask = np.where(seen, 255, 0).astype(np.uint8)
        write_grey(path.with_name(plan.pass_name(path.name, "mask")), mask)


def _read_floats(path):
    """(h, w) float32 of the first channel, the top row first."""
    import bpy

    image = bpy.data.images.load(str(path))
    width, height = image.size
    values = np.empty(width * height * image.channels, np.float32)
    image.pixels.foreach_get(values)
    bpy.data.images.remove(image)
    return values.reshape(height, width, -1)[::-1, :, 0]


def strip_notes(path):
    """Drop what a PNG does not need: notes of dates and seconds make equal pictures unequal."""
    data = path.read_bytes()
    kept, place = [data[:8]], 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        if data[place + 4 : place + 5].isupper():
            kept.append(data[place : place + 12 + size])
        place += 12 + size
    path.write_bytes(b"".join(kept))


def write_grey(path, image):
    """Write (h, w) of 8 or 16 bits as a grey PNG, which Blender cannot without its colours."""
    height, width = image.shape
    bits = 8 * image.dtype.itemsize
    rows = image.astype(image.dtype.newbyteorder(">")).view(np.uint8).reshape(height, -1)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1)  # filter 0: none
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    data = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + data)
