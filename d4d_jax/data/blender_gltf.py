"""What can be wrong with a glTF file, found without Blender, which is slower and says less.

Standard library only: `blender.py` reads this in Blender's own Python.
"""

import json
import struct
import urllib.parse
from pathlib import Path

if __package__:
    from d4d_jax.data import blender_plan as plan
else:
    import blender_plan as plan

SUFFIXES = (".glb", ".gltf")


def check_asset(path, max_megabytes=0.0):
    """Raise RenderError, in one sentence, unless `path` is glTF with a mesh and an animation.

    Args:
        path: of a .glb or .gltf file.
        max_megabytes: size of the file, with all files that it names, beyond which it is refused
            unread; 0 allows any.
    """
    path = Path(path)
    if not path.is_file():
        raise plan.RenderError(f"There is no asset file {path}.")
    if path.suffix.lower() not in SUFFIXES:
        raise plan.RenderError(f"{path} is not a .glb or .gltf file.")
    _check_size(path, [path], max_megabytes)
    scene = read_scene(path)
    _check_size(path, [path, *_other_files(path, scene)], max_megabytes)
    if not scene.get("meshes"):
        raise plan.RenderError(f"{path} holds no mesh.")
    if not scene.get("animations"):
        raise plan.RenderError(f"{path} has no animation.")


def read_scene(path):
    """The JSON part of a .glb or .gltf file."""
    with Path(path).open("rb") as stream:
        data = stream.read() if path.suffix.lower() == ".gltf" else _json_chunk(path, stream)
    try:
        scene = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise plan.RenderError(f"{path} is no glTF: its JSON cannot be read ({error}).") from error
    except RecursionError as error:
        raise plan.RenderError(f"{path} is no glTF: its JSON is nested too deeply.") from error
    if not isinstance(scene, dict) or "asset" not in scene:
        raise plan.RenderError(f"{path} is no glTF: its JSON has no field 'asset'.")
    return scene


def _json_chunk(path, stream):
    size = path.stat().st_size
    if size == 0:
        raise plan.RenderError(f"{path} is empty (0 bytes).")
    head = stream.read(20)
    if head[:4] != b"glTF" or len(head) < 20:
        raise plan.RenderError(f"{path} is named .glb but does not hold binary glTF.")
    version, length, chunk, kind = struct.unpack("<II I4s", head[4:])
    if version != 2 or kind != b"JSON":
        raise plan.RenderError(f"{path} is binary glTF of version {version}; only 2 can be read.")
    if length > size or 20 + chunk > size:
        raise plan.RenderError(f"{path} is cut short: it has {size} of {length} bytes.")
    return stream.read(chunk)


def _check_size(path, files, max_megabytes):
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    if 0 < max_megabytes < megabytes:
        raise plan.RenderError(
            f"{path} has {megabytes:.0f} MB, more than --max_megabytes={max_megabytes:g}."
        )


def _other_files(path, scene):
    """The files of buffers and images that are not within `path` itself."""
    found = []
    for kind in ("buffers", "images"):
        for item in scene.get(kind) or []:
            uri = item.get("uri") if isinstance(item, dict) else None
            if not isinstance(uri, str) or uri.startswith("data:"):
                continue
            file = path.parent / urllib.parse.unquote(uri)
            if not file.is_file():
                what = "texture" if kind == "images" else "buffer"
                raise plan.RenderError(f"{path} needs the {what} file {uri!r}, which is missing.")
            found.append(file)
    return found
