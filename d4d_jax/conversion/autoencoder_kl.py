"""Names of Stable Diffusion's autoencoder in CompVis' files, which VideoMV reads, and in diffusers.

Sources: CompVis' ldm/modules/diffusionmodules/model.py and diffusers 0.42 (`AutoencoderKL`).
"""

import re
from collections.abc import Iterable

from d4d_jax.conversion.rules import (
    CONVOLUTION,
    DENSE,
    LINEAR_2,
    NORM,
    Rule,
    Rules,
    Table,
    layer,
)

_POINTWISE = layer(LINEAR_2)


def _residual(shortcut: str) -> Rules:
    return (
        Rule("norm_in", "norm1", NORM),
        Rule("conv_in", "conv1", CONVOLUTION),
        Rule("norm_out", "norm2", NORM),
        Rule("conv_out", "conv2", CONVOLUTION),
        Rule("shortcut", shortcut, _POINTWISE),
    )


def _table(levels: Rules, middle: Rules, norm_out: str, unused: tuple, spellings: tuple) -> Table:
    network = (
        Rule("conv_in", "conv_in", CONVOLUTION),
        *levels,
        *middle,
        Rule("norm_out", norm_out, NORM),
        Rule("conv_out", "conv_out", CONVOLUTION),
    )
    return Table(
        rules=(
            Rule("(encoder|decoder)", r"\1", network),
            Rule("quant", "quant_conv", _POINTWISE),
            Rule("post_quant", "post_quant_conv", _POINTWISE),
        ),
        unused=unused,
        spellings=spellings,
    )


def compvis(paths: Iterable[str]) -> Table:
    """The table of CompVis' `AutoencoderKL`; `paths` are those of our leaves."""
    del paths  # CompVis counts levels and blocks as we do.
    residual = _residual("nin_shortcut")
    level = (
        Rule(r"residual_(\d+)", r"block.\1", residual),
        Rule("(down|up)/conv", r"\1sample.conv", CONVOLUTION),
    )
    attention = (
        Rule("norm", "norm", NORM),
        Rule("query", "q", _POINTWISE),
        Rule("key", "k", _POINTWISE),
        Rule("value", "v", _POINTWISE),
        Rule("out", "proj_out", _POINTWISE),
    )
    return _table(
        levels=(Rule(r"(down|up)_(\d+)", r"\1.\2", level),),
        middle=(
            Rule(r"mid/residual_(\d)", lambda j: f"mid.block_{j + 1}", residual),
            Rule("mid/attention", "mid.attn_1", attention),
        ),
        norm_out="norm_out",
        unused=(r"loss\..*",),  # the discriminator of its training
        spellings=(),
    )


def diffusers(paths: Iterable[str]) -> Table:
    """The table of diffusers' `AutoencoderKL`.

    Args:
        paths: of our leaves; diffusers counts the levels of the decoder from the other end.
    """
    numbers = [int(m[1]) for path in paths if (m := re.match(r"decoder/up_(\d+)/", path))]
    last = max(numbers, default=0)
    level = (
        Rule(r"residual_(\d+)", r"resnets.\1", _residual("conv_shortcut")),
        Rule("(down|up)/conv", r"\1samplers.0.conv", CONVOLUTION),
    )
    attention = (
        Rule("norm", "group_norm", NORM),
        Rule("query", "to_q", DENSE),
        Rule("key", "to_k", DENSE),
        Rule("value", "to_v", DENSE),
        Rule("out", "to_out.0", DENSE),
    )
    place = r"(mid_block\.attentions\.0\.)"
    return _table(
        levels=(
            Rule(r"down_(\d+)", r"down_blocks.\1", level),
            Rule(r"up_(\d+)", lambda i: f"up_blocks.{last - i}", level),
        ),
        middle=(
            Rule("mid/attention", "mid_block.attentions.0", attention),
            Rule("mid", "mid_block", level),
        ),
        norm_out="conv_norm_out",
        unused=(),
        spellings=(  # of files older than diffusers 0.18, as that of Stable Diffusion 2.1
            (rf"{place}query\.", r"\1to_q."),
            (rf"{place}key\.", r"\1to_k."),
            (rf"{place}value\.", r"\1to_v."),
            (rf"{place}proj_attn\.", r"\1to_out.0."),
        ),
    )
