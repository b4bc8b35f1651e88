"""Named sets of fields of `SpatioTemporalUNet`.

Parameters: tiny 1.8 M, small 7.1 M with a context of 1024, videomv_t2v 1,412,895,300, videomv_i2v
1,422,130,664, and the networks of Diffusion4D 1.6 M more for the motion magnitude.
"""

from typing import Any

_TEXT: dict[str, Any] = {"motion_embedding": False}
_IMAGE: dict[str, Any] = {
    "motion_embedding": False,
    "image_concat": "encoded",
    "image_tokens": True,
    "image_embedding": True,
    "drop_image": False,  # only text and embedding, as VideoMV's unconditional branch
    "fps": 8.0,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {  # 24 x 8 x 8 latents of 48 channels: patches of 8 x 8 pixels, for training on a CPU
        "in_channels": 48,
        "out_channels": 48,
        "width": 56,
        "multipliers": (1, 1),
        "blocks": 1,
        "attention_levels": (1,),
        "head_dim": 28,
        "init_heads": 0,
        "context_dim": 0,
        "groups": 8,
        "image_concat": "all",
        "dropout": 0.0,
    },
    "small": {  # the blocks of the paper's networks at a tenth of the width
        "width": 32,
        "multipliers": (1, 2, 2, 2),
        "head_dim": 8,
        "init_head_dim": 8,
    },
    "videomv_t2v": _TEXT,
    "videomv_i2v": _IMAGE,
    "diffusion4d_t2v": _TEXT | {"motion_embedding": True},
    "diffusion4d_i2v": _IMAGE | {"motion_embedding": True},
    "diffusion4d_static3d": _IMAGE | {"motion_embedding": True, "static_channels": 4},
}


def expand(config: dict[str, Any]) -> dict[str, Any]:
    """The fields of a network's configuration: those of its `variant`, if it has one, and its own.

    Lists, which JSON has for tuples, become tuples.

    Raises:
        ValueError: there is no such variant.
    """
    own = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k != "variant"}
    variant = config.get("variant")
    if variant is None:
        return own
    if variant not in VARIANTS:
        raise ValueError(f"Unknown network variant {variant!r}; known: {', '.join(VARIANTS)}.")
    return VARIANTS[variant] | own
