"""A page in the browser that follows a reconstruction: the splats of the moment, at any time.

    with LiveViewer(port=8080) as viewer:
        reconstruct(clip, config, key, callback=viewer)

The page is viser's. It draws colours without view dependence.
"""

import importlib
import math
import threading
import time
from types import ModuleType, TracebackType
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float

from d4d_jax.cameras import Camera
from experiments.curves import Recent
from gaussians import sh as spherical_harmonics
from gaussians.asset import Asset
from gaussians.projection import rotation_matrices
from gaussians.reconstruct import Progress

_FPS = 12  # while playing


class LiveViewer:
    """A server whose page shows a reconstruction while it runs; a callback of `reconstruct`.

    A step hands its asset over at most every `every` seconds, which takes it a copy. All else (the
    motion, the splats' shapes, the sending) happens on a thread of its own.

    Attributes:
        port: where the server is found.
        splats: viser's handle of what is shown; None before the first step.
        time: viser's slider, in [0, 1].
        play: viser's switch for letting the time run.
        text: viser's field of figures.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8080,
        every: float = 2.0,
        seconds: float = 3.0,
        camera: Camera | None = None,
    ):
        """Starts the server, which prints its address.

        Args:
            host: address to listen on; "0.0.0.0" is all of this machine's.
            port: to listen on, or the next one that is free.
            every: seconds between two updates.
            seconds: that the time takes from 0 to 1 while playing.
            camera: where the page looks from at first.

        Raises:
            ValueError: viser is not installed.
        """
        self._every, self._speed = every, 1 / (seconds * _FPS)
        self._server = library().ViserServer(host=host, port=port, verbose=False)
        self.port: int = self._server.get_port()
        self._changed, self._closed = threading.Event(), threading.Event()
        self._recent, self._taken = Recent(), -math.inf
        self._asset: Asset | None = None
        self._start_scene(camera)
        self._thread = threading.Thread(target=self._follow, name="live viewer", daemon=True)
        self._thread.start()

    def _start_scene(self, camera: Camera | None) -> None:
        self.splats: Any = None
        self._server.scene.set_up_direction("+z")
        if camera is not None:
            pose = np.asarray(camera.camera_to_world)
            self._server.initial_camera.position = tuple(float(x) for x in pose[:3, 3])
            self._server.initial_camera.look_at = (0.0, 0.0, 0.0)
            half = 0.5 * camera.height / float(camera.intrinsics[1, 1])
            self._server.initial_camera.fov = 2 * math.atan(half)
        gui = self._server.gui
        self.text: Any = gui.add_markdown("Waiting for the first step.")
        self.time: Any = gui.add_slider("time", min=0.0, max=1.0, step=0.01, initial_value=0.0)
        self.play: Any = gui.add_checkbox("play", initial_value=False)
        for handle in (self.time, self.play):
            handle.on_update(lambda _: self._changed.set())
        self._server.on_client_connect(lambda _: self._changed.set())  # It may be playing.

    def __call__(self, progress: Progress) -> None:
        """Takes note of a step, and of its asset where the last one is old enough."""
        loss, psnr = self._recent(progress)
        now = time.monotonic()
        if now - self._taken < self._every and progress.step < progress.total:
            return
        self._taken = now
        self.text.content = (
            f"**{progress.stage}**, step {progress.step} of {progress.total}\n\n"
            f"loss {loss:.4f}, PSNR {psnr:.1f} dB\n\n"
            f"{progress.splats} splats, {progress.eta:.0f} s to go"
        )
        self._asset = progress.asset()
        self._changed.set()

    def wait(self) -> None:
        """Returns at Ctrl-C."""
        try:
            self._closed.wait()
        except KeyboardInterrupt:
            pass

    def close(self) -> None:
        """Ends the server."""
        if not self._closed.is_set():
            self._closed.set()
            self._changed.set()
            self._thread.join()
            self._server.stop()

    def __enter__(self) -> "LiveViewer":
        """The viewer, which the end of the block closes."""
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the viewer."""
        self.close()

    def _follow(self) -> None:
        """Shows what has changed until the viewer is closed."""
        try:
            while not self._closed.is_set():
                if self.play.value and self._server.get_clients():
                    self._closed.wait(1 / _FPS)
                    self.time.value = (self.time.value + self._speed) % 1.0
                else:
                    self._changed.wait()
                self._changed.clear()
                if self._asset is not None and not self._closed.is_set():
                    self._show(self._asset, float(self.time.value))
        except Exception:  # The page is a convenience: the run goes on without it.
            logging.exception("The live viewer stopped; the reconstruction goes on.")

    def _show(self, asset: Asset, t: float) -> None:
        shapes = gaussians_of(asset, t)
        if self.splats is None:
            self.splats = self._server.scene.add_gaussian_splats("/asset", **shapes)
            pixel = np.asarray(asset.background, np.float32).reshape(1, 1, 3)
            self._server.scene.set_background_image((255 * pixel).astype(np.uint8), "png")
        else:
            self.splats.set_gaussians(**shapes)


def gaussians_of(asset: Asset, t: float) -> dict[str, Float[np.ndarray, "n *d"]]:
    """What viser draws of the active splats at a timestamp in [0, 1], by its names.

    Returns:
        `centers` (n, 3), `covariances` (n, 3, 3), `rgbs` (n, 3) in [0, 1] from the harmonics'
        constant term, and `opacities` (n, 1) in [0, 1].
    """
    splats = asset.at(t)
    active = np.asarray(splats.active)
    axes = rotation_matrices(splats.quaternions) * jnp.exp(splats.log_scales)[:, None, :]
    shapes = {
        "centers": splats.means,
        "covariances": axes @ jnp.swapaxes(axes, -1, -2),
        "rgbs": jnp.clip(0.5 + spherical_harmonics.C0 * splats.sh[:, 0], 0, 1),
        "opacities": 1 / (1 + jnp.exp(-splats.opacity_logits))[:, None],
    }
    return {name: np.asarray(values)[active] for name, values in shapes.items()}


def library() -> ModuleType:
    """The package viser.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return importlib.import_module("viser")
    except ImportError:
        raise ValueError(
            "The live viewer needs the package viser: pip install 'd4d_jax[viewer]'."
        ) from None
