"""The clips of a configuration, and what a network is told of them."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np

import d4d_jax
from d4d_jax import registry
from d4d_jax.data import records
from d4d_jax.data.pipeline import ClipSource, make_dataset
from d4d_jax.objective import TOLD
from d4d_jax.pipeline import OrbitPipeline
from d4d_jax.typing import PyTree

Config = Mapping[str, Any]  # an ml_collections.ConfigDict, or the plain dict saved from one

#: The clips that are shipped with the package.
EMBEDDED_CLIPS = Path(d4d_jax.__file__).parent / "assets" / "clips"


def build_source(config: Config, *, frames: bool = False) -> ClipSource:
    """Returns the clips of `data.path`, or the shipped ones when that is empty.

    Of a data set that holds latents (`experiments.encode`) these are read, unless `frames` is set.

    Raises:
        FileNotFoundError, ValueError: the named folder or file holds no usable clips.
    """
    return build_clips(config, config["data"]["path"] or EMBEDDED_CLIPS, "train", frames=frames)


def build_clips(
    config: Config, path: str | os.PathLike, split: str, *, frames: bool = False
) -> ClipSource:
    """Returns the clips of a folder, or of a split of a data set: its latents, if it has any."""
    data, source = config["data"], path
    if records.is_dataset(path):
        views = ("dynamic", "static") if frames or not _has_latents(path) else records.LATENTS
        source = records.Records(path, split, views=views)
    return ClipSource(source, size=data["size"], max_corrupt=data["max_corrupt"])


def _has_latents(path: str | os.PathLike) -> bool:
    return (Path(path) / "dataset.json").exists() and "latents" in records.read_index(path)


def build_dataset(config: Config, source: ClipSource) -> grain.IterDataset:
    """Returns the endless dataset of batches of the clips, without the captions.

    Raises:
        ValueError: a value is out of its range.
    """
    dataset = make_dataset(
        source,
        batch_size=config["batch_size"] // jax.process_count(),
        seed=config["seed"],
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
        static_probability=config["data"]["static_probability"],
        keys=True,
    )
    return dataset.map(without_caption)


def example_batch(source: ClipSource) -> PyTree:
    """Returns a batch of the first clip alone, shaped otherwise as those of `build_dataset`."""
    return {name: np.asarray(value)[None] for name, value in without_caption(source[0]).items()}


def without_caption(batch: PyTree) -> PyTree:
    """Returns what goes to the devices of a batch, or of an element."""
    return {name: value for name, value in batch.items() if name != "caption"}


def tell(source: ClipSource, base: OrbitPipeline) -> ClipSource:
    """Returns the clips with what the prompt encoder of the base says of their prompts.

    A prompt is the caption, or the first frame. Every one is encoded once, here, unless that came
    with the latents.

    Raises:
        ValueError: captions are asked for and a clip has none; or the latents came with what
            another prompt encoder says.
    """
    if source.latents is None:
        return source.extended(
            [prompt_entries(clip, base, f"Clip {i}") for i, clip in enumerate(source)]
        )
    if base.prompt_params and source.latents["prompt"] != describe("prompt", base.prompt):
        raise ValueError(
            f"The latents in {source.latents['folder']} came with prompts by"
            f" {source.latents['prompt']}, but the model has {describe('prompt', base.prompt)}:"
            " encode the data with --checkpoint set to that model."
        )
    return source


def prompt_entries(
    clip: Mapping[str, Any], base: OrbitPipeline, name: str = "A clip"
) -> dict[str, np.ndarray]:
    """Returns the entries in `TOLD` that the prompt encoder of the base makes of a clip.

    Args:
        clip: see `d4d_jax.data.pipeline.element`.
        base: whose encoder it is.
        name: of the clip, for messages.

    Raises:
        ValueError: the caption is asked for and there is none.
    """
    by_caption = base.prompt.reads == "text"
    prompt = str(clip["caption"]) if by_caption else straight((clip["dynamic"][0] + 1) / 2)
    if by_caption and not prompt:
        raise ValueError(f"{name} has no caption, which this model is prompted by.")
    conditioning = base.prompt.encode(
        base.prompt_params, prompt, size=base.size, to_latents=lambda image: image
    )
    values = {name: getattr(conditioning, name) for name in TOLD}
    return {name: np.asarray(value[0]) for name, value in values.items() if value is not None}


def describe(family: str, component: Any) -> dict[str, Any]:
    """Returns the sub-configuration of a component that is a dataclass."""
    kind = type(component)
    known = (name for name in registry.names(family) if registry.lookup(family, name) is kind)
    name = next(known, f"{kind.__module__}:{kind.__qualname__}")
    return {"name": name, **dataclasses.asdict(component)}


def straight(on_white: np.ndarray) -> np.ndarray:
    """RGBA with straight colour, as image files have it, of colour on white and alpha."""
    colour, alpha = on_white[..., :3], on_white[..., 3:]
    straight = 1 - (1 - colour) / np.maximum(alpha, 1e-6)
    return np.concatenate([np.clip(straight, 0, 1), alpha], -1)
