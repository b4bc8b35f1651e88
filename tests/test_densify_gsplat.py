"""gaussians.densify.mcmc against gsplat's MCMC strategy, through a golden file."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaussians.densify import MCMCDensity
from gaussians.types import Splats

pytestmark = pytest.mark.parity
GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "densify_gsplat.npz")
NAMES = ("means", "log_scales", "quaternions", "opacity_logits", "sh")


def splats_of(prefix: str, number: int, used: int) -> Splats:
    fields = {name: jnp.asarray(GOLDEN[f"{prefix}/{name}"][number]) for name in NAMES}
    return Splats(**fields, active=jnp.arange(len(fields["means"])) < used)


def test_relocation_agrees_with_gsplat():
    strategy = MCMCDensity(growth=1.0)
    problems = GOLDEN["before/used"]
    assert len(problems) > 10 and len(set(problems)) > 5
    for number, used in enumerate(problems):
        splats = splats_of("before", number, int(used))
        expected = splats_of("after", number, int(used))
        refined = strategy.refine(jax.random.key(1), splats, jnp.zeros(len(splats)), 600)
        for name in NAMES:
            np.testing.assert_allclose(
                getattr(refined.splats, name), getattr(expected, name), rtol=2e-5, atol=2e-6
            )
        # gsplat forgets the history of the original; here its copies have none either.
        assert refined.rows.fresh[GOLDEN["after/forgotten"][number]]
        np.testing.assert_array_equal(refined.rows.fresh, splats.active)


def test_noise_agrees_with_gsplat():
    splats = splats_of("still", 0, 51)
    rate = float(GOLDEN["scale"]) / 5e5
    shaken = MCMCDensity().perturb(jax.random.key(0), splats, rate)
    expected = GOLDEN["shaken/means"][0] - GOLDEN["still/means"][0]
    assert (np.abs(expected) > 1e-3).any(axis=-1).sum() > 10
    np.testing.assert_allclose(shaken.means - splats.means, expected, rtol=1e-4, atol=2e-6)
