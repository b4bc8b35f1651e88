"""Tables and engine: names, layouts, and what does not fit."""

import jax.numpy as jnp
import numpy as np
import pytest
import videomv_names
from conversion_cases import (
    CASES,
    DEEP,
    SHALLOW,
    TEXT,
    VAE,
    assert_same,
    draw,
    draw_leaves,
    leaves_of,
    unet,
    videomv_shapes,
)
from flax.traverse_util import unflatten_dict

from d4d_jax import conversion
from d4d_jax.conversion import formats, matching
from d4d_jax.conversion.rules import CONV, SAME, Layout, Rule, Table
from d4d_jax.models.autoencoder_kl import AutoencoderKL
from d4d_jax.models.clip import TextEncoder


def nest(leaves):
    return unflatten_dict(leaves, sep="/")


def convert(state, format, network, **options):
    return conversion.convert(state, format, nest(leaves_of(network)), **options)


def exported_shapes(params, format):
    return {name: array.shape for name, array in conversion.export(params, format).items()}


@pytest.mark.parametrize(
    ("format", "network", "names"),
    [
        ("videomv_t2v", unet(**SHALLOW), videomv_shapes(SHALLOW)),
        ("videomv_t2v", unet(**DEEP), videomv_shapes(DEEP)),
        ("videomv_i2v", unet("videomv_i2v", **SHALLOW), videomv_shapes(SHALLOW, image=True)),
        (
            "compvis_vae",
            AutoencoderKL(**VAE),
            videomv_names.autoencoder(**{k: v for k, v in VAE.items() if k != "groups"}),
        ),
    ],
    ids=["t2v-shallow", "t2v-deep", "i2v", "vae"],
)
def test_names_and_shapes_of_videomv(format, network, names):
    assert exported_shapes(nest(draw_leaves(network)), format) == names
    state = draw(names)
    params = convert(state, format, network)
    assert_same(conversion.export(params, format), state)


def test_names_and_shapes_at_full_size():
    """1513 tensors, none of which is allocated."""
    leaves = formats.template(formats.find_network("videomv_i2v"))
    blank = {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in leaves.items()}
    table = conversion.FORMATS["videomv_i2v"].table(blank)
    arrays, report = matching.to_foreign(blank, table, template=leaves)
    assert arrays.shapes == videomv_names.unet(image=True)
    assert (report.matched, report.parameters) == (1513, 1_422_130_664)


@pytest.mark.parametrize(("format", "network"), CASES, ids=lambda case: str(case).split("(")[0])
def test_round_trip_is_exact(format, network):
    params = nest(draw_leaves(network))
    state = conversion.export(params, format)
    assert_same(convert(state, format, network), params)


@pytest.fixture(scope="module")
def i2v():
    network = unet("videomv_i2v", **SHALLOW)
    return network, draw(videomv_shapes(SHALLOW, image=True))


def test_concatenated_image_counts_twice(i2v):
    network, state = i2v
    name = "input_blocks.0.0.weight"
    kernel = convert(state, "videomv_i2v", network)["conv_in"]["kernel"]
    kernel = kernel.transpose(3, 2, 0, 1)
    np.testing.assert_array_equal(kernel[:, :4], state[name][:, :4])
    np.testing.assert_array_equal(kernel[:, 4:], 2 * state[name][:, 4:])
    # diffusers' network adds the image once, as ours.
    theirs = conversion.export(
        {"conv_in": {"kernel": kernel.transpose(2, 3, 1, 0)}}, "diffusers_i2v"
    )
    np.testing.assert_array_equal(theirs["conv_in.weight"], kernel)


def test_text_networks_keep_the_first_convolution():
    state = draw(videomv_shapes(SHALLOW))
    kernel = convert(state, "videomv_t2v", unet(**SHALLOW))["conv_in"]["kernel"]
    np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), state["input_blocks.0.0.weight"])


def test_fused_kernels_are_query_key_value(i2v):
    network, state = i2v
    attention = convert(state, "videomv_i2v", network)["image_concat"]["temporal"]
    fused = state["local_temporal_encoder.layers.0.0.fn.to_qkv.weight"]
    for part, name in enumerate(("query", "key", "value")):
        kernel = attention["attention"][name]["kernel"]
        np.testing.assert_array_equal(kernel, fused[8 * part : 8 * part + 8].T)


