"""Reduced networks of every format, and state dicts with random numbers for them."""

import functools
import zlib
from collections.abc import Mapping

import jax
import numpy as np
import videomv_names

from d4d_jax.conversion.formats import template
from d4d_jax.models.autoencoder_kl import AutoencoderKL
from d4d_jax.models.clip import ImageEncoder, TextEncoder
from d4d_jax.models.unet import SpatioTemporalUNet
from d4d_jax.models.variants import VARIANTS

UNET = {
    "width": 8,
    "head_dim": 4,
    "init_heads": 8,
    "init_head_dim": 4,
    "context_dim": 12,
    "groups": 4,
}
SHALLOW = {"multipliers": (1, 2), "blocks": 1, "attention_levels": (0,)}
DEEP = {"multipliers": (1, 1, 2), "blocks": 2, "attention_levels": (2,)}
TEXT = {
    "width": 16,
    "layers": 3,
    "heads": 2,
    "mlp": 24,
    "vocabulary": 20,
    "positions": 7,
}
IMAGE = {
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp": 24,
    "patch": 7,
    "size": 14,
    "projection": 10,
}
VAE = {"width": 8, "multipliers": (1, 2, 3), "blocks": 1, "groups": 4}


def unet(variant="videomv_t2v", **fields):
    return SpatioTemporalUNet(**VARIANTS[variant] | UNET | fields)


#: Format and network.
CASES = [
    ("videomv_t2v", unet(**SHALLOW)),
    ("videomv_t2v", unet(**DEEP)),
    ("videomv_i2v", unet("videomv_i2v", **SHALLOW)),
    ("diffusers_t2v", unet(**SHALLOW, camera_embedding=False)),
    ("diffusers_i2v", unet("videomv_i2v", **SHALLOW, camera_embedding=False)),
    ("compvis_vae", AutoencoderKL(**VAE)),
    ("diffusers_vae", AutoencoderKL(**VAE)),
    ("open_clip_text", TextEncoder(**TEXT)),
    ("open_clip_text", TextEncoder(**TEXT, skip_last=0, projection=10)),
    ("open_clip_image", ImageEncoder(**IMAGE)),
    ("transformers_text", TextEncoder(**TEXT)),
    ("transformers_text", TextEncoder(**TEXT, skip_last=0, projection=10)),
    ("transformers_image", ImageEncoder(**IMAGE)),
]


def videomv_shapes(structure, *, image=False):
    """VideoMV's names for `unet(**structure)`."""
    sizes = {"width": UNET["width"], "context": UNET["context_dim"]}
    inner = UNET["init_heads"] * UNET["init_head_dim"]
    return videomv_names.unet(**sizes, **structure, init=inner, image=image)


def draw(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random float32 arrays, each seeded by its name."""

    def normal(name, shape):
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        return generator.standard_normal(shape, np.float32)

    return {name: normal(name, shape) for name, shape in shapes.items()}


@functools.cache
def leaves_of(network):
    """Shapes by path."""
    return template(network)


def draw_leaves(network) -> dict[str, np.ndarray]:
    """Random parameters of a network by path."""
    return draw({path: leaf.shape for path, leaf in leaves_of(network).items()})


def assert_same(one, other):
    """Equal trees of arrays, to the last bit."""
    one, other = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (one, other))
    assert one.keys() == other.keys()
    for path, array in one.items():
        assert array.dtype == other[path].dtype == np.float32, path
        np.testing.assert_array_equal(array, other[path], err_msg=str(path))


def draw_sound(network) -> dict[str, np.ndarray]:
    """Random parameters that keep activations of order one; none of them is 0."""

    def scaled(path, array):
        if path.endswith("kernel"):
            return array / np.float32(np.sqrt(np.prod(array.shape[:-1])))
        return np.float32(0.2) * array + np.float32(path.endswith("scale"))

    return {path: scaled(path, array) for path, array in draw_leaves(network).items()}


#: What the peers are asked about.
PARITY = {
    "t2v": ("diffusers_t2v", unet(**SHALLOW, camera_embedding=False)),
    "i2v": ("diffusers_i2v", unet("videomv_i2v", **SHALLOW, camera_embedding=False)),
    "vae": ("diffusers_vae", AutoencoderKL(**VAE)),
    "text": ("transformers_text", TextEncoder(**TEXT)),
    "pooled": ("transformers_text", TextEncoder(**TEXT, skip_last=0, projection=10)),
    "image": ("transformers_image", ImageEncoder(**IMAGE)),
}


def inputs(format) -> dict[str, np.ndarray]:
    """Fixed inputs of a network of this format, channels last."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    if format == "transformers_text":
        tokens = rng.integers(1, 18, (2, 7)).astype(np.int32)
        tokens[0, 4] = tokens[1, 6] = TEXT["vocabulary"] - 1  # the end of the text
        return {"tokens": tokens}
    if format == "transformers_image":
        return {"images": normal(2, 14, 14, 3)}
    if format == "diffusers_vae":
        return {"images": normal(2, 16, 8, 3)}
    dim = UNET["context_dim"]
    arrays = {"x_t": normal(2, 3, 8, 8, 4), "context": normal(2, 5, dim)}
    arrays["timestep"] = np.array([17, 803], np.int32)
    if format == "diffusers_i2v":
        arrays |= {"image": normal(2, 8, 8, 4), "image_embedding": normal(2, dim)}
    return arrays
