"""Writes rasterizer_gsplat.npz: projection, SH and compositing by gsplat's torch maths, in float64.

    pip install gsplat==1.5.3 torch --no-deps && python tests/golden/make_rasterizer_golden.py

Only `gsplat/cuda/_torch_impl.py` is loaded, by its path: the package itself wants CUDA. Its
`accumulate` wants a list of (splat, pixel) pairs, which gsplat finds in CUDA, and two functions of
nerfacc; both are supplied here. gsplat 1.5.3 cuts alpha at 0.999 and we at 0.99, so no splat of the
scene comes near either.
"""

import importlib.util
import pathlib
import sys
import types

import numpy as np
import torch

N, WIDTH, HEIGHT = 48, 41, 27
NEAR, BLUR, ALPHA_MIN, TRANSMITTANCE_MIN = 0.2, 0.3, 1 / 255, 1e-4


def load_gsplat() -> types.ModuleType:
    root = importlib.util.find_spec("gsplat").submodule_search_locations[0]
    path = pathlib.Path(root) / "cuda" / "_torch_impl.py"
    spec = importlib.util.spec_from_file_location("gsplat_torch_impl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nerfacc_stand_in() -> types.ModuleType:
    """Weights of alphas that lie one after the other along each ray, and their sums."""

    def render_weight_from_alpha(alphas, ray_indices, n_rays):
        weights, transmittances = [], []
        for ray in range(n_rays):
            alpha = alphas[ray_indices == ray]
            before = torch.cat([torch.ones(1, dtype=alpha.dtype), torch.cumprod(1 - alpha, 0)])
            transmittances.append(before[:-1])
            weights.append(alpha * before[:-1])
        return torch.cat(weights), torch.cat(transmittances)

    def accumulate_along_rays(weights, values, ray_indices, n_rays):
        values = weights[:, None] if values is None else weights[:, None] * values
        return torch.zeros(n_rays, values.shape[1], dtype=values.dtype).index_add(
            0, ray_indices, values
        )

    module = types.ModuleType("nerfacc")
    module.render_weight_from_alpha = render_weight_from_alpha
    module.accumulate_along_rays = accumulate_along_rays
    return module


def scene() -> dict[str, np.ndarray]:
    """Splats in front of, beside and behind a camera with an off-centre principal point."""
    rng = np.random.default_rng(0)
    means = rng.uniform(-0.6, 0.6, (N, 3))
    means[:4] *= 4.0
    means[4:6] = (1.0, -4.0, 0.5), (0.4, -1.5, 0.5)  # behind the camera, nearer than the near plane
    scales = np.exp(rng.uniform(np.log(0.01), np.log(0.12), (N, 3)))
    scales[6] = (0.6, 0.004, 0.004)
    eye = np.array([0.4, -1.6, 0.5])
    forward = -eye / np.linalg.norm(eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3], world_to_camera[:3, 3] = rotation, -rotation @ eye
    arrays = {
        "means": means,
        "log_scales": np.log(scales),
        "quaternions": rng.normal(size=(N, 4)),
        "opacity_logits": rng.uniform(-3.0, 4.0, N),
        "sh": rng.normal(size=(N, 16, 3)) * 0.3,
        "world_to_camera": world_to_camera,
        "intrinsics": np.array([[45.0, 0, 18.0], [0, 43.0, 15.5], [0, 0, 1]]),
        "cotangent_rgb": rng.normal(size=(HEIGHT, WIDTH, 3)),
        "cotangent_alpha": rng.normal(size=(HEIGHT, WIDTH)),
        "cotangent_depth": rng.normal(size=(HEIGHT, WIDTH)),
    }
    return {name: value.astype(np.float32).astype(float) for name, value in arrays.items()}


def pairs(means2d, conics, opacities, depths, visible):
    """(splat, pixel) indices of what each pixel blends, nearest first."""
    splats, pixels = [], []
    order = [k for k in torch.argsort(depths).tolist() if visible[k]]
    for pixel in range(WIDTH * HEIGHT):
        centre = torch.tensor([pixel % WIDTH + 0.5, pixel // WIDTH + 0.5])
        transmittance = 1.0
        for k in order:
            dx, dy = (centre - means2d[k]).tolist()
            xx, xy, yy = conics[k].tolist()
            power = -0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy
            alpha = opacities[k].item() * np.exp(power)
            if alpha < ALPHA_MIN:
                continue
            transmittance *= 1 - alpha
            if transmittance < TRANSMITTANCE_MIN:
                break
            splats.append(k)
            pixels.append(pixel)
    return torch.tensor(splats), torch.tensor(pixels)


def main() -> None:
    sys.modules["nerfacc"] = nerfacc_stand_in()
    gsplat = load_gsplat()
    arrays = scene()
    names = ("means", "log_scales", "quaternions", "opacity_logits", "sh", "world_to_camera")
    leaf = {name: torch.tensor(arrays[name], requires_grad=True) for name in names}
    intrinsics = torch.tensor(arrays["intrinsics"])[None]
    covariances, _ = gsplat._quat_scale_to_covar_preci(
        leaf["quaternions"], leaf["log_scales"].exp(), compute_preci=False
    )
    radii, means2d, depths, conics, _ = gsplat._fully_fused_projection(
        leaf["means"],
        covariances,
        leaf["world_to_camera"][None],
        intrinsics,
        WIDTH,
        HEIGHT,
        eps2d=BLUR,
        near_plane=NEAR,
    )
    rotation, translation = leaf["world_to_camera"][:3, :3], leaf["world_to_camera"][:3, 3]
    directions = leaf["means"] + rotation.T @ translation
    colours = torch.clamp_min(gsplat._spherical_harmonics(3, directions, leaf["sh"]) + 0.5, 0.0)
    opacities = torch.sigmoid(leaf["opacity_logits"])
    features = torch.cat([colours, depths[0][:, None]], dim=-1)
    splat_ids, pixel_ids = pairs(
        means2d[0].detach(),
        conics[0].detach(),
        opacities.detach(),
        depths[0].detach(),
        (depths[0] > NEAR).tolist(),
    )
    image, alpha = gsplat.accumulate(
        means2d,
        conics,
        opacities[None],
        features[None],
        splat_ids,
        pixel_ids,
        torch.zeros_like(pixel_ids),
        WIDTH,
        HEIGHT,
    )
    image, alpha = image[0], alpha[0, ..., 0]
    loss = (
        (image[..., :3] * torch.tensor(arrays["cotangent_rgb"])).sum()
        + (alpha * torch.tensor(arrays["cotangent_alpha"])).sum()
        + (image[..., 3] * torch.tensor(arrays["cotangent_depth"])).sum()
    )
    loss.backward()
    results = {
        "means2d": means2d[0],
        "depths": depths[0],
        "conics": conics[0],
        "radii": radii[0],
        "colours": colours,
        "image": image,
        "alpha": alpha,
        **{f"gradient_{name}": leaf[name].grad for name in names},
    }
    arrays |= {name: value.detach().numpy() for name, value in results.items()}
    path = pathlib.Path(__file__).with_name("rasterizer_gsplat.npz")
    np.savez_compressed(path, **{k: np.asarray(v, np.float32) for k, v in arrays.items()})
    print(f"Wrote {path.name}: {len(splat_ids)} pairs, alpha up to {alpha.max().item():.4f}.")


if __name__ == "__main__":
    main()
