"""The page of `gaussians.viewer` in Chromium, with a software renderer.

Needs playwright and a browser: the system's `chromium`, or playwright's own where there is none.
"""

import base64
import dataclasses
import io
import shutil

import numpy as np
import pytest
from PIL import Image
from test_viewer import TITLE, Relay, Swing, make_asset, render

from d4d_jax import cameras
from d4d_jax.metrics import psnr
from gaussians import viewer
from gaussians.deformation.identity import Identity

pytestmark = pytest.mark.browser
SIZE = 96
FLAGS = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")


@pytest.fixture(scope="module")
def asset():
    return make_asset(Swing(colours=True), sh_degree=3)


@pytest.fixture(scope="module")
def path(asset, tmp_path_factory):
    path = tmp_path_factory.mktemp("viewer") / "page.html"
    viewer.write_viewer(path, asset, title=TITLE, seconds=1.0)
    return path


@pytest.fixture(scope="module")
def launch():
    """Starts the system's Chromium, or playwright's own where there is none."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield lambda *flags: playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=flags
        )


@pytest.fixture(scope="module")
def browser(launch):
    browser = launch(*FLAGS)
    yield browser
    browser.close()


@pytest.fixture
def show(browser, path):
    """Opens the page with an address; afterwards nothing may have been complained of or loaded."""
    pages, complaints, loaded = [], [], []

    def show(address="play=0", width=SIZE, height=SIZE):
        page = browser.new_page(viewport={"width": width, "height": height})
        pages.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: loaded.append(request.url))
        page.goto(f"{path.as_uri()}#{address}")
        assert page.evaluate("d4d.ready") is True, page.inner_text("#message")
        return page

    yield show
    for page in pages:
        page.close()
    assert complaints == []
    assert all(url.startswith((path.as_uri(), "blob:null/")) for url in loaded)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.float32) / 255


def request(camera, t, background="white"):
    return {
        "t": t,
        "world_to_camera": np.asarray(camera.world_to_camera).tolist(),
        "intrinsics": np.asarray(camera.intrinsics).tolist(),
        "width": camera.width,
        "height": camera.height,
        "background": background,
    }


def snapshot(page, *wanted):
    url = page.evaluate("camera => d4d.snapshot(camera)", request(*wanted))
    return pixels(base64.b64decode(url.removeprefix("data:image/png;base64,")))


@pytest.mark.parametrize("t", [0.0, 0.41, 1.0])
def test_snapshots_equal_our_renders(show, path, asset, t):
    far = cameras.orbit(4, elevation=0.4, azimuth=0.3, width=SIZE, height=SIZE)[0]
    near = cameras.orbit(4, elevation=-0.3, distance=1.0, width=120, height=80)[1]
    wide = np.array([[60, 0, 75], [0, 70, 30], [0, 0, 1]], np.float32)  # and off centre
    near = dataclasses.replace(near, intrinsics=wide)
    page, track = show(), viewer.read_viewer(path)
    for camera, background in [(far, (1.0, 1.0, 1.0)), (near, (0.0, 0.0, 0.0))]:
        found = snapshot(page, camera, t, "white" if background[0] else "black")
        assert found.shape == (camera.height, camera.width, 3)
        assert np.ptp(found) > 0.5  # there is something to see
        # Measured: 44 to 50 dB. Without the blur it is 39, sorted by distance instead of depth 40.
        assert float(psnr(found, render(track.at(t), camera, background))) > 42
        assert float(psnr(found, render(asset.at(t), camera, background))) > 42


def test_bodies_change_at_once(browser, tmp_path):
    asset = make_asset(Relay())
    path = tmp_path / "relay.html"
    viewer.write_viewer(path, asset, timestamps=np.linspace(0, 1, 6))
    camera = cameras.orbit(4, elevation=0.4, azimuth=0.3, width=SIZE, height=SIZE)[0]
    page = browser.new_page()
    page.goto(path.as_uri() + "#play=0")
    page.evaluate("d4d.ready")
    for t in (0.45, 0.55):
        found = snapshot(page, camera, t)
        assert float(psnr(found, render(asset.at(t), camera))) > 42
    page.close()


def test_snapshots_wait_for_each_other(show):
    camera = cameras.orbit(2, width=SIZE, height=SIZE)[0]
    both = "cameras => Promise.all(cameras.map((camera) => d4d.snapshot(camera)))"
    asked = [request(camera, t) for t in (0.1, 0.9)]
    together = show().evaluate(both, asked)
    page = show()
    assert together == [page.evaluate("camera => d4d.snapshot(camera)", one) for one in asked]
    assert together[0] != together[1]


def test_the_window_shows_the_view_of_the_address(show, asset):
    address = "play=0&ui=0&t=0.5&azimuth=120&elevation=20&distance=2&target=0,0,0&fov=39.6"
    page = show(address, 128, 128)
    view = cameras.orbit(
        2,
        azimuth=np.radians(120),
        elevation=np.radians(20),
        fov=np.radians(39.6),
        width=128,
        height=128,
    )[0]
    assert float(psnr(pixels(page.screenshot()), render(asset.at(0.5), view))) > 40
    # A turn and another instant by script show another picture, the address's again the first.
    first = pixels(page.screenshot())
    page.evaluate("d4d.view({azimuth: 200, t: 0.1})")
    assert float(psnr(pixels(page.screenshot()), first)) < 30
    page.evaluate("d4d.view({azimuth: 120, t: 0.5})")
    assert float(psnr(pixels(page.screenshot()), first)) > 45


def test_slider_keys_and_buttons(show):
    page = show("play=0", 500, 300)
    canvas = {"x": 0, "y": 60, "width": 500, "height": 170}

    def picture():
        page.wait_for_timeout(150)
        return page.screenshot(clip=canvas)

    assert page.title() == TITLE and page.inner_text("h1") == TITLE
    start = picture()
    slider = page.locator("#time").bounding_box()
    page.mouse.click(slider["x"] + 0.7 * slider["width"], slider["y"] + slider["height"] / 2)
    assert 0.6 < page.evaluate("d4d.time") < 0.8
    assert float(psnr(pixels(picture()), pixels(start))) < 35
    page.keyboard.press("Home")
    assert page.evaluate("d4d.time") == 0
    for key, time in [("ArrowRight", 1 / 23), ("ArrowRight", 2 / 23), ("ArrowLeft", 1 / 23)]:
        page.keyboard.press(key)
        assert page.evaluate("d4d.time") == pytest.approx(time)
    assert page.inner_text("#clock").startswith("2 / 24")
    page.keyboard.press("Space")
    page.evaluate("async () => { while (d4d.time < 0.3) await new Promise(requestAnimationFrame) }")
    page.click("#play")
    assert page.evaluate("d4d.playing") is False
    rest = page.evaluate("d4d.time")
    page.wait_for_timeout(100)
    assert page.evaluate("d4d.time") == rest

    corners = []
    for _ in range(4):
        corners.append(pixels(picture())[0, 0, 0])
        page.click("#background")
    np.testing.assert_allclose(corners, [1, 0, 0.502, 0.784], atol=0.01)  # the last is a checker


def test_mouse_turns_zooms_and_reset_returns(show):
    page = show("play=0", 500, 300)
    page.wait_for_timeout(200)
    first = pixels(page.screenshot())
    page.mouse.move(250, 120)
    page.mouse.down()
    page.mouse.move(330, 140, steps=4)
    page.mouse.up()
    page.wait_for_timeout(1500)  # the turn runs out
    turned = pixels(page.screenshot())
    assert float(psnr(turned, first)) < 35
    page.mouse.wheel(0, 400)
    page.wait_for_timeout(1000)
    assert float(psnr(pixels(page.screenshot()), turned)) < 40
    page.keyboard.press("r")
    page.wait_for_timeout(500)
    assert float(psnr(pixels(page.screenshot()), first)) > 45


def test_a_still_object_has_no_clock(browser, tmp_path):
    viewer.write_viewer(tmp_path / "page.html", make_asset(Identity()))
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.evaluate("d4d.ready") is True
    shown = [
        page.is_visible(name) for name in ("#time", "#play", "#clock", "#background", "#reset")
    ]
    assert shown == [False, False, False, True, True]
    assert page.evaluate("d4d.playing") is False
    assert page.inner_text("#facts") == f"{len(viewer.read_viewer(tmp_path / 'page.html'))} splats"
    page.close()


def test_the_page_may_not_connect_anywhere(browser, path):
    page, complaints = browser.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(f"{path.as_uri()}#play=0")
    assert page.evaluate("d4d.ready") is True and complaints == []
    sent = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')")
    page.close()
    assert sent == "refused" and "Content Security Policy" in complaints[0]


def test_without_webgl_a_sentence_says_so(launch, path):
    browser = launch("--disable-3d-apis")
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.evaluate("d4d.ready") is False
    assert "needs WebGL 2" in page.inner_text("#message")
    browser.close()
