"""What a perceptual distance must do, and what its weight files may and may not hold."""

import importlib.util
import os
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_archive
from golden import make_lpips_golden as golden

from d4d_jax import registry
from d4d_jax.metrics import Lpips, load_lpips, load_stlpips
from d4d_jax.metrics.backbones import (
    BACKBONES,
    Conv,
    parameter_shapes,
    smallest_size,
    stage_channels,
)
from d4d_jax.metrics.perceptual_weights import lpips_from_state_dict
from d4d_jax.metrics.state_dict import read_state_dict

distance = jax.jit(Lpips.__call__)
# One compilation for all tests that need it.
value_and_gradient = jax.jit(jax.value_and_grad(Lpips.__call__, argnums=1))
SIZE = (33, 36)


def state_of(backbone):
    heads = {f"lin{i}.model.1.weight": (1, c, 1, 1) for i, c in enumerate(stage_channels(backbone))}
    shapes = parameter_shapes(backbone) | heads
    state = {name: golden.draw(name, shape) for name, shape in shapes.items()}
    return state | {name: np.abs(state[name]) for name in heads}


@pytest.fixture(scope="module")
def alex():
    return lpips_from_state_dict("alex", state_of("alex"))


@pytest.fixture(scope="module")
def tolerant():
    return lpips_from_state_dict("alex_shift_tolerant", state_of("alex_shift_tolerant"))


def blurred(image, times):
    for axis in (0, 1) * times:
        image = (np.roll(image, 1, axis) + 2 * image + np.roll(image, -1, axis)) / 4
    return image.astype(np.float32)


@pytest.mark.parametrize("model", ["alex", "tolerant"])
def test_a_distance(model, request):
    """0 from itself, symmetric, and growing with noise and with blur."""
    model = request.getfixturevalue(model)
    clean, noisy = golden.images(SIZE)
    assert distance(model, clean, clean) == 0
    np.testing.assert_allclose(
        distance(model, clean, noisy), distance(model, noisy, clean), rtol=1e-5
    )
    noise = [distance(model, clean, clean + k * (noisy - clean)) for k in (0.1, 0.3, 1.0)]
    blur = [distance(model, noisy, blurred(noisy, times)) for times in (1, 3, 9)]
    for series in (noise, blur):
        assert 0 < series[0] < series[1] < series[2]


@pytest.mark.parametrize("value", [None, 0.0, 1.0])
def test_the_gradient_at_equal_images_is_zero(alex, value):
    """Also where an image is flat, and where all features of a pixel are 0."""
    image = golden.images(SIZE)[0] if value is None else np.full((*SIZE, 3), value, np.float32)
    bias = "features.0.bias"
    dead = Lpips("alex", alex.weights | {bias: alex.weights[bias] - 9}, alex.heads)
    for model in (alex, dead):
        found, gradient = value_and_gradient(model, image, image)
        assert found == 0 and not np.any(gradient)  # NaN counts as any


@pytest.mark.parametrize(("factor", "shift"), [(1, -3), (1e-25, 0)])
def test_vanishing_features_do_not_poison_the_gradient(alex, factor, shift):
    """Pixels without a feature above 0, or with features whose squares are 0, have no direction."""
    names = ("features.0.weight", "features.0.bias")
    changed = {name: factor * alex.weights[name] for name in names}
    changed[names[1]] += shift
    model = Lpips("alex", alex.weights | changed, alex.heads)
    found, gradient = value_and_gradient(model, *golden.images(SIZE))
    assert np.isfinite(found) and np.all(np.isfinite(gradient)) and np.any(gradient)


def test_descending_the_gradient_reaches_the_reference(alex):
    reference, image = golden.images(SIZE)
    start = None
    for _ in range(15):
        found, gradient = value_and_gradient(alex, image, reference)
        start = found if start is None else start
        image = image - 0.3 * found / np.sum(np.square(gradient)) * gradient
    assert found < 0.5 * start


