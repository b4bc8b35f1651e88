"""The embedded default: 24 frames of 64 x 64, trained on the shipped clips on one CPU core.

`tiny.py` is the shipped model; `tiny.py:smoke` is the same line in seconds, for tests and CI.
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the configuration; `arg` is "" or "smoke".

    Raises ValueError for another `arg`.
    """
    if arg not in ("", "smoke"):
        raise ValueError(f"tiny.py takes no argument or 'smoke', not {arg!r}.")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_steps = 6000
    config.batch_size = 1
    config.ema_decay = 0.998
    config.log_every = 50
    config.checkpoint_every = 500
    config.sample_every = 0
    config.validate_every = 0  # steps between the losses on clips that are not trained on
    config.keep_checkpoints = 2
    config.keep_best = 0  # further checkpoints that stay: those with the least val_denoising
    config.max_skipped = 10  # updates in a row that loss or gradient may not be finite for
    config.accumulate = 1  # parts of a batch that are computed one after the other
    config.writers = ()  # besides the log and metrics.jsonl: "tensorboard", "wandb"
    config.init_from = ""  # a model to start from: a file, or a folder of converted weights

    config.data = ml_collections.ConfigDict(
        dict(
            path="",  # a folder of clip folders; empty: the clips shipped with the package
            validation="",  # likewise, not trained on; empty: the split "val" of a data set
            size=64,
            max_corrupt=0.01,  # share of the clips that may be unreadable; they are left out
            static_probability=0.3,  # the same network at m = 0 is the 3D-aware network
        )
    )
    config.mesh = ml_collections.ConfigDict(
        dict(
            data=0,  # devices along the batch; 0: all that are left
            fsdp=1,  # devices along parameters, their average and the optimizer's state
            by_frames=False,  # the latter share the frames of a clip instead of the clips
        )
    )
    config.codec = ml_collections.ConfigDict(
        dict(name="patch_pca", factor=8, dim=48, whitening=0.5)
    )
    config.schedule = ml_collections.ConfigDict(
        dict(name="cosine", prediction="x0", zero_terminal_snr=True)
    )
    config.network = ml_collections.ConfigDict(
        dict(
            name="unet",
            width=56,
            multipliers=(1, 1),
            blocks=1,
            attention_levels=(1,),
            head_dim=28,
            init_heads=0,
            init_head_dim=28,
            context_dim=0,
            groups=8,
            image_concat="all",
            dropout=0.0,
        )
    )
    config.loss = ml_collections.ConfigDict(
        dict(
            omega=0.1,  # L_ldm + omega L_mr
            snr_power=0.0,
            min_snr_gamma=0.0,  # 5 is usual; 0 weighs all timesteps alike
            noise_offset=0.0,  # 0.05 to 0.1 is usual
            timestep_shift=4.0,  # above 1: more training at the noisy end
            drop_prompt=0.1,  # text and image together
            drop_text=0.0,  # each on its own
            drop_image=0.0,
            drop_static=0.0,
            drop_motion=0.1,
            # What the network is told: "pixel" or "latent", times a scale, "mean" or "sum".
            motion=dict(space="pixel", scale=100.0, reduction="mean"),
        )
    )
    config.optimizer = ml_collections.ConfigDict(
        dict(
            name="muon",  # or "adamw", about three times as many steps for the same loss
            learning_rate=3e-3,
            warmup_steps=100,
            decay="cosine",  # to 0 at num_steps; or "constant"
            clip_norm=1.0,
            weight_decay=0.0,
            # (expression, {"rate": factor, "frozen": bool}) of parameters; () has all alike.
            groups=(),
        )
    )
    # Kernels: an expression for their paths; empty: all projections of attention.
    config.lora = ml_collections.ConfigDict(
        dict(rank=0, alpha=8.0, kernels="")  # rank 0: all parameters are trained
    )
    if arg == "smoke":
        _make_small(config)
    return config


def _make_small(config: ml_collections.ConfigDict) -> None:
    config.num_steps = 2
    config.log_every = config.checkpoint_every = 1
    config.data.size = 16
    config.codec.dim = 4
    config.network.update(width=8, multipliers=(1,), attention_levels=(), head_dim=8, groups=4)
    config.network.temporal_conv = False
    config.optimizer.warmup_steps = 1
    config.optimizer.update(name="adamw", decay="constant")
