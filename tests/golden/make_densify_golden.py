"""Writes densify_gsplat.npz: relocation and noise of gsplat's MCMC strategy, in float64.

    pip install gsplat==1.5.3 torch --no-deps && python tests/golden/make_densify_golden.py

gsplat's own `relocate` and `inject_noise_to_position` run on the CPU. Two functions they call exist
in CUDA only: for covariances its torch version stands in, and Eq. 9 is written out here. Places are
drawn at random, so every problem has one splat alive, and the noise is drawn by JAX.
"""

import importlib.util
import math
import pathlib

import gsplat.strategy.ops as ops
import jax
import numpy as np
import torch

N, PROBLEMS, NOISE_SCALE = 51, 12, 80.0
NAMES = {  # ours: gsplat's
    "means": "means",
    "log_scales": "scales",
    "quaternions": "quats",
    "opacity_logits": "opacities",
    "sh": "sh",
}


def equation_9(opacities, scales, ratios, binoms):
    """The kernel of gsplat/cuda/csrc/RelocationCUDA.cu for one common ratio."""
    copies = int(ratios[0])
    new = 1 - (1 - opacities) ** (1 / copies)
    total = sum(
        binoms[i - 1, k] * (-1) ** k / math.sqrt(k + 1) * new ** (k + 1)
        for i in range(1, copies + 1)
        for k in range(i)
    )
    return new, scales * (opacities / total)[:, None]


def covariances(quaternions, scales, **options):
    root = importlib.util.find_spec("gsplat").submodule_search_locations[0]
    path = pathlib.Path(root) / "cuda" / "_torch_impl.py"
    spec = importlib.util.spec_from_file_location("gsplat_torch_impl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._quat_scale_to_covar_preci(quaternions, scales, **options)


def parameters(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"means": (N, 3), "log_scales": (N, 3), "quaternions": (N, 4), "sh": (N, 1, 3)}
    values = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    values["log_scales"] -= 3
    values["opacity_logits"] = rng.uniform(-9.0, 4.0, N)
    return {name: value.astype(np.float32).astype(np.float64) for name, value in values.items()}


def as_torch(values: dict[str, np.ndarray]):
    params = {
        theirs: torch.nn.Parameter(torch.tensor(values[ours])) for ours, theirs in NAMES.items()
    }
    optimizers = {name: torch.optim.Adam([param]) for name, param in params.items()}
    for param in params.values():
        param.grad = torch.ones_like(param)
    for optimizer in optimizers.values():
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()  # makes the moments
    return params, optimizers


def main() -> None:
    ops.compute_relocation, ops.quat_scale_to_covar_preci = equation_9, covariances
    rng = np.random.default_rng(0)
    binoms = torch.tensor(
        [[math.comb(n, k) for k in range(N)] for n in range(N)], dtype=torch.float64
    )
    arrays: dict[str, list] = {}

    def save(prefix: str, values: dict) -> None:
        for name, value in values.items():
            arrays.setdefault(f"{prefix}/{name}", []).append(np.asarray(value))

    for problem in range(PROBLEMS):
        values = parameters(rng)
        used = rng.integers(2, N + 1)  # the splats beyond do not exist for gsplat
        values["opacity_logits"][:] = -6.0
        values["opacity_logits"][problem] = rng.uniform(-4.0, 5.0)
        used = max(used, problem + 1)
        save("before", values | {"used": used})
        params, optimizers = as_torch({name: value[:used] for name, value in values.items()})
        dead = torch.arange(used) != problem
        ops.relocate(params, optimizers, {}, dead, binoms)
        after = {name: values[name].copy() for name in NAMES}
        for ours, theirs in NAMES.items():
            after[ours][:used] = params[theirs].detach().numpy()
        moments = optimizers["means"].state[params["means"]]["exp_avg"]
        save("after", after | {"forgotten": int(torch.nonzero((moments == 0).all(-1)).item())})

    values = parameters(rng)
    save("still", values)
    normal = np.asarray(jax.random.normal(jax.random.key(0), (N, 3)), np.float64)
    params, optimizers = as_torch(values)
    torch.randn_like, randn_like = lambda _: torch.tensor(normal), torch.randn_like
    ops.inject_noise_to_position(params, optimizers, {}, scaler=NOISE_SCALE)
    torch.randn_like = randn_like
    save("shaken", {"means": params["means"].detach().numpy()})

    path = pathlib.Path(__file__).with_name("densify_gsplat.npz")
    kept = {k: np.stack(v) for k, v in arrays.items()}
    np.savez_compressed(path, scale=NOISE_SCALE, **{
        k: v if v.dtype.kind == "i" else v.astype(np.float32) for k, v in kept.items()
    })  # fmt: skip
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
