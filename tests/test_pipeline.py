"""The image-to-orbit pipeline, with random weights and with the model that is shipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from d4d_jax import cameras, clips, metrics, pipeline
from d4d_jax.guidance import ClassifierFree, ThreeDAware
from d4d_jax.models import prompts, unet, vae
from d4d_jax.models.bundle import save_bundle
from d4d_jax.models.conditioning import Conditioning

CLIPS = pipeline.EMBEDDED.parent / "clips"

CONFIG = {
    "network": {
        "name": "unet",
        "width": 8,
        "multipliers": [1],
        "blocks": 1,
        "attention_levels": [],
        "init_heads": 0,
        "head_dim": 8,
        "context_dim": 0,
        "groups": 4,
        "image_concat": "all",
        "dropout": 0.0,
    },
    "codec": {"name": "patch_pca", "factor": 4, "dim": 8},
    "schedule": {"name": "cosine", "prediction": "x0"},
    "data": {"size": 16, "num_frames": 5},
}


@pytest.fixture(scope="module")
def parts():
    """Parameters of a small network and codec, none of them zero."""
    rng = np.random.default_rng(0)
    codec_params = vae.fit_patch_pca(rng.uniform(-1, 1, (20, 16, 16, 4)), 4, 8)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in CONFIG["network"].items()}
    del fields["name"]
    network = unet.SpatioTemporalUNet(in_channels=8, out_channels=8, **fields)
    conditioning = Conditioning(
        image=jnp.zeros((1, 4, 4, 8)), camera=jnp.zeros((1, 5, 4, 4)), motion=jnp.zeros(1)
    )
    shapes = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros((1, 5, 4, 4, 8)), jnp.zeros(1, int), conditioning
    )["params"]
    return jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype("f"), shapes), codec_params


@pytest.fixture(scope="module")
def toy(parts):
    return pipeline.OrbitPipeline.from_parts(*parts, CONFIG)


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).uniform(size=(16, 16, 4)).astype(np.float32)


def test_a_clip_comes_out(toy, image):
    clip = toy(image, num_steps=3, motion=4.0, caption="noise")
    assert clip.dynamic.shape == clip.static.shape == (5, 16, 16, 3)
    assert clip.dynamic_alpha.shape == (5, 16, 16)
    assert 0 <= clip.dynamic.min() < clip.dynamic.max() <= 1
    assert (clip.motion, clip.caption) == (4.0, "noise")
    expected = cameras.orbit(5, width=16, height=16)
    np.testing.assert_array_equal(clip.camera.world_to_camera, expected.world_to_camera)


def test_the_seed_decides(toy, image):
    first, again = (toy(image, num_steps=3, seed=7) for _ in range(2))
    np.testing.assert_array_equal(first.dynamic, again.dynamic)
    assert np.abs(toy(image, num_steps=3, seed=8).dynamic - first.dynamic).max() > 1e-3


def test_motion_zero_is_the_static_orbit(toy, image):
    still = toy(image, num_steps=3, motion=0.0)
    np.testing.assert_allclose(still.dynamic, still.static, atol=1e-5)
    moving = toy(image, num_steps=3, motion=8.0)
    np.testing.assert_allclose(moving.static, still.static, atol=1e-5)
    assert np.abs(moving.dynamic - moving.static).max() > 1e-3


def test_guidance_can_be_swapped(toy, image):
    """Twice the network's own scale under ThreeDAware is ClassifierFree's scale 2."""
    plain = dataclasses.replace(toy, guidance=ClassifierFree(2.0))
    bare = dataclasses.replace(toy, guidance=ThreeDAware(w1=1.0, w2=0.0))
    expected = bare(image, num_steps=3).dynamic
    np.testing.assert_allclose(plain(image, num_steps=3).dynamic, expected, atol=1e-5)
    assert np.abs(toy(image, num_steps=3).dynamic - expected).max() > 1e-4


def test_a_model_file_gives_the_same_clip(toy, parts, image, tmp_path):
    params, codec_params = parts
    halved = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params)
    save_bundle(tmp_path / "toy.npz", params, codec_params, CONFIG)
    loaded = pipeline.OrbitPipeline.load(tmp_path / "toy.npz")
    expected = dataclasses.replace(toy, params=halved)(image, num_steps=3)
    np.testing.assert_allclose(loaded(image, num_steps=3).dynamic, expected.dynamic, atol=1e-6)


def test_prompts_with_and_without_alpha_agree():
    alpha = np.zeros((20, 20, 1), np.float32)
    alpha[5:15, 8:12] = 1
    rgba = np.concatenate([np.full((20, 20, 3), 0.3, np.float32), alpha], -1)
    on_white = rgba[..., :3] * alpha + 1 - alpha
    np.testing.assert_allclose(
        prompts.prepare_image(rgba, 10), prompts.prepare_image(on_white, 10), atol=1e-6
    )


def test_prompts_are_padded_to_a_square():
    wide = np.zeros((10, 20, 3), np.float32)
    square = prompts.prepare_image(wide, 20)
    assert square.shape == (20, 20, 4)
    assert (square[5:15] == [-1, -1, -1, 1]).all()
    assert (square[:5] == [1, 1, 1, -1]).all() and (square[15:] == [1, 1, 1, -1]).all()


def test_bad_prompts(toy, image):
    with pytest.raises(ValueError, match=r"must be 0 or more; got -1"):
        toy(image, motion=-1.0)
    with pytest.raises(ValueError, match=r"3 channels \(RGB\) or 4 \(RGBA\); this one has 1"):
        toy(image[..., :1])
    with pytest.raises(ValueError, match="between 1 and the schedule's 1000 steps, not 0"):
        toy(image, num_steps=0)
    with pytest.raises(FileNotFoundError, match=r"no model file .*absent\.npz"):
        pipeline.OrbitPipeline.load("absent.npz")


@pytest.fixture(scope="module")
def embedded():
    return pipeline.OrbitPipeline.load()


@pytest.mark.parametrize("name", ["rabbit", "knight"])
def test_the_embedded_model_orbits_and_moves(embedded, name):
    """On shipped prompts it shows the object from the right side, in the right pose."""
    truth = clips.read_clip(CLIPS / name)
    prompt = clips.read_image(CLIPS / name / "multi_frame0.png")
    clip = embedded(prompt, motion=truth.motion, num_steps=12)

    def score(frames):
        return float(metrics.psnr(jnp.asarray(clip.dynamic), jnp.asarray(frames)).mean())

    right = score(truth.dynamic)
    assert right > 20
    assert right > score(truth.static) + 1, "the object does not move as its clip does"
    assert right > score(np.roll(truth.dynamic, 8, axis=0)) + 3, "the views are off"
    assert pipeline.EMBEDDED.stat().st_size < 4_000_000
