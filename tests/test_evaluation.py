import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from d4d_jax import cameras
from d4d_jax.data import synthetic
from gaussians.asset import Asset
from gaussians.captures import Views, of_clip
from gaussians.deformation import build
from gaussians.evaluation import Rendered, floaters, render_views, score
from gaussians.types import Splats


@pytest.fixture(scope="module")
def clip():
    return synthetic.make_clip(0, num_frames=4, size=24)


@pytest.fixture(scope="module")
def asset():
    rng = np.random.default_rng(0)
    splats = Splats.from_points(
        rng.uniform(-0.3, 0.3, (40, 3)), rng.uniform(size=(40, 3)), scale=0.05, opacity=0.8
    )
    field = build({"name": "lifespan", "knots": 2, "base": {"name": "identity"}})
    params = field.init(jax.random.key(0), splats)
    curves = jnp.stack([jnp.zeros(40), jnp.where(jnp.arange(40) < 20, -4.0, 0.0)])
    return Asset(splats, field, params | {"curves": curves})


def test_a_clip_becomes_views_to_fit_and_views_to_judge_by(clip):
    capture = of_clip(clip, 0.25)
    assert list(capture.sets) == ["dynamic", "static", "front"]
    assert list(capture.held_out) == ["front"]
    np.testing.assert_array_equal(capture.still.timestamps, np.full(4, 0.25, np.float32))
    np.testing.assert_allclose(capture.instants, clip.timestamps)
    poses = capture.held_out["front"].camera.world_to_camera
    np.testing.assert_array_equal(poses, np.repeat(clip.camera.world_to_camera[:1], 4, axis=0))
    bare = dataclasses.replace(clip, static=None, front=None)
    assert list(of_clip(bare, 0.0).sets) == ["dynamic"]
    with pytest.raises(ValueError, match="no dynamic orbit"):
        of_clip(dataclasses.replace(clip, dynamic=None), 0.0)


def test_views_can_be_taken_apart_and_resized(clip):
    views = of_clip(clip, 0.0).moving
    some = views[np.array([2, 0])]
    assert len(some) == 2 and some.camera.width == 24
    np.testing.assert_array_equal(some.timestamps, views.timestamps[[2, 0]])
    half = views.resized(0.5)
    assert half.rgb.shape == (4, 12, 12, 3) and half.camera.width == 12
    expected = np.asarray(clip.dynamic_alpha).reshape(4, 12, 2, 12, 2).mean((2, 4))
    np.testing.assert_allclose(half.alpha, expected, atol=1e-5)
    assert views.resized(1.0) is views


def test_every_view_is_rendered_at_its_own_time_unless_held(asset):
    camera = cameras.stack([cameras.orbit(4, width=20, height=16)[0]] * 3)
    shape = (3, 16, 20)
    views = Views(np.zeros((*shape, 3)), np.zeros(shape), camera, np.array([0.0, 0.5, 1.0]))
    rendered = render_views(asset, views, (0.0, 0.0, 0.0))
    assert rendered.rgb.shape == (*shape, 3) and rendered.alpha.shape == shape
    coverage = rendered.alpha.sum(axis=(1, 2))
    assert coverage[0] > coverage[1] > coverage[2] > 0  # half of the splats fade
    held = render_views(asset, views, (0.0, 0.0, 0.0), at=1.0)
    for i in range(3):
        np.testing.assert_array_equal(held.rgb[i], rendered.rgb[2])
    one = asset.render(camera[1], 0.5, background=(0.0, 0.0, 0.0))
    np.testing.assert_array_equal(rendered.alpha[1], one.alpha)


def test_scores_are_those_of_scikit_image_frame_by_frame(clip):
    rng = np.random.default_rng(0)
    views = of_clip(clip, 0.0).moving
    noisy = np.clip(views.rgb + rng.normal(0, 0.1, views.rgb.shape), 0, 1).astype(np.float32)
    scores = score(Rendered(noisy, views.alpha), views)
    for i in range(4):
        truth = np.asarray(views.rgb[i])
        psnr = peak_signal_noise_ratio(truth, noisy[i], data_range=1)
        assert scores["psnr"][i] == pytest.approx(psnr, abs=1e-3)
        ssim = structural_similarity(
            truth, noisy[i], data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert scores["ssim"][i] == pytest.approx(ssim, abs=1e-4)
    np.testing.assert_array_equal(scores["alpha_iou"], 1)
    np.testing.assert_array_equal(scores["floaters"], 0)
    assert set(score(Rendered(noisy, views.alpha), dataclasses.replace(views, alpha=None))) == {
        "psnr",
        "ssim",
    }


def test_floaters_are_the_share_of_alpha_outside():
    truth = np.zeros((2, 4, 4), np.float32)
    truth[:, :2] = 0.1  # a faint edge is inside
    alpha = np.zeros((2, 4, 4), np.float32)
    alpha[0, 1], alpha[0, 2] = 0.6, 0.2
    np.testing.assert_allclose(floaters(alpha, truth), [0.25, 0.0], rtol=1e-6)
