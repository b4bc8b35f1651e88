"""The autoencoder against diffusers, CLIP's towers against transformers, tokens against open_clip.

Weights are drawn by the peers' names, all of them, and converted. The peers have been run by
tests/golden/make_vae_clip_golden.py.
"""

import functools
import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import make_vae_clip_golden as golden

from d4d_jax.conversion.weights import convert, export
from d4d_jax.models.autoencoder_kl import AutoencoderKL
from d4d_jax.models.clip import ImageEncoder, TextEncoder
from d4d_jax.models.tokenizer import load_tokenizer

pytestmark = pytest.mark.parity

TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def data():
    with np.load(pathlib.Path(golden.__file__).with_name("vae_clip.npz")) as archive:
        return dict(archive)


def drawn(module, format, *inputs, **options):
    """Parameters with the peer's values, drawn under its names and converted."""
    init = functools.partial(module.init, **options)
    template = jax.eval_shape(init, jax.random.key(0), *inputs)["params"]
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), template)
    names = export(zeros, format)
    state = {name: golden.draw(name, array.shape) for name, array in names.items()}
    return convert(state, format, template)


def scalar(output):
    return jnp.vdot(golden.weights(output.shape), output)


def assert_close(value, wanted, relative=None):
    """Within 5e-5 at a spread near 1, or within a share of the largest gradient."""
    assert np.std(wanted) > (0.1 if relative is None else 0.0)
    atol = TOLERANCE if relative is None else relative * np.abs(wanted).max()
    np.testing.assert_allclose(value, wanted, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def autoencoder():
    model = AutoencoderKL(**golden.VAE)
    return model, {"params": drawn(model, "diffusers_vae", golden.images(golden.SIZES[0]))}


def test_encoder(data, autoencoder):
    model, variables = autoencoder
    size = golden.SIZES[0]

    def encode(images):
        mean, logvar = model.apply(variables, images, method="posterior")
        return scalar(jnp.concatenate([mean, logvar], -1)), (mean, logvar)

    run = jax.jit(jax.grad(encode, has_aux=True))
    gradient, (mean, logvar) = run(golden.images(size))
    assert_close(mean, data[f"vae/{size[1]}/mean"])
    assert_close(logvar, data[f"vae/{size[1]}/logvar"])
    assert_close(gradient, data[f"vae/{size[1]}/encode_gradient"], 1e-3)


def test_decoder(data, autoencoder):
    model, variables = autoencoder
    size = golden.SIZES[0]

    def decode(latents):
        images = model.apply(variables, latents, method="decode")
        return scalar(images), images

    gradient, images = jax.jit(jax.grad(decode, has_aux=True))(golden.latents(size))
    assert_close(images, data[f"vae/{size[1]}/decoded"])
    assert_close(gradient, data[f"vae/{size[1]}/decode_gradient"], 1e-3)


def test_autoencoder_at_another_size(data, autoencoder):
    model, variables = autoencoder
    size = golden.SIZES[1]
    mean = model.apply(variables, golden.images(size), method="encode") / model.scale
    assert_close(mean, data[f"vae/{size[1]}/mean"])
    images = model.apply(variables, golden.latents(size), method="decode")
    assert_close(images, data[f"vae/{size[1]}/decoded"])


@pytest.mark.parametrize("activation", golden.ACTIVATIONS)
def test_text_encoder(data, activation):
    key = f"text/{activation}"
    fields = {"activation": activation, "projection": golden.IMAGE["projection"]}
    whole = TextEncoder(**golden.TEXT, **fields, skip_last=0)
    tokens = golden.tokens()
    params = drawn(whole, "transformers_text", tokens, pooled=True)
    run = jax.jit(whole.apply, static_argnames="pooled")
    assert_close(run({"params": params}, tokens), data[f"{key}/last"])
    assert_close(run({"params": params}, tokens, pooled=True), data[f"{key}/pooled"])

    penultimate = TextEncoder(**golden.TEXT, **fields)

    def context(table):
        embedded = params | {"token_embedding": {"embedding": table}}
        output = penultimate.apply({"params": embedded}, tokens)
        return scalar(output), output

    table = params["token_embedding"]["embedding"]
    gradient, output = jax.jit(jax.grad(context, has_aux=True))(table)
    assert_close(output, data[f"{key}/penultimate"])
    assert_close(gradient, data[f"{key}/gradient"], 1e-3)


@pytest.mark.parametrize("activation", golden.ACTIVATIONS)
def test_image_encoder(data, activation):
    model = ImageEncoder(**golden.IMAGE, activation=activation)
    images = golden.images((2, golden.IMAGE["size"], golden.IMAGE["size"]))
    variables = {"params": drawn(model, "transformers_image", images)}

    def embed(images):
        embedding = model.apply(variables, images)
        return scalar(embedding), embedding

    gradient, embedding = jax.jit(jax.grad(embed, has_aux=True))(images)
    assert_close(embedding, data[f"image/{activation}/embedding"])
    assert_close(gradient, data[f"image/{activation}/gradient"], 1e-3)


def vocabulary_of(data, specials):
    """Reachable part of CLIP's vocabulary with its published ids, and the merges."""
    vocabulary = json.loads(str(data["tokens/vocabulary"]))
    *others, start, end = vocabulary
    names = [*others, *(specials or (start, end))]
    ids = dict(zip(names, vocabulary.values(), strict=True))
    return ids, json.loads(str(data["tokens/merges"]))


@pytest.mark.parametrize(
    "specials", [None, ("<|startoftext|>", "<|endoftext|>")], ids=["open_clip", "transformers"]
)
def test_published_ids(data, tmp_path, specials):
    vocabulary, merges = vocabulary_of(data, specials)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text(golden.merge_file(merges))
    tokenize = load_tokenizer(tmp_path)
    np.testing.assert_array_equal(tokenize(golden.TEXTS), data["tokens/open_clip"])
    plain = load_tokenizer(tmp_path, pad="end", clean=False)
    np.testing.assert_array_equal(plain(golden.TEXTS), data["tokens/transformers"])


def test_file_of_merges(data, tmp_path):
    """A file without ids numbers its tokens as open_clip does."""
    _, merges = vocabulary_of(data, None)
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(golden.merge_file(merges).encode()))
    np.testing.assert_array_equal(load_tokenizer(path)(golden.TEXTS), data["tokens/renumbered"])


def test_known_ids(data):
    """Facts of the published vocabulary."""
    tokens = data["tokens/open_clip"]
    assert (tokens[:, 0] == 49406).all() and tokens.max() == 49407
    assert tokens[0, :3].tolist() == [49406, 320, 12952]  # "a panda"
    assert tokens[5, -1] == 49407 and (tokens[5] > 0).all()  # cut
