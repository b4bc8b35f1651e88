"""The one-file model: round trip and refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax.models import bundle

PARAMS = {"conv_in": {"kernel": np.linspace(-2, 2, 12).reshape(3, 4), "bias": np.zeros(4)}}
CODEC = {"components": np.full((2, 3), 1 / 3, np.float32)}
CONFIG = {"model": {"name": "unet", "widths": [8, 16]}, "num_steps": 5}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "models" / "tiny.npz"
    bundle.save_bundle(path, PARAMS, CODEC, CONFIG)
    return path


def test_round_trip_keeps_structure_config_and_half_precision_values(saved):
    params, codec, config = bundle.load_bundle(saved)
    assert config == CONFIG
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    kernel = params["conv_in"]["kernel"]
    assert kernel.dtype == jnp.float32
    np.testing.assert_allclose(kernel, PARAMS["conv_in"]["kernel"], rtol=1e-3)
    np.testing.assert_array_equal(codec["components"], CODEC["components"])


def test_saving_what_was_loaded_changes_nothing(saved, tmp_path):
    bundle.save_bundle(tmp_path / "again.npz", *bundle.load_bundle(saved))
    again, first = np.load(tmp_path / "again.npz"), np.load(saved)
    assert sorted(again.files) == sorted(first.files)
    for name in first.files:
        np.testing.assert_array_equal(again[name], first[name])


def test_file_is_plain_numpy_without_pickle(saved):
    with np.load(saved, allow_pickle=False) as archive:
        assert archive["params/conv_in/kernel"].dtype == np.float16
        assert json.loads(str(archive["__config__"])) == CONFIG
    assert [path.name for path in saved.parent.iterdir()] == ["tiny.npz"]


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model file .*none\.npz"):
        bundle.load_bundle(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    with pytest.raises(ValueError, match=r"text\.npz is not a model file"):
        bundle.load_bundle(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz is not a model file"):
        bundle.load_bundle(tmp_path / "other.npz")


def test_truncated_file_is_refused(saved):
    saved.write_bytes(saved.read_bytes()[:-40])
    with pytest.raises(ValueError, match="damaged"):
        bundle.load_bundle(saved)


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_values_beyond_half_precision_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="params/w has values that float16 cannot hold"):
        bundle.save_bundle(tmp_path / "bad.npz", {"w": np.array([value])}, {}, {})
    assert not (tmp_path / "bad.npz").exists()


def test_trees_that_are_not_nested_dicts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="without '/'"):
        bundle.save_bundle(tmp_path / "bad.npz", {"a/b": np.zeros(1)}, {}, {})
    with pytest.raises(ValueError, match="nested dicts of arrays"):
        bundle.save_bundle(tmp_path / "bad.npz", {"a": [np.zeros(1), "x"]}, {}, {})
