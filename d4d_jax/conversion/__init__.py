"""Weights of other implementations as parameters of the networks here, and back.

    params = conversion.load("videomv_t2v.pth", "videomv_t2v")
    conversion.save("unet", params, "diffusers_t2v", drop=["camera_embedding"])

`FORMATS` names the formats; `convert` and `export` do the same with state dicts in memory, and
`convert_file`, which experiments/convert.py calls, from file to file with one tensor in memory.
"""

from d4d_jax.conversion.formats import FORMATS
from d4d_jax.conversion.matching import ConversionError, Report
from d4d_jax.conversion.rules import Table
from d4d_jax.conversion.weights import convert, convert_file, export, load, save

__all__ = [
    "FORMATS",
    "ConversionError",
    "Report",
    "Table",
    "convert",
    "convert_file",
    "export",
    "load",
    "save",
]
