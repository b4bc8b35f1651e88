"""Reconstruction of a 4D asset: the fields of `gaussians.reconstruct.ReconstructConfig`.

For 256 x 256 clips on two CPU cores:

- `reconstruct.py` or `reconstruct.py:default` takes under three minutes,
- `reconstruct.py:fast` gives a usable asset in less than 90 seconds,
- `reconstruct.py:quality` has twice the splats, harmonics, and takes several times as long,
- `reconstruct.py:smoke` takes seconds and proves only that everything runs.

A binary's `--preset=fast` is the same as the word in `--config`. A comma adds a choice of parts
(`reconstruct.py:fast,hexplane,mcmc`):

- `hexplane` moves the splats by HexPlane (4DGS) instead of control points (SC-GS); `identity` does
  not move them at all;
- `plain` is the field alone, without bodies for lost poses and without short-lived splats;
- `mcmc` relocates splats instead of cloning and pruning them;
- `no_tracking` fits the control points to all frames at once in every clip, also in those that
  return to rest;
- `node_stage` fits the control points before the splats that they carry (SC-GS's first stage);
- `lpips` adds a perceptual loss, of which `--perceptual` says the network; `no_dssim` has L1 alone;
- `no_coarse`, `no_fine` give the steps of one stage to the other; `dynamic_fine` has no static
  views in the fine stage, as the paper has it.

The first splats come from the silhouettes, or from what is named by a dict:
`--config.initializer="{'name': 'ply', 'path': 'cloud.ply'}"` (see `gaussians.initialize`).
"""

import ml_collections

