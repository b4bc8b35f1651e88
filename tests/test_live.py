"""The live viewer: a real server of viser, and a client that only looks at the bytes."""

import dataclasses
import sys
import threading
import time
import urllib.request

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
import viser
import websockets.sync.client
from scipy.spatial.transform import Rotation

from d4d_jax.cameras import orbit
from d4d_jax.data import synthetic
from experiments import live
from gaussians.asset import Asset
from gaussians.deformation.identity import Identity
from gaussians.reconstruct import Progress, ReconstructConfig, reconstruct
from gaussians.stages import Stage
from gaussians.types import Splats

#: What viser's page tells about itself first.
CAMERA = {
    "type": "ViewerCameraMessage",
    **{"wxyz": (1, 0, 0, 0), "position": (0, -2, 0), "look_at": (0, 0, 0)},
    **{"up_direction": (0, 0, 1), "fov": 0.8, "near": 0.01, "far": 100.0},
    **{"image_height": 64, "image_width": 64},
}
SHIFT = np.array([0.25, 0.0, 0.0], np.float32)


@dataclasses.dataclass(frozen=True)
class Drift(Identity):
    """Moves everything by SHIFT over time."""

    def apply(self, params, splats, t):
        return dataclasses.replace(splats, means=splats.means + t * params)


def make_asset(seed=0, count=5, capacity=8):
    rng = np.random.default_rng(seed)
    splats = Splats(
        means=jnp.asarray(rng.normal(size=(capacity, 3)), jnp.float32),
        log_scales=jnp.asarray(rng.normal(-2, 0.3, (capacity, 3)), jnp.float32),
        quaternions=jnp.asarray(rng.normal(size=(capacity, 4)), jnp.float32),
        opacity_logits=jnp.asarray(rng.normal(size=capacity), jnp.float32),
        sh=jnp.asarray(rng.normal(size=(capacity, 4, 3)), jnp.float32),
        active=jnp.arange(capacity) % capacity < count,
    )
    return Asset(splats, Drift(), jnp.asarray(SHIFT), (0.2, 0.4, 0.6))


def make_progress(asset, step=1, total=10):
    return Progress("coarse", step, total, 0.25, 30.5, 5, 7.0, lambda: asset)


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def viewer():
    with live.LiveViewer(port=18765, every=0.0, camera=orbit(3, width=8, height=8)[0]) as viewer:
        yield viewer


def shown_at(viewer, asset, t):
    expected = np.asarray(asset.at(t).means)[np.asarray(asset.splats.active)]
    if viewer.splats is None or len(viewer.splats.centers) != len(expected):
        return False
    return np.allclose(viewer.splats.centers, expected, atol=1e-6)


def test_the_numbers_are_those_of_the_active_splats():
    asset = make_asset()
    shapes = live.gaussians_of(asset, 0.5)
    np.testing.assert_allclose(
        shapes["centers"], np.asarray(asset.splats.means)[:5] + 0.5 * SHIFT, rtol=1e-6
    )
    for i in range(5):
        w, x, y, z = np.asarray(asset.splats.quaternions, float)[i]
        axes = Rotation.from_quat([x, y, z, w]).as_matrix()
        variances = np.exp(2 * np.asarray(asset.splats.log_scales, float)[i])
        expected = axes @ np.diag(variances) @ axes.T
        np.testing.assert_allclose(shapes["covariances"][i], expected, rtol=1e-3, atol=1e-6)
    colours = 0.28209479177387814 * np.asarray(asset.splats.sh)[:5, 0] + 0.5
    np.testing.assert_allclose(shapes["rgbs"], np.clip(colours, 0, 1), rtol=1e-5)
    opacities = jax.nn.sigmoid(asset.splats.opacity_logits[:5])
    np.testing.assert_allclose(shapes["opacities"], opacities[:, None], rtol=1e-5)


def test_the_page_answers_and_the_splats_follow_steps_and_time(viewer):
    with urllib.request.urlopen(f"http://127.0.0.1:{viewer.port}", timeout=10) as page:
        assert page.status == 200 and b"<html" in page.read().lower()
    assert viewer.splats is None
    first, second = make_asset(0), make_asset(1, count=7)
    viewer(make_progress(first))
    until(lambda: shown_at(viewer, first, 0.0))
    assert "coarse" in viewer.text.content and "30.5 dB" in viewer.text.content
    viewer.time.value = 0.5
    until(lambda: shown_at(viewer, first, 0.5))
    viewer(make_progress(second, step=2))
    until(lambda: shown_at(viewer, second, 0.5))
    assert "step 2 of 10" in viewer.text.content


def test_a_client_receives_the_splats_and_playing_moves_them(viewer):
    asset = make_asset()
    viewer(make_progress(asset))
    until(lambda: shown_at(viewer, asset, 0.0))
    protocol = [f"viser-v{viser.__version__}"]
    address = f"ws://127.0.0.1:{viewer.port}"
    with websockets.sync.client.connect(address, subprotocols=protocol, max_size=None) as client:
        start = np.asarray(asset.splats.means)[0].tobytes()
        received = b""
        while start not in received:
            received += client.recv(timeout=10)
        viewer.play.value = True
        client.send(msgspec.msgpack.encode(CAMERA))  # Only now it counts as a client.
        until(lambda: viewer.time.value > 0.1 and shown_at(viewer, asset, viewer.time.value))
    viewer.play.value = False


def test_assets_are_asked_for_now_and_then_and_at_the_end():
    asked = []
    with live.LiveViewer(port=18765, every=3600.0) as viewer:
        for step in range(1, 11):
            progress = make_progress(make_asset(), step)
            progress = dataclasses.replace(progress, asset=lambda: asked.append(0) or make_asset())
            viewer(progress)
            if step == 5:
                assert len(asked) == 1
    assert len(asked) == 2


def test_a_failure_to_show_leaves_the_run_alone(viewer, caplog):
    broken = dataclasses.replace(make_asset(), params=None)
    viewer(make_progress(broken))
    until(lambda: "the reconstruction goes on" in caplog.text)
    viewer(make_progress(make_asset(), step=2))


def test_following_changes_nothing(viewer):
    clip = synthetic.make_clip(0, num_frames=4, size=16)
    stages = {name: Stage(steps=3) for name in ("warmup", "coarse", "fine")}
    config = ReconstructConfig(
        num_splats=60, capacity=80, deformation={"name": "identity"}, **stages
    )
    held = []

    def told(progress):
        viewer(progress)
        held.append(progress.asset())

    followed = reconstruct(clip, config, jax.random.key(0), told)
    alone = reconstruct(clip, config, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, followed.splats, alone.splats)
    # The copies outlive their steps, and the last one is the result.
    jax.tree.map(np.testing.assert_array_equal, held[-1].splats, alone.splats)
    assert not np.array_equal(held[0].splats.means, held[-1].splats.means)
    until(lambda: shown_at(viewer, alone, 0.0))


def test_closing_frees_the_port_and_ends_waiting():
    viewer = live.LiveViewer(port=18765)
    waiting = threading.Thread(target=viewer.wait)
    waiting.start()
    viewer.close()
    waiting.join(10)
    assert not waiting.is_alive()
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{viewer.port}", timeout=2)
    viewer.close()  # A second time does no harm.


def test_without_viser_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(ValueError, match=r"needs the package viser: pip install 'd4d_jax\[viewer"):
        live.LiveViewer()
