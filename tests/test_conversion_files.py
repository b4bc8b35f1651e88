"""Weights on disk: read from what people have, written whole or not at all, tensor by tensor."""

import json
import os
import pathlib
import pickle
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import torch_archive
import videomv_names
from conversion_cases import (
    SHALLOW,
    TEXT,
    VAE,
    assert_same,
    draw,
    draw_leaves,
    unet,
    videomv_shapes,
)
from flax.traverse_util import unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from d4d_jax import conversion
from d4d_jax.conversion import files
from d4d_jax.models.autoencoder_kl import AutoencoderKL
from d4d_jax.models.clip import TextEncoder

NETWORK = TextEncoder(**TEXT)
FORMAT = "transformers_text"


@pytest.fixture(scope="module")
def params():
    return unflatten_dict(draw_leaves(NETWORK), sep="/")


@pytest.fixture(scope="module")
def state(params):
    return conversion.export(params, FORMAT)


def folder_of(path):
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("name", ["own.safetensors", "own"])
def test_own_files(tmp_path, params, name):
    path = tmp_path / name
    report = conversion.save(path, params)
    assert report.matched == len(draw_leaves(NETWORK))
    assert_same(conversion.load(path), params)
    with pytest.raises(FileExistsError, match="exists"):
        conversion.save(path, params)
    changed = params | {"position_embedding": params["position_embedding"] + 1}
    conversion.save(path, changed, overwrite=True)
    assert_same(conversion.load(path, network=NETWORK), changed)
    assert folder_of(tmp_path) == [name]
    with pytest.raises(conversion.ConversionError, match=r"own.* does not fit: 1 problem"):
        conversion.load(path, network=TextEncoder(**TEXT | {"positions": 8}))


def test_written_files_are_those_of_safetensors(tmp_path, params, state):
    path = tmp_path / "new" / "text.safetensors"
    conversion.save(path, params, FORMAT, network=NETWORK)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert_same({name: file.get_tensor(name) for name in file.keys()}, state)
    assert_same(conversion.load(path, FORMAT, network=NETWORK), params)


def test_files_of_safetensors_are_read(tmp_path):
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "whole": np.arange(3),
        "single": np.float32([[1.5]]),
        "scalar": np.array(2.0, np.float32),
        "none": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "a.safetensors"
    save_file(arrays, path, metadata={"a": "b"})
    assert files.read_metadata(path) == {"a": "b"}
    read = files.read(path)
    assert read.shapes == {name: array.shape for name, array in arrays.items()}
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype
    brain = np.arange(6).astype(jnp.bfloat16)  # which numpy's half of the library does not know
    head = b'{"brain":{"dtype":"BF16","shape":[6],"data_offsets":[0,12]}}'
    path.write_bytes(len(head).to_bytes(8, "little") + head + brain.tobytes())
    np.testing.assert_array_equal(files.read(path)["brain"], brain)


