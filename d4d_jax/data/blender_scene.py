"""An asset in Blender's scene: import, animations, extent, place, lights and camera.

Read by `blender.py` in Blender's own Python; imports nothing of the library, and bpy only within.
"""

import numpy as np

if __package__:
    from d4d_jax.data import blender_plan as plan
else:
    import blender_plan as plan

WORLD_GREY = 0.0509


def load_asset(path):
    """Import the asset into an empty scene, without the importer's bone-shape meshes."""
    import bpy

    bpy.ops.wm.read_factory_settings(use_empty=True)
    try:
        bpy.ops.import_scene.gltf(filepath=str(path), disable_bone_shape=True)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].rstrip(".")
        raise plan.RenderError(f"{path} cannot be imported as glTF: {reason}.") from error
    if not any(obj.type == "MESH" for obj in bpy.context.scene.objects):
        raise plan.RenderError(f"{path} holds no mesh.")
    bpy.context.scene.render.fps = 24
    for obj in [o for o in bpy.context.scene.objects if o.type in ("CAMERA", "LIGHT")]:
        bpy.data.objects.remove(obj, do_unlink=True)


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


class Rest:
    """What animations change, as imported: one leaves no trace in the next."""

    def __init__(self):
        import bpy

        posed = [o for o in bpy.data.objects if o.type != "ARMATURE"]
        posed += [b for o in bpy.data.objects if o.pose for b in o.pose.bones]
        posed += [o for o in bpy.data.objects if o.type == "ARMATURE"]
        self._poses = [(item, item.matrix_basis.copy()) for item in posed]
        keys = [block for key in bpy.data.shape_keys for block in key.key_blocks]
        self._weights = [(block, block.value) for block in keys]

    def restore(self):
        """Put everything back."""
        for item, pose in self._poses:
            item.matrix_basis = pose
        for block, value in self._weights:
            block.value = value


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


def vertices():
    """(n, 3) float32: all evaluated mesh vertices at the current time, world space."""
    import bpy

    graph = bpy.context.evaluated_depsgraph_get()
    points = []
    for obj in bpy.context.scene.objects:
        if obj.type != "MESH" or obj.hide_render:
            continue
        posed = obj.evaluated_get(graph)
        mesh = posed.to_mesh()
        local = np.empty(3 * len(mesh.vertices), np.float32)
        mesh.vertices.foreach_get("co", local)
        pose = np.array(posed.matrix_world, np.float32)
        points.append(local.reshape(-1, 3) @ pose[:3, :3].T + pose[:3, 3])
        posed.to_mesh_clear()
    return np.concatenate(points)


def loops(span, threshold):
    """Whether the action ends as it starts.

    That is, its vertices lie, on average, within `threshold` times the longest side of the object.
    """
    start, end = (plan.resample_frames(at, at, 1)[0] for at in span)
    set_time(start)
    first = vertices()
    set_time(end)
    last = vertices()
    if first.shape != last.shape:
        return False
    size = float(np.ptp(first, axis=0).max())
    return bool(np.linalg.norm(last - first, axis=1).mean() <= threshold * size)


def add_holder():
    """Hang everything on one empty object, which `normalise` moves."""
    import bpy

    holder = bpy.data.objects.new("normalise", None)
    roots = [obj for obj in bpy.context.scene.objects if obj.parent is None]
    bpy.context.scene.collection.objects.link(holder)
    for root in roots:
        root.parent = holder
    return holder


def normalise(holder, times):
    """Scale and centre the scene so that the box of all these times fills the unit cube.

    Returns the box [[min], [max]] at the first of them, which the scene is left at.
    """
    import bpy

    holder.scale, holder.location = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)
    low, high = np.full(3, np.inf), np.full(3, -np.inf)
    for time in reversed(times):
        set_time(time)
        cloud = vertices()
        low, high = np.minimum(low, cloud.min(axis=0)), np.maximum(high, cloud.max(axis=0))
    size = float((high - low).max())
    if not (np.isfinite(size) and size > 0.0):
        raise plan.RenderError("The asset has no extent at the first frame of the action.")
    holder.scale = (1.0 / size,) * 3
    holder.location = tuple(float(value) for value in -(low + high) / (2.0 * size))
    bpy.context.view_layer.update()
    cloud = vertices()
    return [[float(v) for v in cloud.min(axis=0)], [float(v) for v in cloud.max(axis=0)]]


def add_stage():
    """The published camera and lights, and a grey world."""
    import bpy

    scene = bpy.context.scene
    for name, rotation, energy in plan.LIGHTS:
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
    lens.lens, lens.sensor_width, lens.sensor_fit = plan.LENS_MM, plan.SENSOR_MM, "AUTO"
    lens.clip_start, lens.clip_end = 0.1, 100.0
    camera = bpy.data.objects.new("camera", lens)
    scene.collection.objects.link(camera)
    scene.camera = camera
    return camera


def set_energies(energies):
    """Give the lamps of `add_stage` these energies."""
    import bpy

    lamps = [obj for obj in bpy.context.scene.objects if obj.type == "LIGHT"]
    for (name, _, _), energy in zip(plan.LIGHTS, energies, strict=True):
        next(obj for obj in lamps if obj.name.split(".")[0] == name).data.energy = energy
