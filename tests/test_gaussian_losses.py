import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage.metrics import structural_similarity

from gaussians import losses


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    image = rng.random((24, 20, 3), np.float32)
    return image, np.clip(image + 0.2 * rng.normal(size=image.shape).astype(np.float32), 0, 1)


@pytest.mark.parity
def test_photometric_losses_agree_with_independent_ones(images):
    image, target = images
    assert float(losses.l1(jnp.asarray(image), target)) == pytest.approx(
        np.abs(image - target).mean(), rel=1e-5
    )
    expected = 1 - structural_similarity(
        image, target, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=1, channel_axis=-1,
    )  # fmt: skip
    assert float(losses.dssim(jnp.asarray(image), target)) == pytest.approx(expected, abs=1e-5)
    alpha = jnp.asarray(image[..., 0])
    assert float(losses.alpha_l1(alpha, np.zeros_like(alpha))) == pytest.approx(
        image[..., 0].mean(), rel=1e-5
    )


def make_depth():
    alpha = np.ones((6, 8), np.float32)
    return 2.0 * alpha, alpha, np.full((6, 8, 3), 0.5, np.float32)


def depth_loss(depth, alpha, image):
    return losses.depth_smoothness(jnp.asarray(depth), jnp.asarray(alpha), jnp.asarray(image))


def test_flat_depth_costs_nothing_whatever_its_opacity():
    depth, alpha, image = make_depth()
    assert float(depth_loss(depth, alpha, image)) == 0
    fading = np.linspace(0.6, 1, 8, dtype=np.float32)[None] * alpha
    assert float(depth_loss(depth * fading, fading, image)) == pytest.approx(0, abs=1e-6)


def test_a_step_in_depth_costs_its_height_less_at_an_edge_of_the_image():
    depth, alpha, image = make_depth()
    depth[:, 4:] += 0.3
    plain = 6 * 0.3 / 48
    assert float(depth_loss(depth, alpha, image)) == pytest.approx(plain, rel=1e-5)
    image[:, 4:] += 0.2
    assert float(depth_loss(depth, alpha, image)) == pytest.approx(plain * np.exp(-2), rel=1e-4)


def test_silhouettes_are_no_steps():
    depth, alpha, image = make_depth()
    alpha[:, 4:] = 0.1
    assert float(depth_loss(depth * alpha, alpha, image)) == 0


def test_the_depth_gradient_is_real():
    depth, alpha, image = make_depth()
    rng = np.random.default_rng(1)
    depth = depth + rng.uniform(-0.2, 0.2, depth.shape).astype(np.float32)
    alpha = alpha - rng.uniform(0, 0.3, alpha.shape).astype(np.float32)
    with jax.enable_x64():
        wide = [jnp.asarray(value, jnp.float64) for value in (depth, alpha, image)]
        for argument in (0, 1):
            gradient = jax.grad(losses.depth_smoothness, argnums=argument)(*wide)
            shift = [jnp.zeros_like(value) for value in wide]
            shift[argument] = jnp.asarray(rng.normal(size=depth.shape)) * 1e-6
            ahead, behind = (
                losses.depth_smoothness(*(w + s * d for w, d in zip(wide, shift, strict=True)))
                for s in (1, -1)
            )
            slope = float(jnp.vdot(gradient, shift[argument]))
            assert slope == pytest.approx(float(ahead - behind) / 2, rel=1e-4)
            assert np.abs(gradient).max() > 1e-3


def test_weights_are_applied_by_name():
    weights = losses.LossWeights(l1=2.0, plane_tv=0.5)
    terms = {"l1": jnp.asarray(3.0), "plane_tv": jnp.asarray(4.0)}
    assert float(losses.weighted_sum(terms, weights)) == 8.0
    with pytest.raises(ValueError, match=r"no weight for the losses \['jelly'\]"):
        losses.weighted_sum({"jelly": jnp.asarray(1.0)}, weights)
    with pytest.raises(ValueError, match="'dssim' is negative: -1"):
        losses.LossWeights(dssim=-1.0)
