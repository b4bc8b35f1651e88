"""Names of the spatio-temporal UNet in VideoMV's files and in diffusers.

VideoMV's names are those of ModelScope's text-to-video UNet and of I2VGen-XL, whose files differ
from VideoMV's by the camera MLP alone. Sources: VideoMV's tools/modules/unet, and diffusers 0.42
(`UNet3DConditionModel`, `I2VGenXLUNet`).
"""

import re
from collections.abc import Callable, Iterable

from d4d_jax.conversion.rules import (
    CONV,
    CONVOLUTION,
    DENSE,
    FRAME_CONV,
    LINEAR_1,
    LINEAR_2,
    NORM,
    Layout,
    Rule,
    Rules,
    Table,
    fused,
    layer,
)

_ATTENTION = (
    Rule("query", "to_q", DENSE),
    Rule("key", "to_k", DENSE),
    Rule("value", "to_v", DENSE),
    Rule("out", "to_out.0", DENSE),
)
_BLOCK = (
    Rule(r"norm_(\d)", r"norm\1", NORM),
    Rule(r"attention_(\d)", r"attn\1", _ATTENTION),
    Rule("feed_forward/gated", "ff.net.0.proj", DENSE),
    Rule("feed_forward/out", "ff.net.2", DENSE),
)
_TEMPORAL_CONV = (
    Rule(r"norm_(\d)", lambda stage: f"conv{stage + 1}.0", NORM),
    Rule("conv_0/conv", "conv1.2", layer(FRAME_CONV)),
    Rule(r"conv_(\d)/conv", lambda stage: f"conv{stage + 1}.3", layer(FRAME_CONV)),
)
_IMAGE_CONCAT = tuple(Rule(f"conv_{i}", f"{2 * i}", CONVOLUTION) for i in range(3))
_IMAGE_TOKENS = tuple(
    Rule(f"conv_{i}", name, CONVOLUTION) for i, name in ((1, "0"), (2, "3"), (3, "5"))
)
_MLP = Rule("linear_1", "0", DENSE), Rule("linear_2", "2", DENSE)
_NAMED_MLP = (Rule(r"linear_(\d)", r"linear_\1", DENSE),)


def _transformer(projection: Rules) -> Rules:
    return (
        Rule("norm", "norm", NORM),
        Rule(r"proj_(in|out)", r"proj_\1", projection),
        Rule("block", "transformer_blocks.0", _BLOCK),
    )


def _residual(norm: str, conv: str, norm_2: str, conv_2: str, embedding: str, skip: str) -> Rules:
    return (
        Rule("norm_in", norm, NORM),
        Rule("conv_in", conv, CONVOLUTION),
        Rule("norm_out", norm_2, NORM),
        Rule("conv_out", conv_2, CONVOLUTION),
        Rule("embedding", embedding, DENSE),
        Rule("shortcut", skip, layer(LINEAR_2)),
    )


_VIDEOMV_RESIDUAL = _residual(
    *("in_layers.0", "in_layers.2", "out_layers.0", "out_layers.3"),
    embedding="emb_layers.1",
    skip="skip_connection",
)
_LINEAR_TRANSFORMER = _transformer(DENSE)
_CONV_TRANSFORMER = _transformer(layer(LINEAR_1))
_VIDEOMV_CONDITIONS = (
    Rule("time_embedding", "time_embed", _MLP),
    Rule("(camera|fps)_embedding", r"\1_embedding", _MLP),
    Rule("image_embedding", "context_embedding", _MLP),
    Rule("image_tokens", "local_image_embedding", _IMAGE_TOKENS),
    Rule("image_concat", "local_image_concat", _IMAGE_CONCAT),
    Rule(
        "image_concat/temporal",
        "local_temporal_encoder.layers.0",
        (
            Rule("norm", "0.norm", NORM),
            Rule("attention", "0.fn", (*fused("to_qkv.weight"), Rule("out", "to_out.0", DENSE))),
            Rule("feed_forward/linear_1", "1.net.0.0", DENSE),
            Rule("feed_forward/linear_2", "1.net.2", DENSE),
        ),
    ),
)


