"""Files of Gaussians: exchange formats for one instant, and a checkpoint of a whole asset.

    export("frame.ply", asset, 0.5)                # or .spz, .glb: for viewers and editors
    export_sequence("frames", asset, [0, 0.5, 1])  # frames/0000.ply, ... and frames.json
    save_asset("asset.npz", asset)                 # everything, bit for bit
    asset = load_asset("asset.npz")

A file is replaced only when the new one is complete; splats that are not active are never written.
"""

from gaussians.io.checkpoint import load_asset, save_asset
from gaussians.io.exports import check_format, export, export_sequence
from gaussians.io.files import DAMAGE, replace_file
from gaussians.io.gltf import write_glb
from gaussians.io.ply import read_ply, write_ply
from gaussians.io.spz import write_spz

__all__ = [
    "DAMAGE",
    "check_format",
    "export",
    "export_sequence",
    "load_asset",
    "read_ply",
    "replace_file",
    "save_asset",
    "write_glb",
    "write_ply",
    "write_spz",
]