def test_fused_kernels_of_open_clip():
    network = TextEncoder(**TEXT)
    params = nest(draw_leaves(network))
    state = conversion.export(params, "open_clip_text")
    attention = params["block_1"]["attention"]
    for kind in ("kernel", "bias"):
        fused = state[f"transformer.resblocks.1.attn.in_proj_{kind.replace('kernel', 'weight')}"]
        parts = [attention[name][kind].T for name in ("query", "key", "value")]
        np.testing.assert_array_equal(fused, np.concatenate(parts))


def test_axes_of_kernels(i2v):
    network, state = i2v
    params = convert(state, "videomv_i2v", network)
    residual = params["down_1"]["residual_0"]
    for layer, name in (("conv_in", "in_layers.2"), ("embedding", "emb_layers.1")):
        ours, theirs = residual[layer]["kernel"], state[f"input_blocks.3.0.{name}.weight"]
        for o, i in ((0, 1), (5, 3)):
            np.testing.assert_array_equal(ours[..., i, o], theirs[o, i])
    temporal = params["down_1"]["temporal_conv_0"]["conv_2"]["conv"]["kernel"]
    theirs = state["input_blocks.3.0.temopral_conv.conv3.3.weight"]
    assert temporal.shape[:2] == (3, 1)
    np.testing.assert_array_equal(temporal[:, 0, 4, 9], theirs[9, 4, :, 0, 0])


def test_axes_of_size_one_are_dropped_and_come_back(i2v):
    network, state = i2v
    params = convert(state, "videomv_i2v", network)
    convolution = state["input_blocks.0.1.proj_in.weight"]
    pointwise = state["input_blocks.3.0.skip_connection.weight"]
    assert convolution.shape == (32, 8, 1) and pointwise.shape == (16, 8, 1, 1)
    kernel = params["init_temporal"]["proj_in"]["kernel"]
    np.testing.assert_array_equal(kernel, convolution[..., 0].T)
    kernel = params["down_1"]["residual_0"]["shortcut"]["kernel"]
    np.testing.assert_array_equal(kernel, pointwise[..., 0, 0].T)
    state = dict(state) | {"input_blocks.0.1.proj_in.weight": convolution[..., 0]}
    with pytest.raises(conversion.ConversionError, match=r"is \(32, 8\) instead of \(32, 8, 1\)"):
        convert(state, "videomv_i2v", network)


def test_all_problems_are_reported_at_once():
    network, state = unet(**SHALLOW), draw(videomv_shapes(SHALLOW))
    state["out.2.weight"] = np.zeros((4, 8, 1, 1), np.float32)
    state["out.3.weight"] = state.pop("out.2.bias")
    del state["time_embed.0.weight"]
    with pytest.raises(conversion.ConversionError) as error:
        convert(state, "videomv_t2v", network)
    assert set(error.value.problems) == {
        "out.2.weight is (4, 8, 1, 1) instead of (4, 8, 3, 3), for conv_out/kernel (3, 3, 8, 4)",
        "out.2.bias is missing, for conv_out/bias (4)",
        "time_embed.0.weight is missing, for time_embedding/linear_1/kernel (8, 32)",
        "out.3.weight (4) is unknown",
    }
    assert str(error.value).startswith("The state dict does not fit: 4 problems:\n  ")
    everything = conversion.ConversionError("x", [str(i) for i in range(99)])
    assert str(everything).endswith("and 87 more") and len(everything.problems) == 99


def test_problems_on_the_way_back():
    params = nest(draw_leaves(unet("diffusion4d_t2v", **SHALLOW)))
    with pytest.raises(conversion.ConversionError, match=r"motion_embedding/null \(32\) has no"):
        conversion.export(params, "videomv_t2v")
    state = conversion.export(params, "videomv_t2v", drop=["motion_embedding"])
    assert len(state) == len(videomv_shapes(SHALLOW))
    leaves = draw_leaves(TextEncoder(**TEXT))
    del leaves["block_0/attention/key/kernel"]
    with pytest.raises(conversion.ConversionError, match=r"in_proj_weight consists of 3 parts"):
        conversion.export(nest(leaves), "open_clip_text")


def test_two_leaves_cannot_share_a_tensor():
    table = Table((Rule("a|b", "weight", SAME),))
    leaves = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
    with pytest.raises(conversion.ConversionError, match=r"weight consists of 1 part, .* a, b"):
        conversion.convert({"weight": np.zeros(3)}, table, leaves)


