"""Makes unet_variants.npz: outputs and gradients of diffusers' UNet3DConditionModel and
I2VGenXLUNet with random weights.

    pip install -e '.[parity]'
    python tests/golden/make_unet_variants_golden.py

Every parameter of our networks is drawn from a generator seeded by its name and exported to
diffusers by `d4d_jax.conversion`, which loads it strictly; nothing is left at its initial value.
Cameras, which diffusers' networks do not know, are added to the time embedding of every residual
block by a hook.
"""

import dataclasses
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from d4d_jax import conversion
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.models.unet import SpatioTemporalUNet
from d4d_jax.models.variants import VARIANTS

PATH = pathlib.Path(__file__).with_name("unet_variants.npz")

WIDTHS = {"width": 32, "multipliers": (1, 2), "attention_levels": (0,), "blocks": 1, "head_dim": 16}
REDUCED = WIDTHS | {"context_dim": 24, "groups": 8, "init_head_dim": 16, "dropout": 0.0}
PEER = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 16,  # the width of a head, whatever it is called inside
    "norm_num_groups": 8,
}
#: Clips, frames, height and width of the latents.
SHAPES = [(1, 5, 16, 16), (2, 3, 8, 12)]


def draw(path, leaf):
    """A random tensor that keeps activations of order one, the same whenever it is asked for."""
    name = jax.tree_util.keystr(path)
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(leaf.shape)
    if len(leaf.shape) > 1:
        values /= np.sqrt(np.prod(leaf.shape[:-1]))
    else:
        values = 0.2 * values + name.endswith("['scale']")
    return jnp.asarray(values, jnp.float32)


def example(variant, shape):
    b, t, h, w = shape
    rng = np.random.default_rng(0)

    def normal(*sizes):
        return jnp.asarray(rng.standard_normal(sizes), jnp.float32)

    conditioning = Conditioning(context=normal(b, 7, 24), camera=normal(b, t, 4, 4))
    if variant == "videomv_i2v":
        conditioning = dataclasses.replace(
            conditioning, image=normal(b, h, w, 4), image_embedding=normal(b, 24)
        )
    return normal(b, t, h, w, 4), jnp.arange(17, 17 + 700 * b, 700), conditioning


def build(variant, shape, camera):
    model = SpatioTemporalUNet(**VARIANTS[variant] | REDUCED | {"camera_embedding": camera})
    inputs = example(variant, shape)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return model, jax.tree_util.tree_map_with_path(draw, shapes), inputs


def peer_of(variant, params):
    """diffusers' network with the same weights, loaded strictly."""
    import diffusers
    import torch

    kind = {"videomv_t2v": "UNet3DConditionModel", "videomv_i2v": "I2VGenXLUNet"}[variant]
    network = getattr(diffusers, kind)(**PEER).eval()
    target = {"videomv_t2v": "diffusers_t2v", "videomv_i2v": "diffusers_i2v"}[variant]
    kept = {name: value for name, value in params.items() if name != "camera_embedding"}
    exported = conversion.export(kept, target)
    state = {k: torch.from_numpy(np.array(v)) for k, v in exported.items()}
    network.load_state_dict(state, strict=True)
    return network


def run_peer(network, variant, params, inputs, gradients=()):
    """The prediction of diffusers' network, and gradients of its sum of sines."""
    import torch
    from diffusers.models.resnet import ResnetBlock2D

    x, timestep, conditioning = (jax.tree.map(np.asarray, part) for part in inputs)
    b, t = x.shape[:2]
    if "camera_embedding" in params:
        mlp = jax.tree.map(np.asarray, params["camera_embedding"])
        hidden = conditioning.camera.reshape(b * t, 16) @ mlp["linear_1"]["kernel"]
        hidden = hidden + mlp["linear_1"]["bias"]
        hidden = hidden / (1 + np.exp(-hidden))
        extra = hidden @ mlp["linear_2"]["kernel"] + mlp["linear_2"]["bias"]
        extra = torch.from_numpy(extra.astype(np.float32))
        for module in network.modules():
            if isinstance(module, ResnetBlock2D):
                module.register_forward_pre_hook(lambda _, a: (a[0], a[1] + extra, *a[2:]))
    x = torch.from_numpy(x.transpose(0, 4, 1, 2, 3).copy()).requires_grad_()
    options = {"encoder_hidden_states": torch.from_numpy(conditioning.context.copy())}
    if variant == "videomv_i2v":
        image = torch.from_numpy(conditioning.image.transpose(0, 3, 1, 2).copy())
        later = [torch.full_like(image, k / (t - 1)) for k in range(1, t)]
        options |= {
            "fps": torch.full((b,), 8),
            "image_latents": torch.stack([image, *later], dim=2),
            "image_embeddings": torch.from_numpy(conditioning.image_embedding.copy()),
        }
    y = network(x, torch.from_numpy(timestep.copy()), **options).sample
    output = y.detach().numpy().transpose(0, 2, 3, 4, 1)
    if not gradients:
        return output, []
    y.sin().sum().backward()
    weights = dict(network.named_parameters())
    return output, [x.grad.numpy().transpose(0, 2, 3, 4, 1)] + [
        weights[name].grad.numpy() for name in gradients
    ]


#: Of every kind of layer one: ours, and diffusers' name and axes.
WEIGHTS = {
    "conv_in/kernel": ("conv_in.weight", (2, 3, 1, 0)),
    "time_embedding/linear_1/kernel": ("time_embedding.linear_1.weight", (1, 0)),
    "down_0/temporal_conv_0/conv_3/conv/kernel": ("down_blocks.0.temp_convs.0.conv4.3.weight", ()),
    "mid/spatial_0/block/attention_2/key/kernel": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        (1, 0),
    ),
    "up_0/temporal_1/norm/scale": ("up_blocks.1.temp_attentions.1.norm.weight", (0,)),
}


#: Variant, whether cameras are embedded, and the shape.
CASES = [
    (variant, camera, shape)
    for variant in ("videomv_t2v", "videomv_i2v")
    for camera in (False, True)
    for shape in SHAPES
]
#: Of the gradients.
SMALL = (1, 3, 8, 8)


def name_of(variant: str, camera: bool, shape: tuple[int, ...]) -> str:
    return f"{variant}/{'camera' if camera else 'plain'}/{'x'.join(map(str, shape))}"


def main() -> None:
    arrays = {}
    for variant, camera, shape in CASES:
        _, params, inputs = build(variant, shape, camera)
        output, _ = run_peer(peer_of(variant, params), variant, params, inputs)
        arrays[name_of(variant, camera, shape)] = output
        print(name_of(variant, camera, shape), f"standard deviation {output.std():.3f}")
    names = [name for name, _ in WEIGHTS.values()]
    for variant in ("videomv_t2v", "videomv_i2v"):
        _, params, inputs = build(variant, SMALL, camera=False)
        _, gradients = run_peer(peer_of(variant, params), variant, params, inputs, names)
        for name, gradient in zip(["x", *WEIGHTS], gradients, strict=True):
            arrays[f"{variant}/gradient/{name}"] = gradient
    np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
    main()
