"""Names and shapes of the tensors in VideoMV's checkpoints, listed as its constructors make them.

Written from the structure of VideoMV's tools/modules/unet and tools/modules/autoencoder.py, and
compared once with the state dicts of these modules (1484, 1513 and 248 tensors): nothing here
comes from the tables that the tests check.
"""

Shapes = dict[str, tuple[int, ...]]


def linear(name, i, o, bias=True):
    return {f"{name}.weight": (o, i)} | ({f"{name}.bias": (o,)} if bias else {})


def conv(name, i, o, *size):
    return {f"{name}.weight": (o, i, *size), f"{name}.bias": (o,)}


def norm(name, c):
    return {f"{name}.weight": (c,), f"{name}.bias": (c,)}


def mlp(name, i, hidden, o):
    return linear(f"{name}.0", i, hidden) | linear(f"{name}.2", hidden, o)


def residual(name, i, o, embedding):
    shapes = norm(f"{name}.in_layers.0", i) | conv(f"{name}.in_layers.2", i, o, 3, 3)
    shapes |= linear(f"{name}.emb_layers.1", embedding, o)
    shapes |= norm(f"{name}.out_layers.0", o) | conv(f"{name}.out_layers.3", o, o, 3, 3)
    if i != o:
        shapes |= conv(f"{name}.skip_connection", i, o, 1, 1)
    for stage in range(1, 5):
        part = f"{name}.temopral_conv.conv{stage}"
        shapes |= norm(f"{part}.0", o) | conv(f"{part}.{2 if stage == 1 else 3}", o, o, 3, 1, 1)
    return shapes


def transformer(name, c, inner, context, units):
    """Spatial with a context width and no `units`; temporal with context None and one unit."""
    block = f"{name}.transformer_blocks.0"
    shapes = norm(f"{name}.norm", c) | conv(f"{name}.proj_in", c, inner, *units)
    for number, source in ((1, inner), (2, context or inner)):
        shapes |= linear(f"{block}.attn{number}.to_q", inner, inner, bias=False)
        shapes |= linear(f"{block}.attn{number}.to_k", source, inner, bias=False)
        shapes |= linear(f"{block}.attn{number}.to_v", source, inner, bias=False)
        shapes |= linear(f"{block}.attn{number}.to_out.0", inner, inner)
    shapes |= linear(f"{block}.ff.net.0.proj", inner, 8 * inner)
    shapes |= linear(f"{block}.ff.net.2", 4 * inner, inner)
    for number in (1, 2, 3):
        shapes |= norm(f"{block}.norm{number}", inner)
    return shapes | conv(f"{name}.proj_out", inner, c, *units)


def unet(
    *,
    width=320,
    multipliers=(1, 2, 4, 4),
    blocks=2,
    attention_levels=(0, 1, 2),
    init=512,
    context=1024,
    image=False,
) -> Shapes:
    """`UNetSD_T2VBase`, or `UNetSD_I2VGen` where `image` is set, both with the camera MLP."""
    embedding = 4 * width
    channels = [width * m for m in multipliers]
    shapes = mlp("time_embed", width, embedding, embedding)
    shapes |= mlp("camera_embedding", 16, embedding, embedding)
    if image:
        shapes |= mlp("fps_embedding", width, embedding, embedding)
        shapes |= mlp("context_embedding", context, embedding, 4 * context)
        shapes |= image_parts(context)

    def attend(name, c):
        return transformer(f"{name}.1", c, c, context, ()) | transformer(
            f"{name}.2", c, c, None, (1,)
        )

    shapes |= conv("input_blocks.0.0", 8 if image else 4, width, 3, 3)
    shapes |= transformer("input_blocks.0.1", width, init, None, (1,))
    number, c, skips = 1, width, [width]
    for level, o in enumerate(channels):
        for _ in range(blocks):
            shapes |= residual(f"input_blocks.{number}.0", c, o, embedding)
            if level in attention_levels:
                shapes |= attend(f"input_blocks.{number}", o)
            number, c = number + 1, o
            skips.append(c)
        if level < len(channels) - 1:
            shapes |= conv(f"input_blocks.{number}.op", c, c, 3, 3)
            number += 1
            skips.append(c)
    shapes |= residual("middle_block.0", c, c, embedding) | attend("middle_block", c)
    shapes |= residual("middle_block.3", c, c, embedding)
    number = 0
    for level, o in reversed(list(enumerate(channels))):
        for block in range(blocks + 1):
            shapes |= residual(f"output_blocks.{number}.0", c + skips.pop(), o, embedding)
            c, last = o, 1
            if level in attention_levels:
                shapes |= attend(f"output_blocks.{number}", o)
                last = 3
            if level > 0 and block == blocks:
                shapes |= conv(f"output_blocks.{number}.{last}.conv", o, o, 3, 3)
            number += 1
    return shapes | norm("out.0", width) | conv("out.2", width, 4, 3, 3)