def test_gradients_of_a_wide_convolution():
    """With few channels it has its own: those of the same with more, unused ones."""
    rng = np.random.default_rng(0)
    image, kernel, bias = (
        jnp.asarray(rng.normal(size=shape) / 5, jnp.float32)
        for shape in ((2, 14, 17, 3), (11, 11, 3, 5), (5,))
    )

    def pull(layer, image, kernel):
        def f(image, kernel):
            return layer({"a.weight": kernel, "a.bias": bias}, "a", image)

        output, back = jax.vjp(f, image, kernel)
        return output, *back(jnp.sin(output))

    wide = jax.jit(pull, static_argnums=0)(Conv(3, 5, 11, padding=2), image, kernel)
    more = [(0, 0), (0, 0), (0, 0), (0, 8)]
    padded = jnp.pad(image, more), jnp.pad(jnp.moveaxis(kernel, 2, 3), more)
    output, to_image, to_kernel = jax.jit(pull, static_argnums=0)(
        Conv(11, 5, 11, padding=2), padded[0], jnp.moveaxis(padded[1], 3, 2)
    )
    for found, wanted in zip(wide, (output, to_image[..., :3], to_kernel[:, :, :3]), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_leading_axes_are_kept(alex):
    clean, noisy = golden.images(SIZE)
    image = np.stack([[clean, noisy, clean], [noisy, noisy, clean]])
    reference = np.stack([[noisy, noisy, clean]] * 2)
    together = distance(alex, image, reference)
    single = distance(alex, clean, noisy)
    np.testing.assert_allclose(together, [[single, 0, 0], [0, 0, 0]], rtol=1e-4, atol=1e-7)
    each = jax.jit(jax.vmap(Lpips.__call__, (None, 0, 0)))(alex, image[0], reference[0])
    np.testing.assert_allclose(each, together[0], rtol=1e-4, atol=1e-7)


def test_the_map_shows_where_images_differ(alex):
    clean, noisy = golden.images((64, 48))
    image = clean.copy()
    image[:16, :16] = noisy[:16, :16]
    values = np.asarray(jax.jit(Lpips.spatial)(alex, image, clean))
    assert values.shape == (64, 48)
    assert values[:16, :16].mean() > 10 * values[48:, 32:].mean()
    np.testing.assert_allclose(values.mean(), distance(alex, image, clean), rtol=0.3)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_sizes(backbone):
    """The smallest image works, a smaller one is refused."""
    model = jax.eval_shape(lambda: lpips_from_state_dict(backbone, state_of(backbone)))
    least = smallest_size(backbone)
    image = jax.ShapeDtypeStruct((least, least + 9, 3), jnp.float32)
    assert jax.eval_shape(Lpips.__call__, model, image, image).shape == ()
    image = jax.ShapeDtypeStruct((least + 9, least - 1, 3), jnp.float32)
    with pytest.raises(ValueError, match=f"at least {least} pixels a side; got {least + 9} x"):
        jax.eval_shape(Lpips.__call__, model, image, image)


def test_published_sizes():
    """The networks without their classifiers."""
    count = {
        name: sum(int(np.prod(shape)) for shape in parameter_shapes(name).values())
        for name in ("vgg", "alex", "squeeze")
    }
    assert count == {"vgg": 14_714_688, "alex": 2_469_696, "squeeze": 722_496}


def test_unknown_backbones():
    for make in (
        lambda: Lpips("resnet", {}, ()),
        lambda: load_lpips("resnet", "absent.pth"),
        lambda: load_stlpips("squeeze"),
    ):
        with pytest.raises(ValueError, match=r"Unknown LPIPS backbone .*'alex'"):
            make()


# Weights from files.


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".safetensors"])
def test_every_format_gives_the_same_distance(alex, tmp_path, suffix):
    path, state = tmp_path / f"weights{suffix}", state_of("alex")
    if suffix == ".pth":
        torch_archive.archive(path, state)
    elif suffix == ".npz":
        np.savez(path, **state)
    else:
        from safetensors.numpy import save_file

        save_file(state, path)
    images = golden.images(SIZE)
    loaded = registry.build("perceptual", {"name": "lpips", "backbone": "alex", "weights": path})
    assert distance(loaded, *images) == distance(alex, *images)


def test_names_of_a_whole_lpips_module(alex):
    """Its slices keep torchvision's numbers, and its heads are in it twice."""
    state = {}
    for name, array in state_of("alex").items():
        if name.startswith("lin"):
            state[name.replace("lin", "lins.")] = array
        else:
            name = name.replace("features", "net.slice5")
        state[name] = array
    state["scaling_layer.shift"] = np.zeros((1, 3, 1, 1), np.float32)
    loaded = lpips_from_state_dict("alex", state)
    jax.tree.map(np.testing.assert_array_equal, loaded, alex)


