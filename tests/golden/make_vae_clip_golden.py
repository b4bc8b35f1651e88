"""Makes vae_clip.npz: outputs of diffusers' AutoencoderKL and transformers' CLIP, and token ids.

    pip install torch diffusers transformers ftfy && pip install --no-deps open_clip_torch
    python tests/golden/make_vae_clip_golden.py

Every tensor is drawn from a generator seeded by its name, so the file holds inputs and outputs
only and the test draws the same weights. Of CLIP's vocabulary it holds what the texts below can
reach: no other merge can apply to them, so their ids are those of the whole vocabulary. open_clip's
package is not imported, only the file with its tokenizer: the rest needs torchvision.
"""

import gzip
import importlib.util
import json
import pathlib
import tempfile
import zlib

import numpy as np

VAE = {"width": 16, "multipliers": (1, 2, 3, 4), "blocks": 2, "groups": 8}
TEXT = {
    "width": 64,
    "layers": 4,
    "heads": 4,
    "mlp": 96,
    "vocabulary": 100,
    "positions": 12,
}
IMAGE = {
    "width": 48,
    "layers": 3,
    "heads": 3,
    "mlp": 96,
    "patch": 7,
    "size": 28,
    "projection": 40,
}
ACTIVATIONS = ("gelu", "quick_gelu")
SIZES = ((2, 40, 24), (1, 16, 64))  # images of the autoencoder: number, height, width

TEXTS = (
    "a panda dancing, 3d asset",
    "",
    "Café naïve  ÜBER'S don't we'll 123 4.5!!",
    "日本語 한국어 🎉🐼 русский текст",
    "&amp;lt;b&gt; tab\tnew\nline\u00a0nbsp",
    "the quick brown fox jumps over the lazy dog " * 12,
    "“curly” ﬁ a\u0301 ½ ²",
    "worst quality, normal quality, low quality, blurry, nsfw",
)

_FOLDER = pathlib.Path(__file__).parent
_LEVELS = len(VAE["multipliers"])


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random tensor of a torch name and shape, scaled to keep activations of order one."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(("token_embedding.weight", "position_embedding.weight")):
        values *= 0.5
    elif len(shape) > 1:
        values *= np.sqrt(1.5 / np.prod(shape[1:]))
    else:
        values = 0.2 * values + name.endswith("weight")
    return values.astype(np.float32)


def images(size: tuple[int, int, int]) -> np.ndarray:
    """Random images in [-1, 1]; of the autoencoder (n, h, w, 3)."""
    return np.random.default_rng(sum(size)).uniform(-1, 1, (*size, 3)).astype(np.float32)


