"""experiments.encode: latents stand for frames in training, and keep what made them."""

import json
import shutil

import jax
import model_folders
import numpy as np
import pytest
from absl import flags
from binaries import run_binary
from model_folders import write_folder

from d4d_jax import clips
from d4d_jax.data import latents, pipeline, records, shards, synthetic
from d4d_jax.models import bundle
from experiments import build, inputs, train
from experiments.configs import finetune, tiny

FRAMES, SIZE = 3, 16
NETWORK = model_folders.NETWORK | {"multipliers": (1,), "temporal_conv": False}


def write_clips(folder):
    for seed in range(4):
        clip = synthetic.make_clip(seed, num_frames=FRAMES, size=SIZE)
        clips.write_clip(clip, folder / str(seed))
        (folder / str(seed) / "caption.txt").write_text(f"ball {seed}")


def toy_config(data, **changes):
    config = json.loads(tiny.get_config("smoke").to_json()) | changes
    config["data"] |= {"path": str(data), "static_probability": 0.5}
    return config


def toy_finetune(preset, folder):
    config = json.loads(finetune.get_config(preset).to_json())
    config["network"] |= {**NETWORK, "dtype": "float32", "remat": "none"}
    config["codec"] = {"name": "kl", "variant": "tiny"}
    config["data"] |= {"size": SIZE}
    config["optimizer"] |= {"warmup_steps": 0}
    small = {"num_steps": 2, "batch_size": 1, "checkpoint_every": 2, "log_every": 1}
    return json.loads(json.dumps(config | small | {"init_from": str(folder)}))


def run(config, workdir, **options):
    workdir.mkdir()
    train.run(config, workdir, **options)


def losses_of(workdir):
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set, a model that was trained on it, and the data set encoded by the model."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    root = tmp_path_factory.mktemp("encode")
    write_clips(root / "clips")
    fractions = shards.Fractions(val=0.6, test=0.0)
    shards.build(root / "clips", root / "data", fractions=fractions, shard_clips=2)
    run(toy_config(root / "data"), root / "run", export=str(root / "model.npz"))
    result = encode(root, root / "latents", "--dtype=float32")
    assert result.returncode == 0, result.stderr
    return root


def encode(root, out, *options, checkpoint="model.npz"):
    flags = (f"--data={root / 'data'}", f"--checkpoint={root / checkpoint}", f"--out={out}")
    return run_binary("encode", *flags, *options)


def test_records_keep_their_frames_and_gain_latents_of_the_codec(root):
    codec_params = bundle.load_bundle(root / "model.npz")[1]
    codec = build.build_codec(toy_config(root / "data"))
    plain = records.Records(root / "data", "train")
    both = records.Records(root / "latents", "train", views=("dynamic", *records.LATENTS))
    frames = pipeline.ClipSource(plain)
    assert len(both) == len(plain) > 0 and records.verify(root / "latents") > 1
    for i, record in enumerate(both):
        np.testing.assert_array_equal(record["dynamic"], plain[i]["dynamic"])
        for name, view in zip(records.LATENTS, ("dynamic", "static"), strict=True):
            expected = codec.encode(codec_params, frames[i][view][None])[0]
            np.testing.assert_allclose(record[name], expected, atol=1e-5)
    assert "dynamic_latents" not in records.Records(root / "latents", "train")[0]


def test_training_on_latents_is_training_on_frames(root):
    """With static clips among them, validation, and samples beside the truth."""
    base = {"init_from": str(root / "model.npz"), "num_steps": 4, "sample_every": 4}
    base["validate_every"] = 4
    for name in ("data", "latents"):
        run(toy_config(root / name, **base), root / f"from_{name}")
    one, two = (losses_of(root / f"from_{name}") for name in ("data", "latents"))
    assert len(one) == 4
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert list((root / "from_latents" / "images").glob("*.png"))


def test_a_run_without_a_model_takes_the_codec_from_the_data(root):
    run(toy_config(root / "latents"), root / "scratch", export=str(root / "scratch.npz"))
    one, two = (bundle.load_bundle(root / f"{name}.npz")[1] for name in ("model", "scratch"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_another_codec_or_size_is_refused(root):
    config = toy_config(root / "latents")
    config["codec"]["dim"] = 5
    with pytest.raises(ValueError, match=r"were made by .*'dim': 4.* asks for .*'dim': 5"):
        run(config, root / "a")
    config = toy_config(root / "latents")
    config["data"]["size"] = 32
    with pytest.raises(ValueError, match="frames of 16 pixels, not of 32"):
        run(config, root / "b")
    run(toy_config(root / "clips", seed=1), root / "c", export=str(root / "other.npz"))
    config = toy_config(root / "latents", init_from=str(root / "other.npz"))
    with pytest.raises(ValueError, match="with other weights than those of init_from"):
        run(config, root / "d")
    source = inputs.build_source(toy_config(root / "latents"))
    with pytest.raises(ValueError, match="on white, not on background='random'"):
        pipeline.make_dataset(source, batch_size=1, background="random")
    with pytest.raises(ValueError, match="has no latents: see experiments"):
        records.Records(root / "data", "train", views=records.LATENTS)


def test_still_samples_roll_their_latents_with_the_cameras(root):
    source = inputs.build_source(toy_config(root / "latents"))
    still = pipeline.roll({**source[0], "motion": np.float32(0)}, 1)
    order = [1, 0, 1] if np.allclose(*source[0]["camera"][[0, -1]], atol=1e-4) else [1, 2, 0]
    for name in (*records.LATENTS, "camera"):
        np.testing.assert_array_equal(still[name], source[0][name][order])


def test_encoding_goes_on_with_the_missing_files(root, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(root / "latents", out)
    files = sorted(out.glob("*.array_record"))
    before = {file: file.read_bytes() for file in files}
    (out / "dataset.json").unlink()
    files[0].unlink()
    stamp = files[1].stat().st_mtime_ns
    assert encode(root, out, "--dtype=float32").returncode == 0
    assert {file: file.read_bytes() for file in files} == before
    assert files[1].stat().st_mtime_ns == stamp
    result = encode(root, out, "--dtype=float16")
    assert result.returncode == 1 and "holds another data set" in result.stderr
    with pytest.raises(FileNotFoundError, match="no data set in"):
        latents.encode(root / "clips", tmp_path / "none", dict, {"size": SIZE})


def test_words_and_images_are_encoded_with_the_latents(root, tmp_path):
    """Training then needs neither CLIP's towers nor the VAE."""
    for preset in ("diffusion4d_t2v", "diffusion4d_i2v"):
        folder = tmp_path / preset
        folder.mkdir()
        write_folder(folder, preset, NETWORK)
        out = tmp_path / f"{preset}_latents"
        result = encode(root, out, "--dtype=float32", checkpoint=folder)
        assert result.returncode == 0, result.stderr
        config = toy_finetune(preset, folder)
        losses = []
        for name, data in (("frames", root / "data"), ("latents", out)):
            config["data"] |= {"path": str(data)}
            run(config, tmp_path / f"run_{preset}_{name}")
            losses.append(losses_of(tmp_path / f"run_{preset}_{name}"))
        np.testing.assert_allclose(*losses, rtol=1e-4)
    config["init_from"] = str(tmp_path / "diffusion4d_t2v")
    with pytest.raises(ValueError, match=r"came with prompts by .*'image_text'.* has .*'text'"):
        run(config, tmp_path / "mixed")