def test_heads_from_their_own_file_and_from_the_package(alex, tmp_path, monkeypatch):
    state = state_of("alex")
    heads = {name: array for name, array in state.items() if name.startswith("lin")}
    network = {name: array for name, array in state.items() if name not in heads}
    weights = torch_archive.archive(tmp_path / "network.pth", network)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no heads: pass heads=, or pip install --no-deps"):
        load_lpips("alex", weights)
    monkeypatch.undo()
    for name in list(sys.modules):
        if name.partition(".")[0] == "lpips":
            monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "site" / "lpips"
    (folder / "weights" / "v0.1").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('needs torch')")
    path = torch_archive.archive(folder / "weights" / "v0.1" / "alex.pth", heads)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for loaded in (load_lpips("alex", weights), load_lpips("alex", weights, path)):
        jax.tree.map(np.testing.assert_array_equal, loaded, alex)


def test_missing_package_and_missing_file(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'd4d_jax\[perceptual\]'"):
        registry.build("perceptual", {"name": "stlpips"})
    with pytest.raises(FileNotFoundError, match=r"no weight file .*absent\.pth"):
        load_stlpips("alex", tmp_path / "absent.pth")


def test_all_problems_in_one_error():
    state = state_of("alex")
    state["features.0.weight"] = np.zeros((64, 3, 3, 3), np.float32)
    state["features.28.bias"] = state.pop("features.3.bias")
    del state["lin2.model.1.weight"]
    with pytest.raises(ValueError) as error:
        lpips_from_state_dict("alex", state, "some.pth")
    assert str(error.value) == (
        "some.pth does not fit the LPIPS backbone 'alex': missing features.3.bias, missing heads.2,"
        " superfluous features.28.bias, features.0.weight is (64, 3, 3, 3) instead of"
        " (64, 3, 11, 11)."
    )


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("layout", ["archive", "sequence", "npz"])
def test_files_that_would_run_code_are_refused(tmp_path, layout):
    trace, path = tmp_path / "trace", tmp_path / "hostile.pth"
    pickled = pickle.dumps({"features.0.weight": Hostile(trace)}, protocol=2)
    if layout == "archive":
        torch_archive.raw_archive(path, pickled, {})
    elif layout == "sequence":
        torch_archive.sequence(path, pickled)
    else:
        path = path.with_suffix(".npz")
        np.savez(path, weight=np.array([Hostile(trace)]))
    sentence = "allow_pickle" if layout == "npz" else "mkdir, which a state dict .* nothing of it"
    with pytest.raises(ValueError, match=sentence):
        load_lpips("alex", path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "place",
    [(24, 0, (5, 5), (5, 1)), (24, 20, (5,), (1,)), (24, 2, (3,), (-2,)), (24, -1, (2,), (1,))],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path, place):
    pickled = b"\x80\x02}" + pickle.dumps("a", 2)[2:-1] + torch_archive.tensor(0, *place) + b"s."
    storage = {"0": np.zeros(24, np.float32), "1": np.ones(99, np.float32)}
    path = torch_archive.raw_archive(tmp_path / "far.pth", pickled, storage)
    with pytest.raises(ValueError, match=r"far\.pth cannot be read"):
        read_state_dict(path)


def test_other_files_are_refused(tmp_path):
    whole = torch_archive.archive(tmp_path / "whole.pth", {"a": np.ones((40, 50), np.float32)})
    nested = torch_archive.raw_archive(tmp_path / "n.pth", pickle.dumps({"epoch": 3}, 2), {})
    cases = {
        "text.pth": b"<html>not found</html>",
        "empty.pth": b"",
        "cut.pth": whole.read_bytes()[:5000],
        "number.pth": pickle.dumps(3, 2),
        "nested.pth": nested.read_bytes(),
    }
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a file of named arrays: "):
            read_state_dict(path)
    with np.load(tmp_path / "whole.pth", allow_pickle=False) as archive:
        assert archive.files  # the cut file was cut, the whole one is sound
    assert read_state_dict(whole)["a"].shape == (40, 50)
