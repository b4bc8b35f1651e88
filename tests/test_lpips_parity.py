"""LPIPS against the PyPI packages `lpips` and `stlpips_pytorch`, and files that torch has written.

The weights are drawn anew from their names, written as torch writes them, and read as people do.
"""

import pathlib

import jax
import numpy as np
import pytest
import torch_archive
from golden import make_lpips_golden as golden

from d4d_jax.metrics import Lpips, load_lpips, load_stlpips
from d4d_jax.metrics.backbones import parameter_shapes, stage_channels
from d4d_jax.metrics.state_dict import read_state_dict

pytestmark = pytest.mark.parity

distance = jax.jit(Lpips.__call__)
FOLDER = pathlib.Path(golden.__file__).parent


@pytest.fixture(scope="module")
def data():
    return np.load(FOLDER / "lpips.npz")


@pytest.fixture(scope="module", params=golden.BACKBONES)
def drawn(request, tmp_path_factory):
    """Name of the backbone, and the distance from files with drawn weights."""
    backbone = request.param
    shapes = parameter_shapes(backbone)
    heads = {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(stage_channels(backbone))}
    folder = tmp_path_factory.mktemp("weights")
    network, heads = (
        {name: golden.draw(name, shape) for name, shape in part.items()} for part in (shapes, heads)
    )
    if backbone.endswith("shift_tolerant"):
        path = torch_archive.archive(folder / "all.pth", network | heads)
        return backbone, load_stlpips(backbone.partition("_")[0], path)
    classifier = {"classifier.6.bias": np.zeros(1000, np.float32)}
    path = torch_archive.archive(folder / "network.pth", network | classifier)
    return backbone, load_lpips(backbone, path, torch_archive.archive(folder / "lin.pth", heads))


def test_distance_and_gradient(data, drawn):
    backbone, model = drawn
    height = golden.SIZES[0][0]
    both = jax.jit(jax.value_and_grad(Lpips.__call__, argnums=1))
    value, gradient = both(model, *golden.images(golden.SIZES[0]))
    np.testing.assert_allclose(value, data[f"{backbone}/{height}/distance"], rtol=1e-5)
    wanted = data[f"{backbone}/gradient"]
    np.testing.assert_allclose(gradient, wanted, atol=1e-4 * np.abs(wanted).max())


def test_distance_at_another_size(data, drawn):
    backbone, model = drawn
    size = golden.SIZES[1]
    value = distance(model, *golden.images(size))
    np.testing.assert_allclose(value, data[f"{backbone}/{size[0]}/distance"], rtol=1e-5)


@pytest.mark.parametrize("drawn", ["alex"], indirect=True)
def test_map(data, drawn):
    _, model = drawn
    values = jax.jit(Lpips.spatial)(model, *golden.images(golden.SIZES[0]))
    np.testing.assert_allclose(values, data["alex/spatial"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("network", ["alex", "vgg"])
def test_shift_tolerant_distance_with_the_weights_of_the_package(data, network):
    model = load_stlpips(network)
    for size in golden.SIZES:
        value = distance(model, *golden.images(size))
        wanted = data[f"{network}_shift_tolerant/{size[0]}/shipped"]
        np.testing.assert_allclose(value, wanted, rtol=1e-5)


@pytest.mark.parametrize("layout", ["archive", "sequence"])
def test_files_written_by_torch(layout):
    arrays = read_state_dict(FOLDER / f"lpips_{layout}.pth")
    wanted = golden.tensors()
    assert list(arrays) == list(wanted)
    for name, array in arrays.items():
        assert array.dtype == ("bfloat16" if name == "bfloat16" else wanted[name].dtype)
        np.testing.assert_array_equal(array.astype(wanted[name].dtype), wanted[name])
