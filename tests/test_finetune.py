"""`experiments.train` from the weights of a model folder: words and images, and the way back."""

import dataclasses
import json

import jax
import model_folders
import numpy as np
import pytest
from absl import flags
from model_folders import FRAMES, SIZE, towers, write_folder

from d4d_jax import clips, conversion
from d4d_jax.data import synthetic
from d4d_jax.data.pipeline import ClipSource
from d4d_jax.pipeline import OrbitPipeline
from experiments import build, sample, train
from experiments.configs import finetune

NETWORK = model_folders.NETWORK | {"multipliers": (1,), "temporal_conv": False}
PRESETS = ("diffusion4d_t2v", "diffusion4d_i2v")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two clips with captions, and a model folder for every preset."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    root = tmp_path_factory.mktemp("finetune")
    for seed, caption in enumerate(("a red panda", "a fox")):
        clip = synthetic.make_clip(seed, num_frames=FRAMES, size=SIZE)
        clips.write_clip(dataclasses.replace(clip, caption=caption), root / "clips" / str(seed))
    for preset in PRESETS:
        (root / preset).mkdir()
        write_folder(root / preset, preset, NETWORK)
    return root


def toy_config(root, preset, **changes):
    config = json.loads(finetune.get_config(preset).to_json())
    config["network"] |= {**NETWORK, "dtype": "float32", "remat": "none"}
    config["codec"] = {"name": "kl", "variant": "tiny"}
    config["data"] |= {"size": SIZE, "path": str(root / "clips")}
    config["optimizer"] |= {"warmup_steps": 0}
    small = {"num_steps": 2, "batch_size": 1, "checkpoint_every": 2, "log_every": 1}
    config |= small | {"init_from": str(root / preset)} | changes
    return json.loads(json.dumps(config))  # tuples as lists


@pytest.fixture(scope="module")
def tuned(root):
    """The workdir of a run of two steps for every preset, exported as a folder."""
    made = {}
    for preset in PRESETS:
        made[preset] = root / f"run_{preset}"
        made[preset].mkdir()
        export = str(root / f"tuned_{preset}")
        train.run(toy_config(root, preset), made[preset], export=export)
    return made


@pytest.fixture
def started(monkeypatch):
    """Lets `train.run` stop where the loop starts; the loop's state and data."""
    calls = []
    monkeypatch.setattr(
        train.loop, "train", lambda state, step, data, *rest, **named: calls.append((state, data))
    )
    return calls


@pytest.mark.parametrize("preset", PRESETS)
def test_a_run_starts_with_the_weights_and_the_prompts_of_the_model(
    root, preset, started, tmp_path
):
    train.run(toy_config(root, preset), tmp_path)
    ((state, data),) = started
    for file, found in (("network", state.params), ("codec", state.frozen["codec"])):
        expected = conversion.load(root / preset / f"{file}.safetensors")
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    base, batch = OrbitPipeline.load(root / preset), next(data)
    source = ClipSource(root / "clips", size=SIZE)
    shown = next(r for r in source if np.array_equal(r["static"], batch["static"][0]))
    if preset.endswith("t2v"):
        prompt = str(shown["caption"])
        assert "image_embedding" not in batch
    else:
        prompt = build._straight((shown["dynamic"][0] + 1) / 2)
    told = base.prompt.encode(towers(), prompt, size=SIZE, to_latents=lambda image: image)
    if told.image_embedding is not None:
        np.testing.assert_allclose(batch["image_embedding"], told.image_embedding, atol=1e-5)
    np.testing.assert_allclose(batch["context"], told.context, atol=1e-5)
    np.testing.assert_allclose(batch["null_context"], told.null_context, atol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_training_moves_the_weights_a_little_and_the_text_matters(root, tuned, preset):
    rows = [json.loads(line) for line in (tuned[preset] / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(row["loss"]) for row in rows)
    before = conversion.load(root / preset / "network.safetensors")
    after = conversion.load(root / f"tuned_{preset}" / "network.safetensors")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-3
    # The layers that read the tokens have a gradient.
    keys = [
        change
        for path, change in jax.tree.leaves_with_path(moved)
        if "attention_2" in jax.tree_util.keystr(path) and "key" in jax.tree_util.keystr(path)
    ]
    assert keys and max(keys) > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_the_run_and_its_export_are_the_same_model(root, tuned, preset):
    run = sample.load_pipeline(str(tuned[preset]))
    exported = OrbitPipeline.load(root / f"tuned_{preset}")
    image = clips.read_clip(root / "clips" / "0", size=(SIZE, SIZE)).dynamic[0]
    prompt = "a fox" if preset.endswith("t2v") else image
    one, two = (model(prompt, num_steps=2) for model in (run, exported))
    np.testing.assert_array_equal(one.dynamic, two.dynamic)
    assert np.ptp(one.dynamic) > 0.05
    (root / preset).rename(root / "away")  # the exported folder needs nothing of it
    try:
        again = OrbitPipeline.load(root / f"tuned_{preset}")(prompt, num_steps=2)
        np.testing.assert_array_equal(one.dynamic, again.dynamic)
    finally:
        (root / "away").rename(root / preset)


def test_the_tuned_network_goes_back_to_the_format_it_came_from(root, tuned):
    source = root / "tuned_diffusion4d_t2v" / "network.safetensors"
    params = conversion.load(source)
    state = conversion.export(
        params, "diffusers_t2v", drop=["camera_embedding", "motion_embedding"]
    )
    again = conversion.convert(
        state, "diffusers_t2v", params, allow_new=["camera_embedding", "motion_embedding"]
    )
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_a_run_continues_bit_for_bit(root, tuned, tmp_path):
    config = toy_config(root, "diffusion4d_t2v", checkpoint_every=1)
    train.run(config | {"num_steps": 1}, tmp_path)
    train.run(config, tmp_path, export=str(tmp_path / "model"))
    found = conversion.load(tmp_path / "model" / "network.safetensors")
    expected = conversion.load(root / "tuned_diffusion4d_t2v" / "network.safetensors")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": "absent"}, "no model file absent"),
        ({"init_from": ""}, "cannot be fitted to the clips: set --config.init_from"),
        ({"codec": {"name": "kl", "variant": "sd"}}, "has latents of KLCodec.*variant='tiny'"),
        (
            {"network": {"name": "unet", "variant": "diffusion4d_t2v", **NETWORK, "width": 16}},
            r"init_from are not those of the network.*/kernel is \(.*\) and not .*and \d+ more",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(root, tmp_path, changes, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        train.run(toy_config(root, "diffusion4d_t2v", **changes), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_clips_without_captions_are_refused(root, tmp_path):
    clip = synthetic.make_clip(0, num_frames=FRAMES, size=SIZE)
    clips.write_clip(dataclasses.replace(clip, caption=""), tmp_path / "clips" / "0")
    config = toy_config(root, "diffusion4d_t2v")
    config["data"]["path"] = str(tmp_path / "clips")
    with pytest.raises(ValueError, match="Clip 0 has no caption, which this model is prompted by"):
        train.run(config, tmp_path)


def test_presets_are_the_configurations():
    with pytest.raises(ValueError, match=r"finetune\.py takes one of videomv_t2v, .* not 'tiny'"):
        finetune.get_config("tiny")
    config = finetune.get_config("videomv_i2v")
    assert (config.schedule.prediction, config.data.size) == ("v", 256)


def test_entries_are_as_many_as_clips(root):
    with pytest.raises(ValueError, match="There are 2 clips, but entries for 1"):
        ClipSource(root / "clips").extended([{}])
