"""FVD: the network against an independent one in torch, the distance against known Gaussians."""

import zlib

import jax
import numpy as np
import pytest
import scipy.linalg

from d4d_jax.metrics import I3D, fvd, load_i3d

features = jax.jit(I3D.__call__)


def random_state(rename=lambda name: name):
    """Arrays of order-one activations under the names of a state dict."""
    state = {}
    for name, (t, h, w, inputs, outputs) in fvd.kernel_shapes():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        scale = np.sqrt(2 / (t * h * w * inputs))
        state[f"{name}.conv3d.weight"] = scale * rng.normal(size=(outputs, inputs, t, h, w))
        if name == "logits":
            state[f"{name}.conv3d.bias"] = rng.normal(size=outputs)
            continue
        state[f"{name}.bn.weight"] = rng.uniform(0.5, 1.5, outputs)
        state[f"{name}.bn.bias"] = 0.3 * rng.normal(size=outputs)
        state[f"{name}.bn.running_mean"] = 0.3 * rng.normal(size=outputs)
        state[f"{name}.bn.running_var"] = rng.uniform(0.5, 1.5, outputs)
    return {rename(name): array.astype(np.float32) for name, array in state.items()}


def videos(frames, size, count=1):
    return np.random.default_rng(frames).random((count, frames, *size, 3), np.float32)


@pytest.mark.live
@pytest.mark.parametrize(("frames", "size"), [(16, (224, 224)), (13, (64, 80))])
def test_features_are_those_of_the_network_in_torch(frames, size):
    """Odd numbers of frames reach the paddings; other sizes are resized."""
    import torch
    from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d
    from cdfvd.third_party.i3d.utils import preprocess_i3d

    state, given = random_state(), videos(frames, size)
    peer = InceptionI3d(400, in_channels=3).eval()
    loaded = {name: torch.as_tensor(array) for name, array in state.items()}
    missing, unexpected = peer.load_state_dict(loaded, strict=False)
    assert all(name.endswith("num_batches_tracked") for name in missing) and not unexpected
    with torch.no_grad():
        expected = peer(preprocess_i3d(255 * given)).numpy()
    found = features(fvd.i3d_from_state_dict(state), given)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.live
def test_the_distance_is_that_of_the_package_in_torch():
    import torch
    from cdfvd.third_party.i3d import utils

    rng = np.random.default_rng(1)
    one, other = rng.normal(size=(90, 40)), 1 + rng.gamma(2.0, size=(80, 40))
    expected = utils.frechet_distance(torch.as_tensor(one), torch.as_tensor(other))
    assert fvd.frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-6)


def test_the_other_names_are_the_same_network(tmp_path):
    def rename(name):
        name = name[0].lower() + name[1:]
        for ours, theirs in (
            *(("b0", "branch_0"), ("b1a", "branch_1.0"), ("b1b", "branch_1.1")),
            *(("b2a", "branch_2.0"), ("b2b", "branch_2.1"), ("b3b", "branch_3.1")),
            *((".bn.", ".batch3d."), ("logits.", "conv3d_0c_1x1.")),
        ):
            name = name.replace(ours, theirs)
        return name

    state = random_state(rename)
    assert "mixed_3b.branch_1.0.batch3d.running_mean" in state
    np.savez(tmp_path / "i3d.npz", **state)
    one, two = load_i3d(tmp_path / "i3d.npz"), fvd.i3d_from_state_dict(random_state())
    jax.tree.map(np.testing.assert_array_equal, one, two)
    scaled = sum(bias.size for name, bias in one.biases.items() if name != "logits")
    count = sum(kernel.size for kernel in one.kernels.values()) + 2 * scaled + 400
    assert count == 12_697_264


def test_wrong_weights_and_short_videos_are_named():
    state = random_state()
    del state["Mixed_4b.b0.conv3d.weight"]
    state["logits.conv3d.bias"] = np.zeros(600)
    with pytest.raises(
        ValueError, match=r"hold an I3D .*b0\.conv3d\.weight .* missing; logits.*600"
    ):
        fvd.i3d_from_state_dict(state)
    with pytest.raises(ValueError, match="at least 9 frames; got 8"):
        jax.eval_shape(fvd.i3d_from_state_dict(random_state()), videos(8, (32, 32)))


def test_distance_of_gaussians():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(500, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 2
    assert fvd.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    found = fvd.frechet_distance(one, other)
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    shift = np.square(one.mean(0) - other.mean(0)).sum()
    root = scipy.linalg.sqrtm(first @ second).real
    assert found == pytest.approx(shift + np.trace(first + second - 2 * root), rel=1e-6)
    assert fvd.frechet_distance(other, one) == pytest.approx(found, rel=1e-9)
    # Fewer videos than features: the covariances are singular.
    few = rng.normal(size=(4, 50))
    assert fvd.frechet_distance(few, few + 1) == pytest.approx(50, rel=1e-6)
    with pytest.raises(ValueError, match="two videos or more; got 1 and 4"):
        fvd.frechet_distance(few[:1], few)