def shard(folder, state, stem="model", ending="safetensors"):
    """Two files and their index, as `save_pretrained` writes for large models."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(state)
    halves = {"1-of-2": names[: len(names) // 2], "2-of-2": names[len(names) // 2 :]}
    places = {}
    for number, part in halves.items():
        file = f"{stem}-0000{number.replace('of-', 'of-0000')}.{ending}"
        write = save_file if ending == "safetensors" else _archive
        write({name: np.ascontiguousarray(state[name]) for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return index


def _archive(arrays, path):
    torch_archive.archive(path, arrays)


@pytest.mark.parametrize(("stem", "ending"), [("model", "safetensors"), ("pytorch_model", "bin")])
def test_folders_with_shards(tmp_path, params, state, stem, ending):
    index = shard(tmp_path / "pipeline" / "text_encoder", state, stem, ending)
    for folder in (tmp_path / "pipeline", index.parent):
        assert_same(conversion.load(folder, FORMAT, network=NETWORK), params)
    index.write_text(json.dumps({"weight_map": {"a": "../own.safetensors"}}))
    with pytest.raises(ValueError, match=r"lists '../own\.safetensors', which is not in its"):
        files.read(index.parent)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is no index of weight files"):
        files.read(index.parent)
    with pytest.raises(FileNotFoundError, match=r"no weights in the folder .*model\.safetensors"):
        files.read(tmp_path)


def test_folders_for_from_pretrained(tmp_path):
    network = AutoencoderKL(**VAE)
    params = unflatten_dict(draw_leaves(network), sep="/")
    folder = tmp_path / "vae"
    conversion.save(folder, params, "diffusers_vae", network=network)
    assert folder_of(folder) == ["config.json", "diffusion_pytorch_model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["block_out_channels"] == [8, 16, 24] and config["layers_per_block"] == 1
    assert_same(conversion.load(tmp_path, "diffusers_vae", network=network), params)
    with pytest.raises(FileExistsError, match="diffusion_pytorch_model"):
        conversion.save(folder, params, "diffusers_vae", network=network)
    with pytest.raises(ValueError, match=r"8 heads of 4 .* not 2 of 4"):
        shallow = unet(**SHALLOW, camera_embedding=False, init_heads=2)
        shapes = unflatten_dict(draw_leaves(shallow), sep="/")
        conversion.save(tmp_path / "unet", shapes, "diffusers_t2v", network=shallow)


def test_incomplete_parameters_are_not_written(tmp_path, params):
    part = {name: leaf for name, leaf in params.items() if name != "position_embedding"}
    with pytest.raises(conversion.ConversionError, match=r"position_embedding \(7, 16\) is miss"):
        conversion.save(tmp_path / "a.safetensors", part, FORMAT, network=NETWORK)
    more = params | {"block_9": params["block_0"]}
    with pytest.raises(conversion.ConversionError, match=r"block_9/.* is unknown to the network"):
        conversion.save(tmp_path / "a.safetensors", more, FORMAT, network=NETWORK)
    with pytest.raises(ValueError, match=r"none of the endings \.safetensors, \.pth"):
        conversion.save(tmp_path / "a.h5", params, FORMAT, network=NETWORK)
    with pytest.raises(ValueError, match=r"none of the endings .*\.bin\."):
        conversion.save(tmp_path / "a", params, "open_clip_text", network=NETWORK)
    with pytest.raises(ValueError, match=r"no format 'clip'; known: d4d, videomv_t2v"):
        conversion.save(tmp_path / "a.safetensors", params, "clip")
    with pytest.raises(ValueError, match=r"no variant 'huge'; known: .*videomv_t2v"):
        conversion.convert_file(params, None, to="videomv_t2v", variant="huge")
    with pytest.raises(ValueError, match="'small' has no meaning from d4d to d4d"):
        conversion.convert_file(params, tmp_path / "a.safetensors", variant="small")
    assert folder_of(tmp_path) == []


class Broken(dict):
    def __getitem__(self, name):
        if name == "second":
            raise OSError(28, "No space left on device")
        return super().__getitem__(name)


def test_broken_writes_leave_what_was_there(tmp_path):
    arrays = Broken(first=np.zeros(3, np.float32), second=np.zeros(3, np.float32))
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")
    for target, write in (
        (path, lambda: files.write_safetensors(path, arrays, {})),
        (tmp_path / "b", lambda: files.write_orbax(tmp_path / "b", arrays)),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
        assert folder_of(tmp_path) == ["a.safetensors"], target
    assert path.read_bytes() == b"before"


def test_foreign_folders_are_never_replaced(tmp_path, params):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="no checkpoint to replace"):
        conversion.save(folder, params, overwrite=True)
    assert folder_of(folder) == ["thesis.txt"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "no .safetensors file"),
        (b"<html>not found</html>", "no .safetensors file"),
        ((9).to_bytes(8, "little") + b'{"a": 1]}', "no .safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "no .safetensors file"),
        ((8).to_bytes(8, "little") + b'{"a": 1}', "damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, content, sentence):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        files.read(path)


@pytest.mark.parametrize(
    "change",
    [{"data_offsets": [0, 800]}, {"data_offsets": [-8, 8]}, {"dtype": "C64"}, {"shape": 3}],
)
def test_damaged_files_are_refused(tmp_path, change):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change
    head = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(8))
    with pytest.raises(ValueError, match="is damaged, or of a kind not known here"):
        files.read(path)
    with pytest.raises(FileNotFoundError, match=r"no weight file .*absent"):
        files.read(tmp_path / "absent.safetensors")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["unet.pth", "unet/diffusion_pytorch_model.bin"])
def test_files_that_would_run_code_are_refused(tmp_path, place):
    trace, path = tmp_path / "trace", tmp_path / place
    path.parent.mkdir(exist_ok=True)
    pickled = pickle.dumps({"state_dict": {"conv_in.bias": Hostile(trace)}}, protocol=2)
    torch_archive.raw_archive(path, pickled, {})
    source = path if path.suffix == ".pth" else tmp_path
    with pytest.raises(ValueError, match=r"refers to \w+\.mkdir, .* nothing of it was run"):
        conversion.load(source, "diffusers_t2v", network=unet(**SHALLOW))
    assert not trace.exists()


def nested(path: pathlib.Path, arrays) -> pathlib.Path:
    """A checkpoint as VideoMV writes: {"state_dict": {"module.NAME": tensor}, "step": 7}."""
    entries = b"}"
    for i, (name, array) in enumerate(arrays.items()):
        strides = tuple(stride // 4 for stride in array.strides)
        tensor = torch_archive.tensor(i, array.size, 0, array.shape, strides)
        entries += pickle.dumps(f"module.{name}", 2)[2:-1] + tensor + b"s"
    whole = b"\x80\x02}" + pickle.dumps("state_dict", 2)[2:-1] + entries + b"s"
    whole += pickle.dumps("step", 2)[2:-1] + pickle.dumps(7, 2)[2:-1] + b"s."
    storages = {str(i): array for i, array in enumerate(arrays.values())}
    return torch_archive.raw_archive(path, whole, storages)


def test_nested_checkpoints(tmp_path):
    network, arrays = unet(**SHALLOW), draw(videomv_shapes(SHALLOW))
    path = nested(tmp_path / "non_ema.pth", arrays)
    params = conversion.load(path, "videomv_t2v", network=network)
    assert_same(conversion.export(params, "videomv_t2v"), arrays)


def test_torch_files_need_torch(tmp_path, params, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs torch: pip install torch, or choose a \.safe"):
        conversion.save(tmp_path / "a.pth", params, FORMAT, network=NETWORK)
    assert folder_of(tmp_path) == []


def test_new_parameters_of_a_file_get_initial_values(tmp_path):
    network, arrays = unet("diffusion4d_t2v", **SHALLOW), draw(videomv_shapes(SHALLOW))
    path = tmp_path / "t2v.safetensors"
    save_file(arrays, path)
    options = {"network": network, "allow_new": ["motion_embedding"]}
    params = conversion.load(path, "videomv_t2v", **options)
    motion = params["motion_embedding"]
    assert not motion["null"].any() and not motion["mlp"]["linear_2"]["kernel"].any()
    assert 0.5 < np.std(motion["mlp"]["linear_1"]["kernel"]) < 0.65  # uniform in +-1
    assert_same(conversion.load(path, "videomv_t2v", **options), params)
    other = conversion.load(path, "videomv_t2v", **options, seed=1)["motion_embedding"]
    assert not np.array_equal(
        other["mlp"]["linear_1"]["kernel"], motion["mlp"]["linear_1"]["kernel"]
    )


_MEASURE = """
import resource, sys
from d4d_jax import conversion
from d4d_jax.conversion import formats
formats.template(formats.find_network("compvis_vae"))
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
conversion.convert_file(sys.argv[1], sys.argv[2], format="compvis_vae", to="diffusers_vae")
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """The autoencoder at its full size, 335 MB."""
    shapes = videomv_names.autoencoder()
    blank = {name: np.broadcast_to(np.float32(0.5), shape) for name, shape in shapes.items()}
    source = tmp_path / "vae.safetensors"
    files.write_safetensors(source, blank, {})
    size = source.stat().st_size
    assert size > 330e6
    result = subprocess.run(
        [sys.executable, "-c", _MEASURE, source, tmp_path / "out.safetensors"],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parents[1],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert int(result.stdout) < 0.15 * size
    assert (tmp_path / "out.safetensors").stat().st_size > 330e6
