"""Makes diffusion.npz: samples of diffusers' DDIM scheduler with a toy network.

pip install torch diffusers
python tests/golden/make_diffusion_golden.py
"""

import pathlib

import numpy as np

#: name -> (schedule, its prediction, spacing, final, diffusers' options)
CASES = {
    "text": (
        ("scaled_linear", "eps", "leading", "first"),
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "set_alpha_to_one": False,
        },
    ),
    "image": (
        ("cosine", "v", "leading", "first"),
        {
            "beta_schedule": "squaredcos_cap_v2",
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "set_alpha_to_one": False,
        },
    ),
    "image_trailing": (
        ("cosine", "v", "trailing", "one"),
        {
            "beta_schedule": "squaredcos_cap_v2",
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "set_alpha_to_one": True,
        },
    ),
}


def toy_network(x, t, sin):
    """A smooth function of sample and timestep, for any array library."""
    return 0.7 * sin(1.3 * x) + 0.2 * x + 0.1 * sin(0.01 * t)


def main() -> None:
    import torch
    from diffusers import DDIMScheduler

    noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    out = {"noise": noise}
    for name, (_, options) in CASES.items():
        scheduler = DDIMScheduler(1000, clip_sample=False, steps_offset=1, **options)
        scheduler.set_timesteps(50)
        x = torch.from_numpy(noise)
        for t in scheduler.timesteps:
            x = scheduler.step(toy_network(x, t, torch.sin), t, x).prev_sample
        out[name] = x.numpy()
        out[name + "_timesteps"] = scheduler.timesteps.numpy().astype(np.int32)
    np.savez_compressed(pathlib.Path(__file__).with_name("diffusion.npz"), **out)
    print({k: float(v.std()) for k, v in out.items()})


if __name__ == "__main__":
    main()
