"""Prompts of words and of images, and pipelines of converted weights, of toy size."""

import dataclasses
import functools

import numpy as np
import pytest
from model_folders import FRAMES, SIZE, TOWERS, towers, write_folder

from d4d_jax import cameras, pipeline
from d4d_jax.data import synthetic
from d4d_jax.models import clip, prompts
from d4d_jax.models.tokenizer import load_tokenizer
from d4d_jax.presets import PRESETS


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder for every preset, with networks of toy size."""
    made = {preset: tmp_path_factory.mktemp(preset) for preset in PRESETS}
    for preset, folder in made.items():
        write_folder(folder, preset)
    return made


@pytest.fixture
def image():
    return np.random.default_rng(1).uniform(size=(20, 16, 4)).astype(np.float32)


def to_latents(images):
    return images[:, ::8, ::8]


def test_words_become_the_context_and_its_negative(folders):
    vocabulary = str(folders["videomv_t2v"] / "bpe_simple_vocab_16e6.txt.gz")
    encoder = prompts.TextPrompt(variant="tiny", vocabulary=vocabulary)
    told = encoder.encode(towers(), "red panda", size=SIZE, to_latents=to_latents)
    tokens = load_tokenizer(vocabulary)(["red panda, 3d asset", prompts.NEGATIVE])
    model = clip.TextEncoder(**TOWERS["text"])
    expected = model.apply({"params": towers()["text"]}, tokens)
    np.testing.assert_allclose(told.context, expected[:1], atol=1e-5)
    np.testing.assert_allclose(told.null_context, expected[1:], atol=1e-5)
    assert told.image is None and told.image_embedding is None


def test_an_image_becomes_latent_embedding_and_an_empty_caption(folders, image):
    vocabulary = str(folders["videomv_t2v"] / "bpe_simple_vocab_16e6.txt.gz")
    encoder = prompts.ImageTextPrompt(variant="tiny", vocabulary=vocabulary)
    told = encoder.encode(towers(), image, size=SIZE, to_latents=to_latents)
    prepared = prompts.prepare_image(image, SIZE)
    np.testing.assert_array_equal(told.image, prepared[None, ::8, ::8])
    pixels = clip.preprocess_image((prepared[None, ..., :3] + 1) / 2, 64)
    model = clip.ImageEncoder(**TOWERS["image"])
    expected = model.apply({"params": towers()["image"]}, pixels)
    np.testing.assert_allclose(told.image_embedding, expected, atol=1e-5)
    empty = encoder.encode_texts(towers()["text"], [""])
    np.testing.assert_allclose(told.context, empty, atol=1e-5)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_folder_of_weights_generates(folders, preset, image):
    model = pipeline.OrbitPipeline.load(folders[preset])
    by_words = preset.endswith("t2v")
    generate = functools.partial(model, num_steps=2)
    if PRESETS[preset]["network"]["variant"].endswith("static3d"):
        asset = synthetic.make_clip(0, num_frames=FRAMES, size=SIZE)
        generate = functools.partial(generate, asset=asset)
    clip_ = generate("red panda" if by_words else image)
    assert clip_.static.shape == (FRAMES, SIZE, SIZE, 3) and np.ptp(clip_.static) > 0.05
    assert clip_.caption == ("red panda" if by_words else "")
    if preset.startswith("diffusion4d"):
        assert np.abs(clip_.dynamic - clip_.static).max() > 1e-5
        orbit = cameras.orbit(FRAMES, width=SIZE, height=SIZE)
    else:
        assert clip_.dynamic is None and clip_.motion is None and not model.moves
        orbit = cameras.orbit(FRAMES, width=SIZE, height=SIZE, **PRESETS[preset]["orbit"])
    np.testing.assert_array_equal(clip_.camera.world_to_camera, orbit.world_to_camera)
    other = generate("a rabbit" if by_words else 1 - image)
    one, two = ((c.static if c.dynamic is None else c.dynamic) for c in (clip_, other))
    assert np.abs(one - two).max() > 1e-5


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


def test_missing_towers_are_named(folders, image):
    for preset, prompt, name in (("videomv_t2v", "a fox", "text"), ("videomv_i2v", image, "image")):
        model = pipeline.OrbitPipeline.load(folders[preset])
        towers = {key: value for key, value in model.prompt_params.items() if key != name}
        with pytest.raises(ValueError, match=rf"read by CLIP, but its weights, {name}\.safetens"):
            dataclasses.replace(model, prompt_params=towers)(prompt, num_steps=1)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no model .* neither network\.safetensors nor"):
        pipeline.OrbitPipeline.load(tmp_path)