def image_parts(context) -> Shapes:
    name = "local_temporal_encoder.layers.0"
    return {
        **conv("local_image_concat.0", 4, 16, 3, 3),
        **conv("local_image_concat.2", 16, 16, 3, 3),
        **conv("local_image_concat.4", 16, 4, 3, 3),
        **norm(f"{name}.0.norm", 4),
        **linear(f"{name}.0.fn.to_qkv", 4, 24, bias=False),
        **linear(f"{name}.0.fn.to_out.0", 8, 4),
        **linear(f"{name}.1.net.0.0", 4, 16),
        **linear(f"{name}.1.net.2", 16, 4),
        **conv("local_image_embedding.0", 4, 32, 3, 3),
        **conv("local_image_embedding.3", 32, 64, 3, 3),
        **conv("local_image_embedding.5", 64, context, 3, 3),
    }


def autoencoder(*, width=128, multipliers=(1, 2, 4, 4), blocks=2) -> Shapes:
    """CompVis' `AutoencoderKL` with 4 latent channels."""
    channels = [width * m for m in multipliers]
    shapes = {**conv("quant_conv", 8, 8, 1, 1), **conv("post_quant_conv", 4, 4, 1, 1)}

    def block(name, i, o):
        parts = norm(f"{name}.norm1", i) | conv(f"{name}.conv1", i, o, 3, 3)
        parts |= norm(f"{name}.norm2", o) | conv(f"{name}.conv2", o, o, 3, 3)
        return parts | (conv(f"{name}.nin_shortcut", i, o, 1, 1) if i != o else {})

    for side, first, last in (("encoder", 3, 8), ("decoder", 4, 3)):
        top, end = (channels[0], channels[-1]) if side == "encoder" else (channels[-1], channels[0])
        shapes |= conv(f"{side}.conv_in", first, top, 3, 3)
        shapes |= norm(f"{side}.norm_out", end) | conv(f"{side}.conv_out", end, last, 3, 3)
        middle = channels[-1]
        for number in (1, 2):
            shapes |= block(f"{side}.mid.block_{number}", middle, middle)
        shapes |= norm(f"{side}.mid.attn_1.norm", middle)
        for name in ("q", "k", "v", "proj_out"):
            shapes |= conv(f"{side}.mid.attn_1.{name}", middle, middle, 1, 1)
        levels = list(enumerate(channels))
        c = top
        for level, o in levels if side == "encoder" else reversed(levels):
            name = f"{side}.{'down' if side == 'encoder' else 'up'}.{level}"
            for number in range(blocks + (side == "decoder")):
                shapes |= block(f"{name}.block.{number}", c, o)
                c = o
            if side == "encoder" and level < len(channels) - 1:
                shapes |= conv(f"{name}.downsample.conv", o, o, 3, 3)
            if side == "decoder" and level > 0:
                shapes |= conv(f"{name}.upsample.conv", o, o, 3, 3)
    return shapes
