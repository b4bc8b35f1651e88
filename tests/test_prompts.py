"""Prompts of words and of images, and pipelines of converted weights, of toy size."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_tokenizer import merge_text

from d4d_jax import cameras, conversion, pipeline
from d4d_jax.models import clip, prompts
from d4d_jax.models.autoencoder_kl import KLCodec
from d4d_jax.models.conditioning import Conditioning
from d4d_jax.models.tokenizer import load_tokenizer
from d4d_jax.models.unet import SpatioTemporalUNet
from d4d_jax.models.variants import VARIANTS
from d4d_jax.presets import PRESETS

FRAMES, SIZE = 3, 16
NETWORK = {
    "width": 8,
    "multipliers": (1, 2),
    "blocks": 1,
    "attention_levels": (0,),
    "head_dim": 8,
    "init_heads": 1,
    "init_head_dim": 8,
    "context_dim": 64,
    "groups": 4,
}
TOWERS = clip.VARIANTS["tiny"]


def randomised(init, seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init)
    return jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes)


def network_params(variant):
    model = SpatioTemporalUNet(**VARIANTS[variant] | NETWORK)
    conditioning = Conditioning(
        image=jnp.zeros((1, 2, 2, 4)),
        image_embedding=jnp.zeros((1, 64)),
        context=jnp.zeros((1, 77, 64)),
        camera=jnp.zeros((1, FRAMES, 4, 4)),
    )
    x = jnp.zeros((1, FRAMES, 2, 2, 4))
    arguments = (jax.random.key(0), x, jnp.zeros(1, int), conditioning)
    return randomised(lambda: model.init(*arguments)["params"], 0)


@pytest.fixture(scope="module")
def towers():
    text, image = clip.TextEncoder(**TOWERS["text"]), clip.ImageEncoder(**TOWERS["image"])
    key, pixels = jax.random.key(0), jnp.zeros((1, 64, 64, 3))
    return {
        "text": randomised(lambda: text.init(key, jnp.zeros((1, 77), int))["params"], 1),
        "image": randomised(lambda: image.init(key, pixels)["params"], 2),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory, towers):
    """A model folder for every preset, with networks of toy size."""
    codec = randomised(lambda: KLCodec("tiny").init(jax.random.key(0)), 3)
    made = {}
    for preset in PRESETS:
        folder = tmp_path_factory.mktemp(preset)
        conversion.save(folder / "network.safetensors", network_params(preset))
        conversion.save(folder / "codec.safetensors", codec)
        for name, params in towers.items():
            conversion.save(folder / f"{name}.safetensors", params)
        (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(merge_text().encode()))
        own = {
            "preset": preset,
            "network": {"name": "unet", "variant": preset, **NETWORK},
            "codec": {"name": "kl", "variant": "tiny"},
            "data": {"size": SIZE, "num_frames": FRAMES},
            "prompt": PRESETS[preset]["prompt"] | {"variant": "tiny"},
        }
        (folder / "model.json").write_text(json.dumps(own))
        made[preset] = folder
    return made


@pytest.fixture
def image():
    return np.random.default_rng(1).uniform(size=(20, 16, 4)).astype(np.float32)


def to_latents(images):
    return images[:, ::8, ::8]


def test_words_become_the_context_and_its_negative(folders, towers):
    vocabulary = str(folders["videomv_t2v"] / "bpe_simple_vocab_16e6.txt.gz")
    encoder = prompts.TextPrompt(variant="tiny", vocabulary=vocabulary)
    told = encoder.encode(towers, "red panda", size=SIZE, to_latents=to_latents)
    tokens = load_tokenizer(vocabulary)(["red panda, 3d asset", prompts.NEGATIVE])
    model = clip.TextEncoder(**TOWERS["text"])
    expected = model.apply({"params": towers["text"]}, tokens)
    np.testing.assert_allclose(told.context, expected[:1], atol=1e-5)
    np.testing.assert_allclose(told.null_context, expected[1:], atol=1e-5)
    assert told.image is None and told.image_embedding is None


def test_an_image_becomes_latent_embedding_and_an_empty_caption(folders, towers, image):
    vocabulary = str(folders["videomv_t2v"] / "bpe_simple_vocab_16e6.txt.gz")
    encoder = prompts.ImageTextPrompt(variant="tiny", vocabulary=vocabulary)
    told = encoder.encode(towers, image, size=SIZE, to_latents=to_latents)
    prepared = prompts.prepare_image(image, SIZE)
    np.testing.assert_array_equal(told.image, prepared[None, ::8, ::8])
    pixels = clip.preprocess_image((prepared[None, ..., :3] + 1) / 2, 64)
    model = clip.ImageEncoder(**TOWERS["image"])
    expected = model.apply({"params": towers["image"]}, pixels)
    np.testing.assert_allclose(told.image_embedding, expected, atol=1e-5)
    empty = encoder.encode_texts(towers["text"], [""])
    np.testing.assert_allclose(told.context, empty, atol=1e-5)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_folder_of_weights_generates(folders, preset, image):
    model = pipeline.OrbitPipeline.load(folders[preset])
    by_words = preset.endswith("t2v")
    clip_ = model("red panda" if by_words else image, num_steps=2)
    assert clip_.static.shape == (FRAMES, SIZE, SIZE, 3) and np.ptp(clip_.static) > 0.05
    assert clip_.caption == ("red panda" if by_words else "")
    if preset.startswith("diffusion4d"):
        assert np.abs(clip_.dynamic - clip_.static).max() > 1e-5
        orbit = cameras.orbit(FRAMES, width=SIZE, height=SIZE)
    else:
        assert clip_.dynamic is None and clip_.motion is None and not model.moves
        orbit = cameras.orbit(FRAMES, width=SIZE, height=SIZE, **PRESETS[preset]["orbit"])
    np.testing.assert_array_equal(clip_.camera.world_to_camera, orbit.world_to_camera)
    other = model("a rabbit" if by_words else 1 - image, num_steps=2)
    assert np.abs(other.static - clip_.static).max() > 1e-5


def test_videomv_orbits_start_on_the_x_axis_and_do_not_close():
    orbit = cameras.orbit(24, **PRESETS["videomv_t2v"]["orbit"])
    eyes = orbit.opengl_camera_to_world[:, :3, 3]
    angle = np.radians(15)  # of the elevation, and of every step
    np.testing.assert_allclose(eyes[0], [2 * np.cos(angle), 0, 2 * np.sin(angle)], atol=1e-6)
    steps = np.diff(np.unwrap(np.arctan2(eyes[:, 1], eyes[:, 0])))
    np.testing.assert_allclose(steps, angle, atol=1e-6)


def test_the_file_of_the_network_tells_the_preset(folders, tmp_path):
    """experiments.convert writes the variant into its file; a model.json is not needed then."""
    target = tmp_path / "network.safetensors"
    source = folders["videomv_i2v"] / "network.safetensors"
    target.write_bytes(source.read_bytes())
    with pytest.raises(ValueError, match=r"does not say what its weights are \(None\)"):
        pipeline.OrbitPipeline.load(tmp_path)
    (tmp_path / "model.json").write_text('{"preset": "videomv"}')
    with pytest.raises(ValueError, match=r"\('videomv'\): write .* one of videomv_t2v, "):
        pipeline.OrbitPipeline.load(tmp_path)


def test_the_wrong_kind_of_prompt_is_refused(folders, image):
    with pytest.raises(ValueError, match="prompted by a sentence, not by an image"):
        pipeline.OrbitPipeline.load(folders["videomv_t2v"])(image)
    with pytest.raises(ValueError, match="by an image, not by the sentence 'a fox'"):
        pipeline.OrbitPipeline.load(folders["videomv_i2v"])("a fox")
    with pytest.raises(ValueError, match="by an image, not by the sentence 'a fox'"):
        pipeline.OrbitPipeline.load()("a fox")
    with pytest.raises(ValueError, match="Unknown CLIP 'vit_g'; known: vit_h_14"):
        encoder = dataclasses.replace(
            pipeline.OrbitPipeline.load(folders["videomv_t2v"]).prompt, variant="vit_g"
        )
        encoder.encode({"text": {}}, "a fox", size=SIZE, to_latents=to_latents)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no model .* neither network\.safetensors nor"):
        pipeline.OrbitPipeline.load(tmp_path)
