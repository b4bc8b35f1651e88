"""Makes diffusion.npz: schedules, conversions and samples of diffusers' schedulers.

pip install torch diffusers
python tests/golden/make_diffusion_golden.py
"""

import pathlib
from typing import Any, NamedTuple

import numpy as np

STEPS = 50

_TEXT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_IMAGE = {"beta_schedule": "squaredcos_cap_v2"}
_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


class Case(NamedTuple):
    """A way to sample, in our words and in diffusers'.

    stepper: Name of ours, and its fields.
    schedule: Name of ours, and its arguments.
    spacing: Of the timesteps.
    final: Where the last move ends.
    scheduler: Class of diffusers.
    options: Its arguments, besides those that all cases share.
    """

    stepper: dict[str, Any]
    schedule: dict[str, Any]
    spacing: str
    final: str
    scheduler: str
    options: dict[str, Any]


def _ddim(schedule: dict, spacing: str, final: str, **options: Any) -> Case:
    options |= {"timestep_spacing": spacing, "set_alpha_to_one": final == "one"}
    options |= {"clip_sample": False}
    return Case({"name": "ddim"}, schedule, spacing, final, "DDIMScheduler", options)


def _dpmpp(schedule: dict, spacing: str, final: str, *, lower: bool = True, **options: Any) -> Case:
    options |= {
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "timestep_spacing": spacing,
        "final_sigmas_type": "zero" if final == "one" else "sigma_min",
        "euler_at_final": lower,
    }
    stepper = {"name": "dpmpp_2m", "lower_order_final": lower}
    return Case(stepper, schedule, spacing, final, "DPMSolverMultistepScheduler", options)


def _text(prediction: str) -> dict[str, Any]:
    return {"name": "scaled_linear", "prediction": prediction}


def _image(prediction: str, *, zero: bool = True) -> dict[str, Any]:
    return {"name": "cosine", "prediction": prediction, "zero_terminal_snr": zero}


CASES = {
    "text": _ddim(_text("eps"), "leading", "first"),
    "text_one": _ddim(_text("eps"), "leading", "one"),
    "text_x0": _ddim(_text("x0"), "trailing", "first"),
    "image": _ddim(_image("v"), "leading", "first"),
    "image_one": _ddim(_image("v"), "leading", "one"),
    "image_trailing": _ddim(_image("v"), "trailing", "one"),
    "dpmpp_text": _dpmpp(_text("eps"), "linspace", "one"),
    "dpmpp_text_first": _dpmpp(_text("eps"), "trailing", "first"),
    "dpmpp_text_second": _dpmpp(_text("v"), "trailing", "first", lower=False),
    "dpmpp_image": _dpmpp(_image("v", zero=False), "linspace", "one"),
    "dpmpp_image_x0": _dpmpp(_image("x0", zero=False), "trailing", "one"),
    "dpmpp_image_zero": _dpmpp(_image("v"), "trailing", "one"),
    "euler_text": Case(
        {"name": "ddim"},
        _text("eps"),
        "leading",
        "one",
        "EulerDiscreteScheduler",
        {"timestep_spacing": "leading"},
    ),
}


def toy_network(x, t, sin):
    """A smooth function of sample and timestep, for any array library."""
    return 0.7 * sin(1.3 * x) + 0.2 * x + 0.1 * sin(0.01 * t)


def _scheduler(case: Case) -> Any:
    import diffusers

    schedule = case.schedule
    options = dict(_TEXT if schedule["name"] == "scaled_linear" else _IMAGE)
    options |= {"prediction_type": _TYPES[schedule["prediction"]], "steps_offset": 1}
    if schedule.get("zero_terminal_snr"):
        options["rescale_betas_zero_snr"] = True
    return getattr(diffusers, case.scheduler)(1000, **options, **case.options)


def _sample(case: Case, noise: np.ndarray) -> dict[str, np.ndarray]:
    import torch

    scheduler = _scheduler(case)
    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(toy_network(seen, t, torch.sin), t, x).prev_sample
    return {"": x.numpy(), "_timesteps": scheduler.timesteps.numpy().astype(np.int32)}


def _conversions(noise: np.ndarray) -> dict[str, np.ndarray]:
    """x0 that DDIM sees in each prediction, noisy samples and velocities, at four timesteps."""
    import torch

    x0, eps = torch.from_numpy(noise)
    times = torch.tensor(np.array(TIMES))
    out = {}
    for name, schedule in {"text": _text, "image": _image}.items():
        for prediction in _TYPES:
            scheduler = _scheduler(_ddim(schedule(prediction), "trailing", "one"))
            scheduler.set_timesteps(1000)
            noisy = scheduler.add_noise(x0, eps, times)
            out[f"{name}_noisy"] = noisy.numpy()
            out[f"{name}_velocity"] = scheduler.get_velocity(x0, eps, times).numpy()
            out[f"{name}_alphas_cumprod"] = scheduler.alphas_cumprod.numpy()
            steps = [
                scheduler.step(toy_network(x, t, torch.sin), int(t), x).pred_original_sample
                for x, t in zip(noisy, times, strict=True)
            ]
            out[f"{name}_{prediction}_x0"] = torch.stack(steps).numpy()
    return out


#: Timesteps of the conversions.
TIMES = (0, 21, 500, 981)


def main() -> None:
    noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2)).astype(np.float32)
    pairs = np.random.default_rng(1).standard_normal((2, 4, 3, 2)).astype(np.float32)
    out = {"noise": noise, "pairs": pairs, **_conversions(pairs)}
    for name, case in CASES.items():
        out |= {name + suffix: value for suffix, value in _sample(case, noise).items()}
    np.savez_compressed(pathlib.Path(__file__).with_name("diffusion.npz"), **out)
    print({k: float(v.std()) for k, v in out.items()})


if __name__ == "__main__":
    main()
