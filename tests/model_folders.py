"""Folders of weights for `OrbitPipeline.load`, of toy size and at random."""

import functools
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
from test_tokenizer import merge_text

from d4d_jax import conversion
from d4d_jax.models import clip
from d4d_jax.models.autoencoder_kl import KLCodec
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.models.unet import SpatioTemporalUNet
from d4d_jax.models.variants import VARIANTS
from d4d_jax.presets import PRESETS

FRAMES, SIZE = 3, 16
NETWORK = {
    "width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_levels": (0,),
    "head_dim": 8,
    "init_heads": 1,
    "init_head_dim": 8,
    "context_dim": 64,
    "groups": 4,
}
TOWERS = clip.VARIANTS["tiny"]


def randomised(init, seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init)
    return jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)


def network_params(variant, fields):
    model = SpatioTemporalUNet(**VARIANTS[variant] | fields)
    x = jnp.zeros((1, FRAMES, 2, 2, 4))
    conditioning = Conditioning(
        image=jnp.zeros((1, 2, 2, 4)),
        image_embedding=jnp.zeros((1, 64)),
        context=jnp.zeros((1, 77, 64)),
        camera=jnp.zeros((1, FRAMES, 4, 4)),
        static=x if model.static_channels else None,
    )
    arguments = (jax.random.key(0), x, jnp.zeros(1, int), conditioning)
    return randomised(lambda: model.init(*arguments)["params"], 0)


@functools.cache
def towers():
    text, image = clip.TextEncoder(**TOWERS["text"]), clip.ImageEncoder(**TOWERS["image"])
    key, pixels = jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    return {
        "text": randomised(lambda: text.init(key, jnp.zeros((1, 77), int))["params"], 1),
        "image": randomised(lambda: image.init(key, pixels)["params"], 2),
    }


def write_folder(folder, preset, fields=NETWORK):
    """Writes a model of the preset, with fields of its network, into a folder that exists."""
    codec = randomised(lambda: KLCodec("tiny").init(jax.random.key(0)), 3)
    conversion.save(folder / "network.safetensors", network_params(preset, fields))
    conversion.save(folder / "codec.safetensors", codec)
    for name, params in towers().items():
        conversion.save(folder / f"{name}.safetensors", params)
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(merge_text().encode()))
    own = {
        "preset": preset,
        "network": {"name": "unet", "variant": preset, **fields},
        "codec": {"name": "kl", "variant": "tiny"},
        "data": {"size": SIZE, "num_frames": FRAMES},
        "prompt": PRESETS[preset]["prompt"] | {"variant": "tiny"},
    }
    (folder / "model.json").write_text(json.dumps(own))