def latents(size: tuple[int, int, int]) -> np.ndarray:
    n, h, w = size
    shape = (n, h // 8, w // 8, 4)
    return np.random.default_rng(h).standard_normal(shape).astype(np.float32)


def tokens() -> np.ndarray:
    """Ids (3, 12) whose highest, the end of the text, stands at several places."""
    ids = np.random.default_rng(5).integers(1, 98, (3, TEXT["positions"]))
    for row, end in enumerate((4, 11, 7)):
        ids[row, end:] = 0
        ids[row, end] = 99
    return ids.astype(np.int32)


def weights(shape: tuple[int, ...]) -> np.ndarray:
    """Of the scalar whose gradient is compared: sum(weights * output)."""
    values = np.random.default_rng(len(shape)).standard_normal(shape)
    return (values / np.sqrt(values.size)).astype(np.float32)


def _randomised(model):
    import torch

    state = {k: torch.from_numpy(draw(k, tuple(v.shape))) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def _gradient(output, source) -> np.ndarray:
    import torch

    (output * torch.from_numpy(weights(tuple(output.shape)))).sum().backward()
    return source.grad.numpy()


def _autoencoder() -> dict[str, np.ndarray]:
    """Channels last, as is everything in the file."""
    import torch
    from diffusers import AutoencoderKL

    model = AutoencoderKL(
        block_out_channels=[VAE["width"] * m for m in VAE["multipliers"]],
        down_block_types=("DownEncoderBlock2D",) * _LEVELS,
        up_block_types=("UpDecoderBlock2D",) * _LEVELS,
        layers_per_block=VAE["blocks"],
        norm_num_groups=VAE["groups"],
    )
    model = _randomised(model)
    data = {}
    for size in SIZES:
        key = f"vae/{size[1]}"
        x = torch.from_numpy(images(size)).requires_grad_()
        posterior = model.encode(x.permute(0, 3, 1, 2)).latent_dist
        mean, logvar = (y.permute(0, 2, 3, 1) for y in (posterior.mean, posterior.logvar))
        z = torch.from_numpy(latents(size)).requires_grad_()
        decoded = model.decode(z.permute(0, 3, 1, 2) / 0.18215).sample.permute(0, 2, 3, 1)
        if size == SIZES[0]:
            data[f"{key}/encode_gradient"] = _gradient(torch.cat([mean, logvar], -1), x)
            data[f"{key}/decode_gradient"] = _gradient(decoded, z)
        for name, value in (("mean", mean), ("logvar", logvar), ("decoded", decoded)):
            data[f"{key}/{name}"] = value.detach().numpy()
    return data


def _towers() -> dict[str, np.ndarray]:
    import torch
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    def sizes(fields: dict[str, int]) -> dict[str, int]:
        return {
            "hidden_size": fields["width"],
            "num_hidden_layers": fields["layers"],
            "num_attention_heads": fields["heads"],
            "intermediate_size": fields["mlp"],
        }

    data = {}
    for activation in ACTIVATIONS:
        ids = {"vocab_size": TEXT["vocabulary"], "bos_token_id": 98, "eos_token_id": 99}
        config = CLIPTextConfig(
            **sizes(TEXT),
            **ids,
            max_position_embeddings=TEXT["positions"],
            hidden_act=activation,
            projection_dim=IMAGE["projection"],
        )
        model = _randomised(CLIPTextModelWithProjection(config))
        embed = model.text_model.embeddings.token_embedding
        out = model(torch.from_numpy(tokens()).long(), output_hidden_states=True)
        penultimate = model.text_model.final_layer_norm(out.hidden_states[-2])
        weight = torch.from_numpy(weights(tuple(penultimate.shape)))
        (penultimate * weight).sum().backward()
        data[f"text/{activation}/penultimate"] = penultimate.detach().numpy()
        data[f"text/{activation}/last"] = out.last_hidden_state.detach().numpy()
        data[f"text/{activation}/pooled"] = out.text_embeds.detach().numpy()
        data[f"text/{activation}/gradient"] = embed.weight.grad.numpy()

        config = CLIPVisionConfig(
            **sizes(IMAGE),
            patch_size=IMAGE["patch"],
            image_size=IMAGE["size"],
            hidden_act=activation,
            projection_dim=IMAGE["projection"],
        )
        model = _randomised(CLIPVisionModelWithProjection(config))
        x = torch.from_numpy(images((2, IMAGE["size"], IMAGE["size"]))).requires_grad_()
        out = model(x.permute(0, 3, 1, 2)).image_embeds
        data[f"image/{activation}/gradient"] = _gradient(out, x)
        data[f"image/{activation}/embedding"] = out.detach().numpy()
    return data


def _open_clip():
    """The module `open_clip.tokenizer`, and the path of the vocabulary beside it."""
    package = importlib.util.find_spec("open_clip")
    folder = pathlib.Path(package.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, folder / "bpe_simple_vocab_16e6.txt.gz"


def _tokens() -> dict[str, np.ndarray]:
    from transformers import CLIPTokenizer

    module, path = _open_clip()
    whole = module.SimpleTokenizer(str(path))
    ids = whole(list(TEXTS)).numpy()
    spellings = [*map(module._clean_lower, TEXTS), *map(str.lower, TEXTS)]
    words = {word for text in spellings for word in whole.pat.findall(text)}
    spelt = ["".join(whole.byte_encoder[b] for b in word.encode()) + "</w>" for word in words]
    reachable = "\n".join(spelt)
    merges = [pair for pair in whole.bpe_ranks if "".join(pair) in reachable]
    *others, start, end = whole.encoder
    names = [*others[:512], *map("".join, merges), start, end]
    vocabulary = {name: whole.encoder[name] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        small = pathlib.Path(folder) / "small.txt.gz"
        small.write_bytes(gzip.compress(merge_file(merges).encode()))
        renumbered = module.SimpleTokenizer(str(small))(list(TEXTS)).numpy()
    published = [*others, "<|startoftext|>", "<|endoftext|>"]
    published = {name: i for i, name in enumerate(published)}
    fast = CLIPTokenizer(published, list(whole.bpe_ranks))
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    return {
        "tokens/open_clip": ids.astype(np.int32),
        "tokens/renumbered": renumbered.astype(np.int32),
        "tokens/transformers": np.array(fast(list(TEXTS), **options)["input_ids"], np.int32),
        "tokens/vocabulary": np.array(json.dumps(vocabulary)),
        "tokens/merges": np.array(json.dumps(merges)),
    }


def merge_file(merges: list[tuple[str, str]]) -> str:
    """Contents of a file of merges: a title line, then a pair a line."""
    return "\n".join(["#version: 0.2", *map(" ".join, merges)])


def main() -> None:
    data = _autoencoder() | _towers() | _tokens()
    np.savez_compressed(_FOLDER / "vae_clip.npz", **data)


if __name__ == "__main__":
    main()
