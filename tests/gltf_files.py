"""glTF files as small as they can be, and a Blender that is none."""

import json
import struct
import sys
from pathlib import Path

SCENE = {"asset": {"version": "2.0"}, "meshes": [{}], "animations": [{}]}


def write_glb(path: Path, **changes) -> Path:
    """A .glb of nothing but its JSON; a change to None leaves the field out."""
    scene = {key: value for key, value in (SCENE | changes).items() if value is not None}
    text = json.dumps(scene).encode()
    text += b" " * (-len(text) % 4)
    head = struct.pack("<4sIIII", b"glTF", 2, 20 + len(text), len(text), 0x4E4F534A)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + text)
    return path


#: Runs `blender.py` with a studio that draws squares, and does what the asset's name says.
_SCRIPT = """#!{python}
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from PIL import Image
from d4d_jax.data import blender, blender_plan as plan

class Studio:
    def __init__(self, args):
        self.args, self.name = args, Path(args.asset).stem.split("-")[0]
        if self.name == "hang":
            time.sleep(600)
        if self.name == "hog":
            self.memory = [bytearray(os.urandom(1) * 2**28) for _ in range(4)]
            time.sleep(600)
        self.actions = {{"Rig|Walk": (0.0, 10.0), "Rig|Run": (0.0, 8.0), "Rig|Idle": (2.0, 4.0)}}

    def render(self, action, out):
        if self.name == "crash" and action == "Rig|Run":
            os.kill(os.getpid(), 11)
        if self.name == "fails" and action == "Rig|Run":
            raise plan.RenderError("The asset has no extent.")
        if self.name == "slow":
            time.sleep(0.5)
        out.mkdir(parents=True)
        size, drawn = self.args.resolution, plan.draw(self.args.seed, self.args.key, action)
        for name in self.args.views:
            view = plan.VIEWS[name]
            for i in range(self.args.frames):
                image = Image.new("RGBA", (size, size))
                shift = i if view.moves else 0
                image.paste((200, 10 * shift, 30, 255), (2, 2, size // 2, size // 2))
                image.save(out / view.frame.format(i))
        return {{"frames": self.actions[action][1], "loop": False, "azimuth": 0.0,
                "elevation": 0.0, "energies": drawn.energies}}

blender.Studio = Studio
blender.need_bpy = lambda: None
sys.exit(blender.main(sys.argv[2:]))  # without the path of blender.py
"""


def fake_blender(path: Path) -> Path:
    """An executable for --blender_python. Assets named hang, hog, crash, fails, slow do that."""
    root = str(Path(__file__).parents[1])
    path.write_text(_SCRIPT.format(python=sys.executable, root=root), encoding="utf-8")
    path.chmod(0o755)
    return path