#: Words that set all sizes: one of them at a time.
_SIZES = ("default", "fast", "quality", "smoke")
_FIELDS = ("hexplane", "identity")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is any of the words above, separated by commas.

    Raises:
        ValueError: another word, or two that exclude each other.
    """
    variants = {
        "default": lambda config: None,
        "fast": _fast,
        "quality": _quality,
        "smoke": _smoke,
        "hexplane": _hexplane,
        "plain": _plain,
        "identity": _identity,
        "mcmc": _mcmc,
        "lpips": _lpips,
        "no_dssim": _no_dssim,
        "no_tracking": _no_tracking,
        "node_stage": _node_stage,
        "no_coarse": _no_coarse,
        "no_fine": _no_fine,
        "dynamic_fine": _dynamic_fine,
    }
    config = _default()
    words = [word for word in arg.split(",") if word]
    for word in words:
        if word not in variants:
            known = ", ".join(variants)
            raise ValueError(f"reconstruct.py knows the variants {known}, not {word!r}.")
    for kind, group in (("preset", _SIZES), ("deformation field", _FIELDS)):
        chosen = list(dict.fromkeys(word for word in words if word in group))
        if len(chosen) > 1:
            raise ValueError(f"A reconstruction has one {kind}, not {chosen}.")
    for word, change in variants.items():  # sizes first, whatever the order of the words
        if word in words:
            change(config)
    return config


def _default() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.num_splats = 8000
    config.body_splats = 4000
    config.capacity = 12000
    config.sh_degree = 0
    config.sh_interval = 0
    config.static_time = ml_collections.config_dict.placeholder(float)  # None: found by comparison
    config.pairs_per_splat = 8.0
    config.implementation = ml_collections.config_dict.placeholder(str)  # None: the fastest here
    nodes = dict(name="control_points", num_nodes=200)
    keyframes = dict(name="keyframes", base=nodes, bodies=2)
    config.deformation = dict(name="lifespan", base=keyframes, knots=9)
    # None: the hull of the silhouettes. A whole dict is given, as the keys differ by its name.
    config.initializer = ml_collections.config_dict.placeholder(ml_collections.ConfigDict)
    config.warmup = _stage(steps=300, static_fraction=1.0, low_steps=200)
    config.nodes = _stage(static_fraction=0.25, low_steps=400, end_rate=0.5)
    config.coarse = _stage(steps=600, static_fraction=0.25, low_steps=600, end_rate=0.5)
    # The coarse stage of control points in clips that return to rest:
    config.tracking = dict(
        steps=2400,
        starts=1,
        pixels=64,
        rate=8e-3,
        end_rate=0.1,
        opening=0.6,
        momentum=0.5,
        spread=(20.0, 1.0),
        time_spread=(2.0, 0.5),
        neighbours=8,
        tolerance=0.3,
        rigidity=1.0,
        acceleration=15.0,
        settled=0.2,
    )
    config.fine = _stage(steps=2000, static_fraction=0.2, low_steps=400, end_rate=0.05)
    config.density = dict(
        name="adaptive",
        start=950,
        stop=2100,
        every=300,
        gradient_threshold=2e-4,
        extent=2.2,
        clone_scale=0.01,
        shrink=1.6,
        opacity_threshold=0.005,
        prune_scale=0.1,
        prune_scale_after=3000,
        reset_every=0,
        reset_opacity_to=0.01,
    )
    config.weights = dict(
        l1=0.8,
        dssim=0.2,
        lpips=0.0,
        alpha=0.3,
        depth=0.0,
        plane_tv=1e-4,
        time_smoothness=1e-2,
        time_l1=1e-4,
        lifespan=1e-4,
        arap=3.0,
        acceleration=15.0,
    )
    config.rates = dict(
        means=5e-4,
        log_scales=5e-3,
        quaternions=2e-3,
        opacity_logits=3e-2,
        sh=1e-2,
        planes=3e-3,
        network=1e-3,
        curves=0.1,
        nodes=1.5e-3,
    )
    # These stages follow the rates above, but for the nodes: far, then fine.
    following = {name: config.rates.get_ref(name) for name in config.rates}
    config.nodes.rates = ml_collections.ConfigDict(following | {"nodes": 8e-3})
    config.coarse.rates = ml_collections.ConfigDict(following | {"nodes": 8e-3})
    return config


def _stage(**fields) -> dict:
    defaults = dict(
        steps=0,
        views=1,
        static_fraction=0.0,
        low_steps=0,
        low_scale=0.5,
        start_rate=1.0,
        end_rate=0.1,
        curriculum=0.0,
    )
    return defaults | fields


def _fast(config: ml_collections.ConfigDict) -> None:
    config.num_splats = 3000
    config.body_splats = 1500
    config.capacity = 4500
    config.warmup.update(steps=400, low_steps=0)
    config.coarse.update(steps=300, low_steps=0)
    config.fine.update(steps=1000, low_steps=0)
    config.density.update(start=750, stop=1400, every=200)


def _quality(config: ml_collections.ConfigDict) -> None:
    config.num_splats = 14000
    config.body_splats = 8000
    config.capacity = 24000
    config.sh_degree = 1
    config.sh_interval = 1500
    config.warmup.update(steps=500, low_steps=300)
    # The coarse stage stays as it is: in a longer one the first body contorts into poses that it
    # should leave to another.
    config.fine.update(steps=6000, low_steps=800)
    config.density.update(start=1150, stop=4400)


def _smoke(config: ml_collections.ConfigDict) -> None:
    config.num_splats = 150
    config.body_splats = 50
    config.capacity = 250
    config.deformation.base.base.num_nodes = 16
    config.density.update(start=2, every=5)
    config.tracking.update(steps=20, neighbours=4)
    for stage in ("warmup", "coarse", "fine"):
        config[stage].update(steps=6, low_steps=0)


def _hexplane(config: ml_collections.ConfigDict) -> None:
    config.deformation.base.base = dict(
        name="hexplane",
        bound=0.75,
        spatial_resolution=32,
        time_resolution=24,
        multires=(1, 2),
        channels=16,
        width=64,
        depth=2,
        opacity=False,
        detach_coordinates=True,
    )


def _plain(config: ml_collections.ConfigDict) -> None:
    config.deformation = config.deformation.base.base


def _lpips(config: ml_collections.ConfigDict) -> None:
    config.weights.lpips = 0.1


def _no_dssim(config: ml_collections.ConfigDict) -> None:
    config.weights.update(l1=1.0, dssim=0.0)


def _no_tracking(config: ml_collections.ConfigDict) -> None:
    config.tracking.steps = 0


def _node_stage(config: ml_collections.ConfigDict) -> None:
    config.nodes.steps = config.coarse.steps * 2 // 3
    config.density.start += config.nodes.steps
    config.density.stop += config.nodes.steps


def _no_coarse(config: ml_collections.ConfigDict) -> None:
    config.fine.steps += config.coarse.steps
    config.coarse.steps = 0


def _no_fine(config: ml_collections.ConfigDict) -> None:
    config.coarse.steps += config.fine.steps
    config.fine.steps = 0


def _dynamic_fine(config: ml_collections.ConfigDict) -> None:
    config.fine.static_fraction = 0.0


def _mcmc(config: ml_collections.ConfigDict) -> None:
    adaptive = config.density
    config.density = dict(
        name="mcmc",
        start=adaptive.start,
        stop=adaptive.stop,
        every=max(1, adaptive.every // 6),
        growth=1.1,
        noise_scale=2e4,
        # Both penalties of the authors cost 0.3 to 0.45 dB in runs of a few thousand steps.
        opacity_weight=0.0,
        scale_weight=0.0,
    )


def _identity(config: ml_collections.ConfigDict) -> None:
    config.deformation = dict(name="identity")