def videomv(paths: Iterable[str]) -> Table:
    """The table of VideoMV's `UNetSD_T2VBase` and `UNetSD_I2VGen`.

    Args:
        paths: of our leaves. The numbers of VideoMV's blocks depend on how many levels and blocks
            there are, and on the levels that have attention.
    """
    paths = tuple(paths)
    levels = _count(paths, r"down_(\d+)/")
    blocks = _count(paths, r"down_0/residual_(\d+)/")
    attending = {int(m[1]) for path in paths if (m := re.match(r"up_(\d+)/spatial_0/", path))}

    def down(i: int, j: int) -> str:
        return f"input_blocks.{1 + i * (blocks + 1) + j}"

    def up(i: int, j: int) -> str:
        return f"output_blocks.{(levels - 1 - i) * (blocks + 1) + j}"

    def upsample(i: int) -> str:
        return f"{up(i, blocks)}.{3 if i in attending else 1}.conv"

    def middle(place: str) -> Callable[[int], str]:
        return lambda j: f"middle_block.{3 * j}{place}"

    # VideoMV adds the image to the input of the first convolution twice, and its weights expect
    # that. Here, as in diffusers, it is there once, and those input channels count twice.
    doubled = Layout(axes=CONV.axes, doubled=(4, 8))
    has_image = any(path.startswith("image_concat/") for path in paths)
    return Table(
        rules=(
            Rule("conv_in", "input_blocks.0.0", layer(doubled if has_image else CONV)),
            Rule("init_temporal", "input_blocks.0.1", _CONV_TRANSFORMER),
            *_videomv_level(r"down_(\d+)", down),
            Rule(r"down_(\d+)/down/conv", lambda i: f"{down(i, blocks)}.op", CONVOLUTION),
            Rule(r"mid/residual_(\d)", middle(""), _VIDEOMV_RESIDUAL),
            Rule(r"mid/temporal_conv_(\d)", middle(".temopral_conv"), _TEMPORAL_CONV),
            Rule("mid/spatial_0", "middle_block.1", _LINEAR_TRANSFORMER),
            Rule("mid/temporal_0", "middle_block.2", _CONV_TRANSFORMER),
            *_videomv_level(r"up_(\d+)", up),
            Rule(r"up_(\d+)/up/conv", upsample, CONVOLUTION),
            Rule("norm_out", "out.0", NORM),
            Rule("conv_out", "out.2", CONVOLUTION),
            *_VIDEOMV_CONDITIONS,
        )
    )


def _videomv_level(ours: str, name: Callable[[int, int], str]) -> Rules:
    """Rules of the blocks of a level; `name` numbers them."""

    def inside(place: str) -> Callable[[int, int], str]:
        return lambda i, j: f"{name(i, j)}.{place}"

    return (
        Rule(rf"{ours}/residual_(\d+)", inside("0"), _VIDEOMV_RESIDUAL),
        Rule(rf"{ours}/temporal_conv_(\d+)", inside("0.temopral_conv"), _TEMPORAL_CONV),  # sic
        Rule(rf"{ours}/spatial_(\d+)", inside("1"), _LINEAR_TRANSFORMER),
        Rule(rf"{ours}/temporal_(\d+)", inside("2"), _CONV_TRANSFORMER),
    )


def diffusers(paths: Iterable[str]) -> Table:
    """The table of diffusers' `UNet3DConditionModel` and `I2VGenXLUNet`, which know no cameras.

    Nothing is doubled: the networks compute the same. The weights of I2VGen-XL that are published
    for diffusers were copied without doubling, and are taken as diffusers runs them.

    Args:
        paths: of our leaves; diffusers counts the levels of the way up from the other end.
    """
    levels = _count(tuple(paths), r"down_(\d+)/")
    residual = _residual(
        *("norm1", "conv1", "norm2", "conv2"), embedding="time_emb_proj", skip="conv_shortcut"
    )
    level = (
        Rule(r"residual_(\d+)", r"resnets.\1", residual),
        Rule(r"temporal_conv_(\d+)", r"temp_convs.\1", _TEMPORAL_CONV),
        Rule(r"spatial_(\d+)", r"attentions.\1", _LINEAR_TRANSFORMER),
        Rule(r"temporal_(\d+)", r"temp_attentions.\1", _LINEAR_TRANSFORMER),
        Rule("(down|up)/conv", r"\1samplers.0.conv", CONVOLUTION),
    )
    return Table(
        rules=(
            Rule("conv_in", "conv_in", CONVOLUTION),
            Rule("init_temporal", "transformer_in", _LINEAR_TRANSFORMER),
            Rule(r"down_(\d+)", r"down_blocks.\1", level),
            Rule("mid", "mid_block", level),
            Rule(r"up_(\d+)", lambda i: f"up_blocks.{levels - 1 - i}", level),
            Rule("norm_out", "conv_norm_out", NORM),
            Rule("conv_out", "conv_out", CONVOLUTION),
            Rule("time_embedding", "time_embedding", _NAMED_MLP),
            Rule("fps_embedding", "fps_embedding", _MLP),
            Rule("image_embedding", "context_embedding", _MLP),
            Rule("image_tokens", "image_latents_context_embedding", _IMAGE_TOKENS),
            Rule("image_concat", "image_latents_proj_in", _IMAGE_CONCAT),
            Rule(
                "image_concat/temporal",
                "image_latents_temporal_encoder",
                (
                    Rule("norm", "norm1", NORM),
                    Rule("attention", "attn1", _ATTENTION),
                    Rule("feed_forward/linear_1", "ff.net.0.proj", DENSE),
                    Rule("feed_forward/linear_2", "ff.net.2", DENSE),
                ),
            ),
        )
    )


def _count(paths: tuple[str, ...], pattern: str) -> int:
    """One more than the highest number that the pattern finds at the beginning of a path."""
    return 1 + max((int(m[1]) for path in paths if (m := re.match(pattern, path))), default=-1)
