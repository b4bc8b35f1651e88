"""Names of CLIP's two towers in open_clip and in transformers.

Files often hold both towers, so that each table knows the other's names as unused. The text tower
of a diffusion model may lack the last block (`TextEncoder.skip_last`): that block, and nothing
else, is unused then.
"""

import re
from collections.abc import Iterable

from d4d_jax.conversion.rules import CONV, DENSE, LINEAR, NORM, SAME, Rule, Table, fused

_OPEN_CLIP_BLOCK = (
    Rule(r"norm_(\d)", r"ln_\1", NORM),
    Rule("attention", "attn", fused("in_proj_weight", "in_proj_bias")),
    Rule("attention/out", "attn.out_proj", DENSE),
    Rule("mlp/linear_1", "mlp.c_fc", DENSE),
    Rule("mlp/linear_2", "mlp.c_proj", DENSE),
)
_TRANSFORMERS_BLOCK = (
    Rule(r"norm_(\d)", r"layer_norm\1", NORM),
    Rule("attention/query", "self_attn.q_proj", DENSE),
    Rule("attention/key", "self_attn.k_proj", DENSE),
    Rule("attention/value", "self_attn.v_proj", DENSE),
    Rule("attention/out", "self_attn.out_proj", DENSE),
    Rule(r"mlp/linear_(\d)", r"mlp.fc\1", DENSE),
)


def open_clip_text(paths: Iterable[str]) -> Table:
    """The table of the text tower of open_clip's `CLIP`; `paths` are those of our leaves."""
    return Table(
        rules=(
            Rule("token_embedding/embedding", "token_embedding.weight", SAME),
            Rule("position_embedding", "positional_embedding", SAME),
            Rule(r"block_(\d+)", r"transformer.resblocks.\1", _OPEN_CLIP_BLOCK),
            Rule("norm_final", "ln_final", NORM),
            Rule("projection/kernel", "text_projection", SAME),  # not of a Linear
        ),
        unused=(
            rf"transformer\.resblocks\.{_blocks(paths)}\..*",
            "text_projection",
            "logit_scale",
            "logit_bias",
            "attn_mask",
            r"visual\..*",
        ),
    )


def open_clip_image(paths: Iterable[str]) -> Table:
    """The table of the image tower of open_clip's `CLIP`; `paths` are those of our leaves."""
    del paths
    tower = (
        Rule("patch_embedding/kernel", "conv1.weight", CONV),
        Rule("class_embedding", "class_embedding", SAME),
        Rule("position_embedding", "positional_embedding", SAME),
        Rule("norm_(pre|post)", r"ln_\1", NORM),
        Rule(r"block_(\d+)", r"transformer.resblocks.\1", _OPEN_CLIP_BLOCK),
        Rule("projection/kernel", "proj", SAME),  # not of a Linear
    )
    text = r"(token_embedding|transformer|ln_final)\..*"
    return Table(
        rules=(Rule("", "visual", tower),),
        unused=(text, "positional_embedding", "text_projection", "logit_(scale|bias)", "attn_mask"),
    )


def transformers_text(paths: Iterable[str]) -> Table:
    """The table of transformers' `CLIPTextModel`; `paths` are those of our leaves."""
    tower = (
        Rule("token_embedding/embedding", "embeddings.token_embedding.weight", SAME),
        Rule("position_embedding", "embeddings.position_embedding.weight", SAME),
        Rule(r"block_(\d+)", r"encoder.layers.\1", _TRANSFORMERS_BLOCK),
        Rule("norm_final", "final_layer_norm", NORM),
    )
    return Table(
        rules=(
            Rule("projection/kernel", "text_projection.weight", LINEAR),
            Rule("", "text_model", tower),
        ),
        unused=(
            rf"text_model\.encoder\.layers\.{_blocks(paths)}\..*",
            r"text_model\.embeddings\.position_ids",
            r"text_projection\.weight",
            r"(vision_model|visual_projection)\..*",
            "logit_scale",
        ),
        # Version 5 of transformers leaves the prefix of a text model without projection out.
        spellings=((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),),
    )


def transformers_image(paths: Iterable[str]) -> Table:
    """The table of transformers' `CLIPVisionModelWithProjection`; `paths` are ours."""
    del paths
    tower = (
        Rule("patch_embedding/kernel", "embeddings.patch_embedding.weight", CONV),
        Rule("class_embedding", "embeddings.class_embedding", SAME),
        Rule("position_embedding", "embeddings.position_embedding.weight", SAME),
        Rule("norm_pre", "pre_layrnorm", NORM),  # sic
        Rule("norm_post", "post_layernorm", NORM),
        Rule(r"block_(\d+)", r"encoder.layers.\1", _TRANSFORMERS_BLOCK),
    )
    return Table(
        rules=(
            Rule("projection/kernel", "visual_projection.weight", LINEAR),
            Rule("", "vision_model", tower),
        ),
        unused=(
            r"vision_model\.embeddings\.position_ids",
            r"(text_model|text_projection)\..*",
            "logit_scale",
        ),
    )


def _blocks(paths: Iterable[str]) -> int:
    return 1 + max(
        (int(m[1]) for path in paths if (m := re.match(r"block_(\d+)/", path))), default=-1
    )
