"""The formats by name: tables, the networks that they belong to, and their configuration files."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from d4d_jax.conversion import autoencoder_kl, clip, unet
from d4d_jax.conversion.matching import flatten
from d4d_jax.conversion.rules import SAME, Rule, Table
from d4d_jax.models import autoencoder_kl as autoencoder_networks
from d4d_jax.models import clip as clip_networks
from d4d_jax.models import unet as unet_networks
from d4d_jax.models import variants
from d4d_jax.models.conditioning import Conditioning


@dataclasses.dataclass(frozen=True)
class Network:
    """One of the networks that weights can be converted for.

    Attributes:
        variants: its named sets of fields.
        build: makes the module of such fields.
        inputs: small arguments of a module's `init`.
    """

    variants: dict[str, dict[str, Any]]
    build: type[nn.Module]
    inputs: Callable[[Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Format:
    """How weights of a network are kept elsewhere.

    Attributes:
        table: makes the table from the paths of our leaves.
        network: name in `NETWORKS`, or "" for any.
        variant: the variant that the published weights fit, or "".
        fields: fields of that variant which these weights need otherwise.
        subfolder: where a pipeline's folder keeps this network.
        filename: of the weights in a folder that `from_pretrained` reads.
        config: makes the configuration file of such a folder from the module.
    """

    table: Callable[[Iterable[str]], Table]
    network: str = ""
    variant: str = ""
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    subfolder: str = ""
    filename: str = ""
    config: Callable[[Any], dict[str, Any]] | None = None


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in FORMATS:
        raise ValueError(f"There is no format {name!r}; known: {', '.join(FORMATS)}.")
    return FORMATS[name]


def find_network(name: str, variant: str | None = None) -> nn.Module | None:
    """The network of a format: that of the published weights, or another variant.

    None for the format that may hold any network.

    Raises:
        ValueError: an unknown format or variant.
    """
    kind = find_format(name)
    if not kind.network:
        return None
    network = NETWORKS[kind.network]
    variant = variant or kind.variant
    if variant not in network.variants:
        known = ", ".join(sorted(network.variants))
        raise ValueError(f"{kind.network} has no variant {variant!r}; known: {known}.")
    return network.build(**network.variants[variant] | kind.fields)


def template(module: nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a module's parameters by path; nothing is allocated.

    Raises:
        ValueError: the module is of a class that is not in `NETWORKS`.
    """
    inputs = _inputs(module)
    return flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs))["params"])


def initial_leaves(module: nn.Module, paths: Sequence[str], seed: int = 0) -> dict[str, jax.Array]:
    """The initial values of some parameters; no others are computed."""
    inputs = _inputs(module)

    @jax.jit
    def initialise(key: jax.Array) -> dict[str, jax.Array]:
        leaves = flatten(module.init(key, **inputs)["params"])
        return {path: leaves[path] for path in paths}

    return initialise(jax.random.key(seed)) if paths else {}


def _inputs(module: nn.Module) -> dict[str, Any]:
    for network in NETWORKS.values():
        if isinstance(module, network.build):
            return network.inputs(module)
    raise ValueError(f"Weights are not converted for {type(module).__name__}.")


def _unet_inputs(module: unet_networks.SpatioTemporalUNet) -> dict[str, Any]:
    frames = 2
    side, channels = 2 ** len(module.multipliers), module.in_channels
    conditions: dict[str, Any] = {
        "camera": jnp.zeros((1, frames, 4, 4)),
        "image": jnp.zeros((1, side, side, channels)),
    }
    if module.context_dim:
        conditions["context"] = jnp.zeros((1, 1, module.context_dim))
    if module.image_embedding:
        conditions["image_embedding"] = jnp.zeros((1, module.context_dim))
    if module.static_channels:
        conditions["static"] = jnp.zeros((1, frames, side, side, module.static_channels))
    return {
        "x_t": jnp.zeros((1, frames, side, side, channels)),
        "timestep": jnp.zeros((1,), jnp.int32),
        "conditioning": Conditioning(**conditions),
    }


def _autoencoder_inputs(module: autoencoder_networks.AutoencoderKL) -> dict[str, Any]:
    return {"images": jnp.zeros((1, module.factor, module.factor, module.image_channels))}


def _text_inputs(module: clip_networks.TextEncoder) -> dict[str, Any]:
    return {"tokens": jnp.zeros((1, 1), jnp.int32), "pooled": module.projection is not None}


def _image_inputs(module: clip_networks.ImageEncoder) -> dict[str, Any]:
    return {"images": jnp.zeros((1, module.size, module.size, 3))}


