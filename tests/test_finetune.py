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
from experiments import build, inputs, train
from experiments.configs import finetune, paper, paper_image, paper_static3d, paper_text

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
        prompt = inputs.straight((shown["dynamic"][0] + 1) / 2)
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
    run = build.load_pipeline(str(tuned[preset]))
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


@pytest.fixture(scope="module")
def moved_asset(root):
    """The model that a run makes for static assets, from one that does not know of them."""
    config = toy_config(root, "diffusion4d_static3d", init_from=str(root / "diffusion4d_i2v"))
    config["network"] |= {"static_channels": 4}
    folder = root / "run_static3d"
    folder.mkdir()
    train.run(config, folder, export=str(root / "static3d"))
    return OrbitPipeline.load(root / "static3d")


def test_a_static_asset_is_learnt_by_new_weights_and_stays_in_the_result(root, moved_asset):
    new = moved_asset.params["static_in"]["kernel"]
    assert 0 < np.abs(new).max() < 1e-3  # they started at 0
    clip = clips.read_clip(root / "clips" / "0", size=(SIZE, SIZE))
    other = clips.read_clip(root / "clips" / "1", size=(SIZE, SIZE))
    image = clip.dynamic[0]
    strong = {**moved_asset.params, "static_in": {"kernel": 1e6 * new}}
    model = dataclasses.replace(moved_asset, params=strong)
    one, two = (model(image, num_steps=2, asset=asset) for asset in (clip, other))
    assert np.abs(one.dynamic - two.dynamic).max() > 1e-4  # the same asset gives 0
    np.testing.assert_allclose(one.static, clip.static, atol=1e-6)
    np.testing.assert_allclose(one.static_alpha, clip.static_alpha, atol=1e-6)


def test_missing_and_unwanted_assets_are_named(root, moved_asset):
    clip = clips.read_clip(root / "clips" / "0", size=(SIZE, SIZE))
    with pytest.raises(ValueError, match="moves a 3D asset: pass its static orbit"):
        moved_asset(clip.dynamic[0], num_steps=2)
    with pytest.raises(ValueError, match="does not read a 3D asset"):
        OrbitPipeline.load(root / "diffusion4d_i2v")(clip.dynamic[0], num_steps=2, asset=clip)
    longer = synthetic.make_clip(0, num_frames=FRAMES + 1, size=SIZE)
    with pytest.raises(ValueError, match=f"has {FRAMES + 1} frames, but this model makes {FRAMES}"):
        moved_asset(clip.dynamic[0], num_steps=2, asset=longer)


def test_a_network_may_have_more_or_less_than_the_base_and_it_is_said(
    root, started, tmp_path, caplog
):
    config = toy_config(root, "diffusion4d_t2v")
    config["network"] |= {"motion_embedding": False, "temporal_conv": True}
    train.run(config, tmp_path)
    assert "New parameters, which init_from does not have: down_0/" in caplog.text
    assert "that the network does not have: motion_embedding/" in caplog.text
    ((state, _),) = started
    expected = conversion.load(root / "diffusion4d_t2v" / "network.safetensors")
    jax.tree.map(np.testing.assert_array_equal, state.params["conv_in"], expected["conv_in"])


def test_adapters_are_trained_alone_and_merged_into_the_export(root, tmp_path):
    config = toy_config(root, "diffusion4d_t2v", lora={"rank": 2, "alpha": 4.0, "kernels": ""})
    train.run(config, tmp_path / "run_lora", export=str(tmp_path / "merged"))
    before = conversion.load(root / "diffusion4d_t2v" / "network.safetensors")
    after = conversion.load(tmp_path / "merged" / "network.safetensors")
    for path, change in jax.tree.leaves_with_path(jax.tree.map(lambda a, b: b - a, before, after)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert np.abs(change).max() == 0 or "attention" in name, name
    moved = jax.tree.map(lambda a, b: float(np.abs(b - a).max()), before, after)
    assert max(jax.tree.leaves(moved)) > 0
    run, merged = (
        build.load_pipeline(str(tmp_path / "run_lora")),
        OrbitPipeline.load(tmp_path / "merged"),
    )
    jax.tree.map(np.testing.assert_array_equal, run.params, merged.params)


@pytest.mark.parametrize("file", [paper_text, paper_image, paper_static3d])
def test_every_ablation_of_the_paper_is_one_difference(file):
    def flat(arg):
        return train._flatten(json.loads(file.get_config(arg).to_json()))

    base = flat("")
    assert (base["batch_size"], base["num_steps"]) == (128, 6000)
    assert base["optimizer.learning_rate"] == 3e-5
    changes = {
        "no_lmr": ("loss.omega", 0.0),
        "no_3d_cfg": ("guidance.w2", 0.0),
        "no_motion": ("network.motion_embedding", False),
        "no_static_mix": ("data.static_probability", 0.0),
    }
    assert changes.keys() == paper.ABLATIONS.keys()
    for name, (key, value) in changes.items():
        config = flat(f"ablation={name}")
        assert {k: v for k, v in config.items() if base.get(k) != v} == {key: value}
    with pytest.raises(ValueError, match=r"take ablation=no_lmr, .*, not 'ablation=no_ldm'"):
        file.get_config("ablation=no_ldm")
