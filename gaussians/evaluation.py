"""How well an asset shows given frames: renders of them, and scores frame by frame."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from d4d_jax import metrics
from d4d_jax.clips import Color
from d4d_jax.typing import AnyArray
from gaussians.asset import Asset
from gaussians.captures import Views


class Rendered(NamedTuple):
    """What an asset looks like in some views, clipped to [0, 1]."""

    rgb: Float[np.ndarray, "v h w 3"]
    alpha: Float[np.ndarray, "v h w"]


def render_views(
    asset: Asset, views: Views, background: Color | None = None, *, at: float | None = None
) -> Rendered:
    """Renders every view at its timestamp.

    Args:
        asset: what is shown.
        views: of which cameras and timestamps count.
        background: behind the asset; None takes the asset's own.
        at: a timestamp in [0, 1] for all views instead of theirs: the asset holding still.
    """
    times = np.asarray(views.timestamps) if at is None else np.full(len(views), at)
    renders = [
        asset.render(views.camera[i], float(times[i]), background=background)
        for i in range(len(views))
    ]
    rgb = np.stack([np.asarray(render.rgb) for render in renders])
    alpha = np.stack([np.asarray(render.alpha) for render in renders])
    return Rendered(np.clip(rgb, 0, 1), np.clip(alpha, 0, 1))


#: Equal frames, as where nothing is to be seen, count as much as an error of 1e-5.
_MOST_PSNR = 100.0

_lpips = jax.jit(metrics.Lpips.__call__)


def score(
    rendered: Rendered, views: Views, perceptual: metrics.Lpips | None = None
) -> dict[str, Float[np.ndarray, "v"]]:
    """Scores of every frame, by name.

    - `psnr`: dB, at most 100, which stands for equality. `ssim`: in [-1, 1], Gaussian window.
    - `alpha_iou`: of the silhouettes, in [0, 1]; only for views with alpha.
    - `floaters`: share of the rendered alpha that lies where the true alpha is 0, in [0, 1]; only
      for views with alpha.
    - `lpips`: distance by `perceptual`, at least 0; only where that is given.
    """
    scores = {
        "psnr": jnp.minimum(metrics.psnr(rendered.rgb, views.rgb), _MOST_PSNR),
        "ssim": metrics.ssim(jnp.asarray(rendered.rgb), jnp.asarray(views.rgb)),
    }
    if views.alpha is not None:
        scores["alpha_iou"] = metrics.alpha_iou(rendered.alpha, views.alpha)
        scores["floaters"] = floaters(rendered.alpha, views.alpha)
    if perceptual is not None:  # frame by frame: the features of an image take up to 33 MB
        pairs = zip(rendered.rgb, np.asarray(views.rgb), strict=True)
        scores["lpips"] = jnp.stack([_lpips(perceptual, image, truth) for image, truth in pairs])
    return {name: np.asarray(values) for name, values in scores.items()}


def floaters(
    alpha: Float[AnyArray, "*b h w"], truth: Float[AnyArray, "*b h w"]
) -> Float[Array, "*b"]:
    """The share of the rendered alpha where the true alpha is 0; 0 for an empty render."""
    alpha = jnp.asarray(alpha)
    mass = jnp.sum(alpha, axis=(-2, -1))
    outside = jnp.sum(jnp.where(jnp.asarray(truth) > 0, 0.0, alpha), axis=(-2, -1))
    return jnp.where(mass > 0, outside / jnp.where(mass > 0, mass, 1.0), 0.0)
