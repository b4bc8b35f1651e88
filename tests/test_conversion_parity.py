"""Converted weights in diffusers and transformers: they load them, and compute what we compute.

tests/golden/make_conversion_golden.py has loaded and run them, strictly.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversion_cases import PARITY, draw_sound, inputs, leaves_of
from flax.traverse_util import unflatten_dict

from d4d_jax import conversion
from d4d_jax.models.conditioning import Conditioning

pytestmark = pytest.mark.parity

GOLDEN = pathlib.Path(__file__).parent / "golden" / "conversion.npz"


@pytest.fixture(scope="module")
def data():
    with np.load(GOLDEN) as archive:
        return dict(archive)


@functools.cache
def compiled(key):
    format, network = PARITY[key]
    arrays = inputs(format)
    if "x_t" in arrays:
        x_t, timestep = arrays.pop("x_t"), arrays.pop("timestep")
        arrays = {"x_t": x_t, "timestep": timestep, "conditioning": Conditioning(**arrays)}
    if getattr(network, "skip_last", 1) == 0:
        arrays["pooled"] = True
    return jax.jit(lambda params: network.apply({"params": params}, **arrays))


def run(key, params):
    return compiled(key)(jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("key", PARITY)
def test_peers_compute_the_same(data, key):
    output = run(key, unflatten_dict(draw_sound(PARITY[key][1]), sep="/"))
    wanted = data[f"{key}/output"]
    assert wanted.std() > 0.3
    np.testing.assert_allclose(output, wanted, rtol=0, atol=5e-5 if "vae" in key else 2e-5)


@pytest.mark.parametrize("key", PARITY)
def test_names_and_shapes_are_those_of_the_peers(data, key):
    format, network = PARITY[key]
    state = conversion.export(unflatten_dict(draw_sound(network), sep="/"), format)
    shapes = {name: list(array.shape) for name, array in state.items()}
    assert shapes == json.loads(str(data[f"{key}/shapes"]))


def test_doubling_is_seen(data):
    """VideoMV's weights without the cure: a mistake that has to be loud."""
    format, network = PARITY["i2v"]
    params = unflatten_dict(draw_sound(network), sep="/")
    state = conversion.export(params, format)
    videomv = {"conv_in": params["conv_in"], "image_concat": params["image_concat"]}
    halved = conversion.export(videomv, "videomv_i2v")["input_blocks.0.0.weight"]
    template = unflatten_dict(leaves_of(network), sep="/")
    wrong = conversion.convert(state | {"conv_in.weight": halved}, format, template)
    output = run("i2v", wrong)
    assert np.abs(output - data["i2v/output"]).max() > 0.01
