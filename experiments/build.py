"""Turns a configuration into objects: the only place that knows both.

Network, codec and schedule are sub-configurations with a `name`, looked up in `d4d_jax.registry`
(or imported, when written "package.module:Attr"); their other keys are constructor arguments.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax import Array
from jax.sharding import Mesh

from d4d_jax import conversion, media, registry
from d4d_jax.data import records
from d4d_jax.data.pipeline import ClipSource
from d4d_jax.models import autoencoder_kl, unet, vae, variants  # noqa: F401 (they register names)
from d4d_jax.motion import MotionCondition
from d4d_jax.objective import DiffusionObjective
from d4d_jax.pipeline import OrbitPipeline, load_prompt_params
from d4d_jax.schedules import NoiseSchedule
from d4d_jax.train import lora, sharding
from d4d_jax.train.checkpoint import Checkpointer
from d4d_jax.train.optimizer import learning_rate, make_optimizer
from d4d_jax.train.state import TrainState, create_state
from d4d_jax.train.step import LossFn, Metrics
from d4d_jax.train.validation import Validation
from d4d_jax.typing import Codec, PyTree
from experiments import inputs
from experiments.inputs import Config

Told = Callable[[ClipSource], ClipSource]

#: Parameters of the codec, beside the latents that it made.
CODEC_FILE = "codec.safetensors"

#: What `build_sampler` shows: the number of clips, and the sampling steps of each.
SAMPLED_CLIPS, SAMPLING_STEPS = 2, 20


def build_schedule(config: Config) -> NoiseSchedule:
    """Returns the noise schedule.

    Raises:
        ValueError: a wrong name or argument.
    """
    return registry.build("schedule", config["schedule"])


def build_codec(config: Config) -> Codec:
    """Returns the latent codec; its parameters are arrays of the run.

    Raises:
        ValueError: a wrong name or argument.
    """
    return registry.build("codec", config["codec"])


def build_network(config: Config, channels: int) -> Any:
    """Returns the network for latents with that many channels.

    Raises:
        ValueError: a wrong name or argument.
    """
    sizes = {"in_channels": channels, "out_channels": channels}
    return registry.build("network", variants.expand(dict(config["network"])) | sizes)


def latent_channels(codec: Codec, codec_params: PyTree, batch: PyTree) -> int:
    """Returns the number of channels of the latents of a batch; nothing is computed."""
    if records.LATENTS[0] in batch:
        return batch[records.LATENTS[0]].shape[-1]
    return jax.eval_shape(codec.encode, codec_params, batch["dynamic"]).shape[-1]


def load_base(config: Config) -> OrbitPipeline | None:
    """Returns the model that the run starts from, `init_from`; None when that is empty.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it is damaged, or its codec is not the one of the configuration.
    """
    if not config.get("init_from"):
        return None
    base = OrbitPipeline.load(config["init_from"])
    if base.codec != build_codec(config):
        raise ValueError(
            f"{config['init_from']} has latents of {base.codec}, but the configuration asks for"
            f" {build_codec(config)}: set --config.codec to that of the model."
        )
    return base


def load_pipeline(path: str) -> OrbitPipeline:
    """The pipeline of a model file or folder, or of a training run's newest checkpoint.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: it cannot be read.
    """
    folder = Path(path) / "checkpoints"
    if not folder.is_dir():
        return OrbitPipeline.load(path)
    checkpointer = Checkpointer(folder)
    try:
        params, frozen = checkpointer.restore_model()
        config = checkpointer.restore_config()
        prompt_params = load_prompt_params(config.get("init_from") or folder)
        params = whole_params(config, params, frozen)
        return OrbitPipeline.from_parts(params, frozen["codec"], config, prompt_params)
    finally:
        checkpointer.close()


def build_loss(config: Config, objective: DiffusionObjective) -> LossFn:
    """Returns what is minimised: the objective, of the adapters when there are any."""
    options = config["lora"]
    return lora.adapted(objective, alpha=options["alpha"]) if options["rank"] else objective


def whole_params(config: Config, params: PyTree, frozen: PyTree) -> PyTree:
    """Returns the parameters of the network, with the adapters in them when there are any."""
    options = config.get("lora", {"rank": 0})
    if not options["rank"]:
        return params
    return lora.merge(frozen["base"], params, alpha=options["alpha"])


def build_validation(config: Config, objective: DiffusionObjective, told: Told) -> Validation:
    """Returns the losses on clips that are not trained on.

    They are those of `data.validation`, or, where that is empty, of the split "val" of `data.path`.

    Args:
        told: makes the source that it is given ready for the network.

    Raises:
        FileNotFoundError, ValueError: there are none, or they cannot be used.
    """
    data = config["data"]
    split = "train"
    if not data["validation"]:
        split = "val"
        if not (data["path"] and records.is_dataset(data["path"])):
            raise ValueError(
                "validate_every needs clips that are not trained on: set --config.data.validation,"
                " or --config.data.path to a data set with a split 'val'."
            )
    source = told(inputs.build_clips(config, data["validation"] or data["path"], split))

    def evaluate(params: PyTree, frozen: PyTree, batch: PyTree, timestep: Array) -> Metrics:
        whole = whole_params(config, params, frozen)
        return objective.evaluate(whole, frozen, batch, timestep)

    return Validation(
        evaluate,
        grain.MapDataset.source(source).map(inputs.without_caption),
        num_timesteps=objective.schedule.num_steps,
    )


def build_optimizer(config: Config) -> optax.GradientTransformation:
    """Returns the optimizer, with the rate of `build_rate`.

    Raises:
        ValueError: as `make_optimizer`.
    """
    options = config["optimizer"]
    return make_optimizer(
        options["name"],
        build_rate(config),
        weight_decay=options["weight_decay"],
        clip_norm=options["clip_norm"],
        groups=options["groups"],
    )


def build_rate(config: Config) -> optax.Schedule:
    """Returns the learning rate by step; raises ValueError as `learning_rate`."""
    options = config["optimizer"]
    return learning_rate(
        options["learning_rate"],
        num_steps=config["num_steps"],
        warmup_steps=options["warmup_steps"],
        decay=options["decay"],
    )


def build_objective(
    config: Config, network: Any, codec: Codec, schedule: NoiseSchedule
) -> DiffusionObjective:
    """Returns the training objective: L_ldm + omega L_mr of a batch of `build_dataset`.

    Raises:
        ValueError: a wrong name or value among `loss` and `motion`.
    """
    options = dict(config["loss"])
    motion = MotionCondition(**options.pop("motion", {}))
    return DiffusionObjective(network, codec, schedule, motion=motion, **options)


def fit_codec(codec: Codec, source: ClipSource, base: OrbitPipeline | None = None) -> PyTree:
    """Returns the codec's parameters: the base's, or fitted to all frames of the clips.

    A codec with neither `fit` nor `init` has none. Latents come with theirs.

    Raises:
        ValueError: a frame cannot be decoded, or the frames do not suit the codec; or a codec that
            cannot be fitted without a base; or latents of another one.
    """
    if source.latents is not None:
        return _codec_of_latents(codec, source.latents, base)
    if base is not None:
        return base.codec_params
    if not hasattr(codec, "fit"):
        if hasattr(codec, "init"):
            raise ValueError(
                f"{codec} comes with weights and cannot be fitted to the clips: set"
                " --config.init_from to a model that has them."
            )
        return {}
    frames = [source[i][view] for i in range(len(source)) for view in ("dynamic", "static")]
    return codec.fit(np.concatenate(frames))


def _codec_of_latents(
    codec: Codec, latents: Mapping[str, Any], base: OrbitPipeline | None
) -> PyTree:
    """The parameters that lie beside latents; raises ValueError where others are wanted."""
    made_by, wanted = latents["codec"], inputs.describe("codec", codec)
    if made_by != json.loads(json.dumps(wanted)):
        raise ValueError(
            f"The latents in {latents['folder']} were made by {made_by}, but the configuration"
            f" asks for {wanted}: set --config.codec to the former, or encode the data anew."
        )
    params = conversion.load(Path(latents["folder"]) / CODEC_FILE)
    if base is not None:
        leaves = zip(jax.tree.leaves(params), jax.tree.leaves(base.codec_params), strict=True)
        if not all(np.array_equal(one, other) for one, other in leaves):
            raise ValueError(
                f"The latents in {latents['folder']} were made with other weights than those of"
                " init_from: encode the data with --checkpoint set to that model."
            )
    return params


def init_state(
    config: Config,
    objective: DiffusionObjective,
    codec_params: PyTree,
    batch: PyTree,
    mesh: Mesh,
    base: OrbitPipeline | None = None,
) -> TrainState:
    """Returns the state before the first step, for batches shaped like `batch`, on the mesh.

    With `lora.rank` above 0 the parameters of the state are those of the adapters.

    Args:
        objective: whose network is trained.
        base: whose parameters the network starts with; None: random ones.

    Raises:
        ValueError: the network's sizes do not fit the latents, or the parameters of the base.
    """
    init_key, run_key, lora_key = jax.random.split(jax.random.key(config["seed"]), 3)
    options, optimizer = config["lora"], build_optimizer(config)

    def init(frozen: PyTree, batch: PyTree) -> PyTree:
        latents, static = objective.latents(frozen, batch)
        timestep = jnp.zeros(latents.shape[:1], jnp.int32)
        told = objective.conditioning(batch, latents, static)
        return objective.network.init(init_key, latents, timestep, told)["params"]

    def create(frozen: PyTree, batch: PyTree, known: PyTree) -> TrainState:
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: known.get(sharding.path_name(path), leaf), init(frozen, batch)
        )
        if options["rank"]:
            frozen = {**frozen, "base": params}
            kernels = options["kernels"] or lora.ATTENTION
            params = lora.init(params, kernels, rank=options["rank"], key=lora_key)
        return create_state(params, optimizer, run_key, frozen)

    # As numpy arrays all processes have the same ones, and those of a base need no device whole.
    one = jax.tree.map(lambda leaf: leaf[:1], batch)
    given = jax.tree.map(np.asarray, ({"codec": codec_params}, one))
    known = {} if base is None else _shared(base.params, jax.eval_shape(init, *given))
    places = sharding.shardings(jax.eval_shape(create, *given, known), mesh, sharding.STATE_RULES)
    return jax.jit(create, out_shardings=places)(*given, known)


def _shared(params: PyTree, wanted: PyTree) -> dict[str, np.ndarray]:
    """The parameters of a base that the network has, too, by path; logs which others there are.

    Raises:
        ValueError: they differ in shape, or there are none.
    """

    def by_path(tree: PyTree) -> dict[str, Any]:
        return {sharding.path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}

    found, needed = by_path(params), by_path(wanted)
    shared = found.keys() & needed.keys()
    wrong = sorted(
        f"{path} is {found[path].shape} and not {needed[path].shape}"
        for path in shared
        if found[path].shape != needed[path].shape
    )
    if wrong or not shared:
        raise ValueError(
            "The parameters of init_from are not those of the network in the configuration:"
            f" {_some(wrong) or 'no name is the same'}."
        )
    for names, what in (
        (needed.keys() - shared, "New parameters, which init_from does not have"),
        (found.keys() - shared, "Parameters of init_from that the network does not have"),
    ):
        if names:
            logging.warning("%s: %s.", what, _some(sorted(names)))
    return {path: np.asarray(found[path]) for path in shared}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{'; '.join(names[:5])}{more}"


def build_sampler(
    config: Config, source: ClipSource, base: OrbitPipeline | None = None
) -> Callable[[TrainState], dict[str, np.ndarray]]:
    """Returns what shows the progress of a run, in pictures in [0, 1].

    "orbits" (h, w, 3) has two rows of frames for each of the first clips: the clip itself and,
    below, the orbit that the averaged parameters make of its first frame at its motion magnitude
    (of its caption, when it is that which the prompt encoder of the base reads). "orbit_0", ...
    (t, h, w, 3) are the same as videos, side by side.
    """
    prompt_params = None if base is None else base.prompt_params
    prompts = [source[i] for i in range(min(SAMPLED_CLIPS, len(source)))]

    def sample(state: TrainState) -> dict[str, np.ndarray]:
        ema, frozen = sharding.local_copy((state.ema, state.frozen))
        if jax.process_index():
            return {}  # all processes have to gather; one is to sample
        params = whole_params(config, ema, frozen)
        pipeline = OrbitPipeline.from_parts(params, frozen["codec"], config, prompt_params)
        rows, videos = [], {}
        for i, record in enumerate(prompts):
            truth = (record["dynamic"] + 1) / 2  # on white, then alpha
            by_caption = pipeline.prompt.reads == "text"
            prompt = str(record["caption"]) if by_caption else inputs.straight(truth[0])
            clip = pipeline(prompt, motion=float(record["motion"]), num_steps=SAMPLING_STEPS)
            both = [truth[..., :3], clip.dynamic if pipeline.moves else clip.static]
            rows += both
            videos[f"orbit_{i}"] = np.concatenate(both, axis=2)
        return {"orbits": media.contact_sheet(rows), **videos}

    return sample