@pytest.mark.parametrize("prefix", ["module.", "state_dict.", "model._orig_mod."])
def test_prefixes_are_found(prefix):
    network, state = unet(**SHALLOW), draw(videomv_shapes(SHALLOW))
    wrapped = {f"{prefix}{name}": array for name, array in state.items()}
    wrapped |= {"optimizer.lr": np.zeros(1, np.float32)}
    leaves = leaves_of(network)
    table = conversion.FORMATS["videomv_t2v"].table(leaves)
    arrays, report = matching.to_ours(wrapped, table, leaves)
    assert (report.prefix, report.unused) == (prefix, ("optimizer.lr",))
    assert f'behind the prefix "{prefix}"' in str(report) and "optimizer.lr" in str(report)
    assert_same(nest(dict(arrays)), convert(state, "videomv_t2v", network))


def test_copies_of_a_network_are_refused():
    state = draw(videomv_shapes(SHALLOW))
    both = {f"{prefix}.{name}": array for name, array in state.items() for prefix in ("net", "ema")}
    with pytest.raises(conversion.ConversionError, match=r'once, behind "ema\.", "net\."'):
        convert(both, "videomv_t2v", unet(**SHALLOW))
    spelt = {"text_model.final_layer_norm.bias": 0, "final_layer_norm.bias": 0}
    state = conversion.export(nest(draw_leaves(TextEncoder(**TEXT))), "transformers_text")
    state |= {name: np.zeros(16, np.float32) for name in spelt}
    with pytest.raises(conversion.ConversionError, match="are two names of the same tensor"):
        convert(state, "transformers_text", TextEncoder(**TEXT))


def test_new_parameters_keep_their_initial_values():
    network, state = unet("diffusion4d_t2v", **SHALLOW), draw(videomv_shapes(SHALLOW))
    with pytest.raises(conversion.ConversionError, match=r"motion_embedding/null .* has no name"):
        convert(state, "videomv_t2v", network)
    with pytest.raises(conversion.ConversionError, match="is new and has no initial values"):
        convert(state, "videomv_t2v", network, allow_new=["motion_embedding"])
    initial = draw_leaves(network)
    params = conversion.convert(state, "videomv_t2v", nest(initial), allow_new=["motion_embedding"])
    null = params["motion_embedding"]["null"]
    np.testing.assert_array_equal(null, initial["motion_embedding/null"])
    assert not np.array_equal(params["conv_in"]["bias"], initial["conv_in/bias"])
    # Only whole names match.
    with pytest.raises(conversion.ConversionError, match="has no name"):
        conversion.convert(state, "videomv_t2v", nest(initial), allow_new=["motion"])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_precisions_become_float32(dtype):
    state = {k: v.astype(dtype) for k, v in draw(videomv_shapes(SHALLOW)).items()}
    params = convert(state, "videomv_t2v", unet(**SHALLOW))
    bias = params["conv_out"]["bias"]
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias, state["out.2.bias"].astype(np.float32))


def test_quantised_weights_are_refused():
    state = draw(videomv_shapes(SHALLOW)) | {"out.2.bias": np.zeros(4, np.int8)}
    with pytest.raises(ValueError, match=r"has out\.2\.bias as int8: quantised"):
        convert(state, "videomv_t2v", unet(**SHALLOW))


def test_older_names_of_diffusers():
    network = AutoencoderKL(**VAE)
    params = nest(draw_leaves(network))
    state = conversion.export(params, "diffusers_vae")
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in older.items():
        state = {name.replace(f".{new}.", f".{old}."): array for name, array in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in state
    assert_same(convert(state, "diffusers_vae", network), params)


@pytest.mark.parametrize("format", ["open_clip_text", "transformers_text"])
def test_the_last_block_may_be_unused_and_no_other(format):
    whole = TextEncoder(**TEXT, skip_last=0)
    params = nest(draw_leaves(whole))
    state = conversion.export(params, format) | {"logit_scale": np.zeros((), np.float32)}
    part = convert(state, format, TextEncoder(**TEXT, skip_last=1))
    del params["block_2"]
    assert_same(part, params)
    with pytest.raises(conversion.ConversionError, match="is unknown") as error:
        convert(state, format, TextEncoder(**TEXT, skip_last=2))
    assert all(".2." in problem for problem in error.value.problems)


def test_layouts_refuse_leaves_of_another_rank():
    assert CONV.foreign_shape((3, 3, 4)) is None
    assert Layout(units=1).foreign_shape((2,)) == (2, 1)
    table = Table((Rule("a", "weight", CONV),))
    with pytest.raises(conversion.ConversionError, match="cannot be made of a"):
        conversion.export({"a": np.zeros((2, 2), np.float32)}, table)
    with pytest.raises(conversion.ConversionError, match="instead of a shape of another rank"):
        conversion.convert({"weight": np.zeros((2, 2))}, table, {"a": np.zeros((2, 2))})
