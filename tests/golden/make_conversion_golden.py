"""Makes conversion.npz: what diffusers and transformers say to weights that were converted to them.

    pip install torch diffusers transformers
    python tests/golden/make_conversion_golden.py

Networks of this library with random parameters are written as folders, which the peers'
`from_pretrained` reads: no name may be missing or left over, and the parameters of the peers, drawn
here from the same seeds, come from nowhere else. The file holds the names and shapes of the peers'
state dicts and their outputs for fixed inputs. A .pth file is written and read by torch as well.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

_TESTS = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS), str(_TESTS.parent)]

from conversion_cases import PARITY, draw_sound, inputs  # noqa: E402
from flax.traverse_util import unflatten_dict  # noqa: E402

from d4d_jax import conversion  # noqa: E402


def peer_of(format: str, folder: pathlib.Path):
    """The peer's model of the folder, which has to fit it exactly."""
    import diffusers
    import transformers

    config = json.loads((folder / "config.json").read_text())
    name = config.get("_class_name") or config["architectures"][0]
    library = transformers if "architectures" in config else diffusers
    model, info = getattr(library, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), f"{format}: {info}"
    return model.eval()


def run(format: str, model) -> np.ndarray:
    """The peer's output, with channels last."""
    import torch

    data = {name: torch.from_numpy(value) for name, value in inputs(format).items()}

    def channels_first(x):
        return x.movedim(-1, 1)

    if format == "diffusers_t2v":
        x = channels_first(data["x_t"])
        y = model(x, data["timestep"], data["context"]).sample
    elif format == "diffusers_i2v":
        frames = data["x_t"].shape[1]
        position = (torch.arange(frames) / (frames - 1)).reshape(1, -1, 1, 1, 1)
        image = torch.where(position > 0, position, data["image"][:, None])
        y = model(
            channels_first(data["x_t"]),
            data["timestep"],
            fps=torch.full((len(data["x_t"]),), 8),
            image_latents=channels_first(image),
            image_embeddings=data["image_embedding"],
            encoder_hidden_states=data["context"],
        ).sample
    elif format == "diffusers_vae":
        y = model(channels_first(data["images"])).sample
    elif format == "transformers_text":
        out = model(input_ids=data["tokens"].long())
        return getattr(out, "text_embeds", out[0]).numpy()
    else:
        return model(pixel_values=channels_first(data["images"])).image_embeds.numpy()
    return y.movedim(1, -1).numpy()


def main() -> None:
    import torch

    golden: dict[str, np.ndarray] = {}
    for key, (format, network) in PARITY.items():
        params = unflatten_dict(draw_sound(network), sep="/")
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name) / "network"
            conversion.save(folder, params, format, network=network)
            model = peer_of(format, folder)
            # The names of the published files, which transformers 5 changes when it loads them.
            state = conversion.export(params, format)
            file = folder / "state.pth"
            conversion.save(file, params, format, network=network)
            saved = torch.load(file, weights_only=True)
        assert all(np.array_equal(saved[name], array) for name, array in state.items())
        assert saved.keys() == state.keys()
        if "transformers" not in format:
            model.load_state_dict(saved, strict=True)
            state = model.state_dict()
        shapes = {name: list(array.shape) for name, array in sorted(state.items())}
        golden[f"{key}/shapes"] = np.array(json.dumps(shapes))
        with torch.no_grad():
            output = run(format, model)
        golden[f"{key}/output"] = output
        print(f"{key}: {len(shapes)} tensors, output {output.shape}, std {output.std():.3f}")
    np.savez_compressed(pathlib.Path(__file__).with_name("conversion.npz"), **golden)


if __name__ == "__main__":
    main()
