"""What belongs together in a published model: network, codec, schedule, prompt, orbit, guidance.

`PRESETS["videomv_t2v"]` is a configuration in values that JSON has, which
`d4d_jax.pipeline.OrbitPipeline.from_parts` understands. Figures of VideoMV (Zuo et al. 2024, arXiv
2403.12010) are those of its published inference; those of Diffusion4D are the paper's.
"""

import math
from collections.abc import Mapping
from typing import Any

_SIZES = {"size": 256, "num_frames": 24}
_CODEC = {"name": "kl", "variant": "sd"}
_GREY = 128 / 255
_TEXT_SCHEDULE = {"name": "scaled_linear", "prediction": "eps"}
_IMAGE_SCHEDULE = {"name": "cosine", "prediction": "v", "zero_terminal_snr": True}
_EQUATION_3 = {"name": "three_d_aware", "w1": 7.0, "w2": 0.5}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "videomv_t2v": {
        "network": {"name": "unet", "variant": "videomv_t2v"},
        "codec": _CODEC | {"background": _GREY},
        "schedule": _TEXT_SCHEDULE,
        "prompt": {"name": "text"},
        "guidance": {"name": "classifier_free", "scale": 9.0},
        "orbit": {
            "azimuth": math.pi / 2,
            "elevation": math.radians(15),
            "distance": 2.0,
            "closed": False,
        },
        "data": _SIZES | {"background": [_GREY] * 3},
        "spacing": "leading",
    },
    "videomv_i2v": {
        "network": {"name": "unet", "variant": "videomv_i2v"},
        "codec": _CODEC,
        "schedule": _IMAGE_SCHEDULE,
        "prompt": {"name": "image_text"},
        "guidance": {"name": "classifier_free", "scale": 6.0},
        "orbit": {
            "azimuth": math.pi / 2,
            "elevation": math.radians(5),
            "distance": 1.7,
            "closed": False,
        },
        "data": _SIZES,
        "spacing": "leading",
    },
    "diffusion4d_t2v": {
        "network": {"name": "unet", "variant": "diffusion4d_t2v"},
        "codec": _CODEC,
        "schedule": _TEXT_SCHEDULE,
        "prompt": {"name": "text"},
        "guidance": _EQUATION_3,
        "data": _SIZES,
        "spacing": "leading",
    },
    "diffusion4d_i2v": {
        "network": {"name": "unet", "variant": "diffusion4d_i2v"},
        "codec": _CODEC,
        "schedule": _IMAGE_SCHEDULE,
        "prompt": {"name": "image_text"},
        "guidance": _EQUATION_3,
        "data": _SIZES,
        "spacing": "leading",
    },
    "diffusion4d_static3d": {
        "network": {"name": "unet", "variant": "diffusion4d_static3d"},
        "codec": _CODEC,
        "schedule": _IMAGE_SCHEDULE,
        "prompt": {"name": "image_text"},
        "guidance": _EQUATION_3,
        "data": _SIZES,
        "spacing": "leading",
    },
}
