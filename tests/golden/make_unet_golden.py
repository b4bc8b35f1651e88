"""Makes unet.npz: outputs of diffusers' UNet3DConditionModel with random weights.

    pip install torch diffusers
    python tests/golden/make_unet_golden.py

Every tensor is drawn from a generator seeded by its name, so the file holds inputs and outputs
only and the test draws the same weights. Nothing is left at its zero initialisation. Cameras and
motion, which diffusers' network does not know, are added to the time embedding of every residual
block by a hook.
"""

import pathlib
import re
import zlib

import numpy as np

FIELDS = {
    "width": 32,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_levels": (0,),
    "head_dim": 16,
    "init_heads": 8,
    "init_head_dim": 16,
    "context_dim": 24,
    "groups": 8,
}

_LEVELS = len(FIELDS["multipliers"])

_RENAMES = (
    (r"^norm_out\.", "conv_norm_out."),
    (r"^init_temporal\.", "transformer_in."),
    (r"^down_(\d+)\.", r"down_blocks.\1."),
    (r"^up_(\d+)\.", lambda m: f"up_blocks.{_LEVELS - 1 - int(m[1])}."),
    (r"^mid\.", "mid_block."),
    (r"\.(down|up)\.conv\.", r".\1samplers.0.conv."),
    (r"\.temporal_conv_(\d+)\.norm_(\d)\.", lambda m: f".temp_convs.{m[1]}.conv{int(m[2]) + 1}.0."),
    (r"\.temporal_conv_(\d+)\.conv_0\.conv\.", r".temp_convs.\1.conv1.2."),
    (
        r"\.temporal_conv_(\d+)\.conv_(\d)\.conv\.",
        lambda m: f".temp_convs.{m[1]}.conv{int(m[2]) + 1}.3.",
    ),
    (r"(\.residual_\d+\.\w+)_in\.", r"\g<1>1."),
    (r"(\.residual_\d+\.\w+)_out\.", r"\g<1>2."),
    (r"(\.residual_\d+)\.embedding\.", r"\1.time_emb_proj."),
    (r"(\.residual_\d+)\.shortcut\.", r"\1.conv_shortcut."),
    (r"\.residual_(\d+)\.", r".resnets.\1."),
    (r"\.spatial_(\d+)\.", r".attentions.\1."),
    (r"\.temporal_(\d+)\.", r".temp_attentions.\1."),
    (r"\.block\.", ".transformer_blocks.0."),
    (r"\.norm_(\d)\.", r".norm\1."),
    (r"\.attention_(\d)\.", r".attn\1."),
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"(\.attn\d)\.out\.", r"\1.to_out.0."),
    (r"\.feed_forward\.gated\.", ".ff.net.0.proj."),
    (r"\.feed_forward\.out\.", ".ff.net.2."),
    (r"\.(kernel|scale)$", ".weight"),
)


def torch_name(path: str) -> str:
    """Name in diffusers of the parameter at `path`, for example "mid/spatial_0/norm/scale"."""
    name = path.replace("/", ".")
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random tensor of a torch name and shape, scaled to keep activations of order one."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        values /= np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        values = 1.0 + 0.2 * values
    else:
        values *= 0.2
    return values.astype(np.float32)


def draw_parameter(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same tensor in the layout of the JAX network's parameter at `path`."""
    name = torch_name(path)
    if len(shape) == 1:
        return draw(name, shape)
    if ".temp_convs." in name:  # (3, 1, i, o) <- (o, i, 3, 1, 1)
        return draw(name, (shape[3], shape[2], 3, 1, 1))[..., 0].transpose(2, 3, 1, 0)
    if len(shape) == 4:  # (h, w, i, o) <- (o, i, h, w)
        return draw(name, (shape[3], shape[2], *shape[:2])).transpose(2, 3, 1, 0)
    trailing = (1, 1) if "conv_shortcut" in name else ()
    return draw(name, (shape[1], shape[0], *trailing)).reshape(shape[::-1]).T


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((2, 3, 8, 8, 4)).astype(np.float32),
        "timestep": np.array([17, 803], np.int32),
        "context": rng.standard_normal((2, 5, 24)).astype(np.float32),
        "camera": rng.standard_normal((2, 3, 4, 4)).astype(np.float32),
        "motion": np.array([6.0, 2.0], np.float32),
        "drop_motion": np.array([False, True]),
    }


def main() -> None:
    import torch
    from diffusers import UNet3DConditionModel
    from diffusers.models.resnet import ResnetBlock2D

    model = UNet3DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        layers_per_block=FIELDS["blocks"],
        cross_attention_dim=FIELDS["context_dim"],
        attention_head_dim=FIELDS["head_dim"],  # the width of a head, whatever it is called inside
        norm_num_groups=FIELDS["groups"],
    ).eval()
    state = {k: torch.from_numpy(draw(k, tuple(v.shape))) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    data = inputs()

    def mlp(name: str, x: np.ndarray) -> "torch.Tensor":
        y = torch.from_numpy(x)
        for layer, inner in (("linear_1", x.shape[-1]), ("linear_2", 128)):
            weight = torch.from_numpy(draw(f"{name}.{layer}.weight", (128, inner)))
            bias = torch.from_numpy(draw(f"{name}.{layer}.bias", (128,)))
            y = torch.nn.functional.linear(
                y if layer == "linear_1" else y.sigmoid() * y, weight, bias
            )
        return y

    motion = mlp("motion_embedding.mlp", data["motion"][:, None] * 0.1)
    motion[1] = torch.from_numpy(draw("motion_embedding.null", (128,)))
    extra = mlp("camera_embedding", data["camera"].reshape(2, 3, 16)) + motion[:, None]

    def add_embedding(module, args):
        return args[0], args[1] + extra.reshape(6, 128), *args[2:]

    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.register_forward_pre_hook(add_embedding)
    with torch.no_grad():
        x = torch.from_numpy(data["x"].transpose(0, 4, 1, 2, 3).copy())
        context = torch.from_numpy(data["context"])
        y = model(x, torch.from_numpy(data["timestep"]), context).sample
    output = y.numpy().transpose(0, 2, 3, 4, 1)
    np.savez_compressed(pathlib.Path(__file__).with_name("unet.npz"), **data, output=output)
    print(f"output {output.shape}, standard deviation {output.std():.3f}")


if __name__ == "__main__":
    main()