def _unet_config(module: unet_networks.SpatioTemporalUNet) -> dict[str, Any]:
    if (module.init_heads, module.init_head_dim) != (8, module.head_dim):
        raise ValueError(
            "The first temporal transformer of diffusers' networks has 8 heads of"
            f" {module.head_dim} channels, and not {module.init_heads} of {module.init_head_dim}."
        )
    attends = [level in module.attention_levels for level in range(len(module.multipliers))]
    kind = {True: "CrossAttn", False: ""}
    return {
        "_class_name": "UNet3DConditionModel" if module.image_concat == "none" else "I2VGenXLUNet",
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "down_block_types": [f"{kind[attend]}DownBlock3D" for attend in attends],
        "up_block_types": [f"{kind[attend]}UpBlock3D" for attend in reversed(attends)],
        "block_out_channels": [module.width * m for m in module.multipliers],
        "layers_per_block": module.blocks,
        "norm_num_groups": module.groups,
        "cross_attention_dim": module.context_dim,
        "attention_head_dim": module.head_dim,
    }


def _autoencoder_config(module: autoencoder_networks.AutoencoderKL) -> dict[str, Any]:
    levels = len(module.multipliers)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": module.image_channels,
        "out_channels": module.image_channels,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [module.width * m for m in module.multipliers],
        "layers_per_block": module.blocks,
        "latent_channels": module.latent_channels,
        "norm_num_groups": module.groups,
        "scaling_factor": module.scale,
    }


def _tower_config(module: Any, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": module.width,
        "intermediate_size": module.mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": module.heads,
        "hidden_act": module.activation,
        "layer_norm_eps": 1e-5,
    }


def _text_config(module: clip_networks.TextEncoder) -> dict[str, Any]:
    with_projection = module.projection is not None
    return _tower_config(module, module.layers - module.skip_last) | {
        "architectures": ["CLIPTextModelWithProjection" if with_projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": module.vocabulary,
        "max_position_embeddings": module.positions,
        "bos_token_id": module.vocabulary - 2,
        "eos_token_id": module.vocabulary - 1,
        "projection_dim": module.projection or module.width,
    }


def _image_config(module: clip_networks.ImageEncoder) -> dict[str, Any]:
    return _tower_config(module, module.layers) | {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "image_size": module.size,
        "patch_size": module.patch,
        "projection_dim": module.projection,
    }


NETWORKS: dict[str, Network] = {
    "unet": Network(variants.VARIANTS, unet_networks.SpatioTemporalUNet, _unet_inputs),
    "autoencoder_kl": Network(
        autoencoder_networks.VARIANTS, autoencoder_networks.AutoencoderKL, _autoencoder_inputs
    ),
    "clip_text": Network(
        {name: towers["text"] for name, towers in clip_networks.VARIANTS.items()},
        clip_networks.TextEncoder,
        _text_inputs,
    ),
    "clip_image": Network(
        {name: towers["image"] for name, towers in clip_networks.VARIANTS.items()},
        clip_networks.ImageEncoder,
        _image_inputs,
    ),
}

#: The format of this library, for any network.
OWN = "d4d"
_DIFFUSERS = "diffusion_pytorch_model.safetensors"
_TRANSFORMERS = "model.safetensors"

FORMATS: dict[str, Format] = {
    OWN: Format(lambda paths: Table((Rule(".+", r"\g<0>", SAME),))),
    "videomv_t2v": Format(unet.videomv, "unet", "videomv_t2v"),
    "videomv_i2v": Format(unet.videomv, "unet", "videomv_i2v"),
    "diffusers_t2v": Format(
        unet.diffusers,
        "unet",
        "videomv_t2v",
        fields={"camera_embedding": False},
        subfolder="unet",
        filename=_DIFFUSERS,
        config=_unet_config,
    ),
    "diffusers_i2v": Format(
        unet.diffusers,
        "unet",
        "videomv_i2v",
        fields={"camera_embedding": False},
        subfolder="unet",
        filename=_DIFFUSERS,
        config=_unet_config,
    ),
    "compvis_vae": Format(autoencoder_kl.compvis, "autoencoder_kl", "sd"),
    "diffusers_vae": Format(
        autoencoder_kl.diffusers,
        "autoencoder_kl",
        "sd",
        subfolder="vae",
        filename=_DIFFUSERS,
        config=_autoencoder_config,
    ),
    "open_clip_text": Format(clip.open_clip_text, "clip_text", "vit_h_14"),
    "open_clip_image": Format(clip.open_clip_image, "clip_image", "vit_h_14"),
    "transformers_text": Format(
        clip.transformers_text,
        "clip_text",
        "vit_h_14",
        subfolder="text_encoder",
        filename=_TRANSFORMERS,
        config=_text_config,
    ),
    "transformers_image": Format(
        clip.transformers_image,
        "clip_image",
        "vit_h_14",
        subfolder="image_encoder",
        filename=_TRANSFORMERS,
        config=_image_config,
    ),
}
