"""The viewer page: its numbers without a browser, and (marker `browser`) the page in Chromium."""

import dataclasses
import html.parser
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d4d_jax import cameras
from d4d_jax.metrics import psnr
from gaussians import viewer
from gaussians.asset import Asset, draw
from gaussians.deformation.identity import Identity
from gaussians.types import Splats
from gaussians.viewer.track import Track, decode, encode, sample

TITLE = 'A <b>fox</b> & "co" </script><script>alert(1)</script>'
SIZE = 96


@dataclasses.dataclass(frozen=True)
class Swing(Identity):
    """All but colours changes over time, smoothly; colours too if wanted."""

    colours: bool = False

    def apply(self, params, splats, t):
        wave = jnp.sin(3 * t + jnp.arange(len(splats)))[:, None]
        change = {
            "means": splats.means + 0.1 * wave,
            "log_scales": splats.log_scales + 0.2 * wave,
            "quaternions": splats.quaternions + wave * jnp.array([0.0, 1.0, 0.5, 0.0]),
            "opacity_logits": splats.opacity_logits + 2 * wave[:, 0],
        }
        if self.colours:
            change["sh"] = splats.sh + 0.1 * wave[..., None]
        return splats.with_parameters(change)


def make_splats(n=200, sh_degree=0, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal((n, *shape)), jnp.float32)

    return Splats(
        means=jnp.clip(normal(3, scale=0.2), -0.45, 0.45),
        log_scales=normal(3, scale=0.7) - 3.6,
        quaternions=normal(4),
        opacity_logits=normal(scale=2.0),
        # Degree 0 reaches below black and beyond white, as fitted colours do.
        sh=jnp.concatenate([normal(1, 3), normal((sh_degree + 1) ** 2 - 1, 3, scale=0.25)], axis=1),
        active=jnp.ones(n, bool),
    )


@dataclasses.dataclass(frozen=True)
class Flip(Identity):
    """The same rotations by quaternions of the other sign and another norm after t = 0.4."""

    def apply(self, params, splats, t):
        odd = jnp.arange(len(splats))[:, None] % 2 == 1
        factor = jnp.where(odd & (t > 0.4), -2.0, 0.5)
        return dataclasses.replace(splats, quaternions=splats.quaternions * factor)


@dataclasses.dataclass(frozen=True)
class Relay(Identity):
    """Every other splat hands over to its neighbour at t = 0.5."""

    def apply(self, params, splats, t):
        on = (jnp.arange(len(splats)) % 2 == 1) == (t >= 0.5)
        return dataclasses.replace(splats, opacity_logits=jnp.where(on, 3.0, -30.0))


def make_asset(field=None, **options):
    return Asset(make_splats(**options), field or Swing(), {}, (1.0, 1.0, 1.0))


def render(splats, camera, background=(1.0, 1.0, 1.0)):
    image = draw(splats, camera, jnp.asarray(background), implementation="reference").rgb
    return np.clip(np.asarray(image), 0, 1)


@pytest.mark.parametrize(("t", "odd"), [(0.41, False), (0.49, False), (0.51, True), (0.59, True)])
def test_a_change_of_bodies_is_sudden(t, odd):
    track = sample(make_asset(Relay()), np.linspace(0, 1, 6))  # 0.4 and 0.6 are neighbours
    found = 1 / (1 + np.exp(-np.asarray(track.at(t).opacity_logits, float)))
    on = (np.arange(len(track)) % 2 == 1) == odd
    np.testing.assert_allclose(found, np.where(on, 1 / (1 + np.exp(-3)), 0), atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    frames=st.integers(1, 5),
    sh_degree=st.integers(0, 3),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
)
def test_numbers_survive_up_to_the_documented_errors(seed, frames, sh_degree, spread):
    rng = np.random.default_rng(seed)
    n, k = 7, (sh_degree + 1) ** 2 - 1

    def values(*shape):
        return (spread * rng.standard_normal((frames, n, *shape))).astype(np.float32)

    quaternions = rng.standard_normal((frames, n, 4)).astype(np.float32)
    quaternions /= np.linalg.norm(quaternions, axis=-1, keepdims=True)
    track = Track(
        timestamps=np.linspace(0, 1, frames, dtype=np.float32),
        means=values(3),
        quaternions=quaternions,
        log_scales=values(3),
        opacities=rng.random((frames, n)).astype(np.float32),
        colours=values(3)[:1],
        harmonics=values(k, 3)[:1],
    )
    header, payload = encode(track)
    found = decode(json.loads(json.dumps(header)), payload)
    np.testing.assert_array_equal(found.timestamps, track.timestamps)
    shares = {"means": 131070, "log_scales": 2046, "colours": 8190, "harmonics": 510}
    for name in ("means", "log_scales", "colours", "harmonics", "opacities", "quaternions"):
        wanted, got = getattr(track, name), getattr(found, name)
        assert got.shape == wanted.shape
        span = np.ptp(wanted, axis=(0, 1)) if name in shares else 1.0
        bound = span / {**shares, "opacities": 2046, "quaternions": 4095}[name]
        rounding = 2e-7 * np.abs(wanted).max(initial=0)
        assert (np.abs(got - wanted) <= bound * 1.0001 + rounding).all(), name
    unit = found.quaternions / np.linalg.norm(found.quaternions, axis=-1, keepdims=True)
    chords = np.linalg.norm(unit - quaternions, axis=-1)
    assert np.degrees(4 * np.arcsin(chords / 2)).max() < 0.06


def test_a_track_is_exact_at_its_samples_and_linear_between():
    asset = make_asset(Swing(colours=True), sh_degree=1)
    track = sample(asset, [0.0, 0.25, 0.5])
    assert track.moves and len(track) == len(asset.splats)
    for t in (0.0, 0.25, 0.5):
        wanted, got = asset.at(t), track.at(t)
        np.testing.assert_allclose(got.means, wanted.means, atol=1e-6)
        np.testing.assert_allclose(got.log_scales, wanted.log_scales, atol=1e-6)
        np.testing.assert_allclose(got.sh, wanted.sh, atol=1e-5)
        np.testing.assert_allclose(got.opacity_logits, wanted.opacity_logits, atol=1e-3)
    early, middle, late = (np.asarray(track.at(t).means) for t in (0.25, 0.3, 0.5))
    np.testing.assert_allclose(middle, early + 0.2 * (late - early), atol=1e-6)
    np.testing.assert_array_equal(track.at(0.9).means, late)


def test_what_does_not_change_is_stored_once():
    track = sample(make_asset(), [0.0, 0.5, 1.0])
    assert len(track.means) == 3 and len(track.colours) == len(track.harmonics) == 1
    still = sample(make_asset(Identity()), [0.0, 0.5, 1.0])
    assert not still.moves
    moving, resting = (len(encode(t)[1]) for t in (track, still))
    assert resting < 0.6 * moving


def test_quaternions_take_the_short_way():
    track = sample(make_asset(Flip()), [0.0, 0.5, 1.0])
    np.testing.assert_allclose(np.linalg.norm(track.quaternions, axis=-1), 1, atol=1e-6)
    assert not np.ptp(track.quaternions, axis=0).max() > 1e-6


def test_splats_that_are_never_visible_are_left_out():
    splats = make_splats(n=6)
    logits = jnp.array([0.0, -5.0, -6.0, -9.0, 3.0, 1.0])  # 1/255 is a logit of -5.54
    active = jnp.array([True, True, True, True, False, True])
    splats = dataclasses.replace(splats, opacity_logits=logits, active=active)
    still = Asset(splats, Identity(), {})
    np.testing.assert_array_equal(sample(still, [0.0]).means[0], splats.means[np.array([0, 1, 5])])
    # Slot 2 starts at -6 + 2 sin(2) = -4.2, so it stays; at t = 2/3 it is invisible, sin(4) < 0.
    swinging = Asset(splats, Swing(), {})
    assert len(sample(swinging, [0.0, 2 / 3])) == 4
    assert len(sample(swinging, [2 / 3])) == 3


def test_extent_ignores_faint_and_stray_splats():
    splats = make_splats(n=400)
    means = splats.means.at[0].set(jnp.array([50.0, 0, 0])).at[1].set(jnp.array([0, 90.0, 0]))
    logits = jnp.full(400, 2.0).at[1].set(-5.0)
    asset = Asset(dataclasses.replace(splats, means=means, opacity_logits=logits), Identity(), {})
    centre, radius = sample(asset, [0.0]).extent()
    assert np.abs(centre).max() < 0.1 and 0.4 < radius < 0.9


@pytest.mark.parametrize(
    ("change", "timestamps", "sentence"),
    [
        ({}, [0.5, 0.5], "increasing numbers in \\[0, 1\\]; got \\[0.5, 0.5\\]"),
        ({}, [], "increasing"),
        ({}, [0.0, 1.5], "1.5"),
        ({}, [0.0, float("nan")], "nan"),
        ({"opacity_logits": jnp.full(200, -9.0)}, [0.0], "200 active splats is ever visible"),
        ({"active": jnp.zeros(200, bool)}, [0.0], "ever visible"),
        ({"means": jnp.full((200, 3), jnp.nan)}, [0.0], "200 of the 200 .* slot 0"),
    ],
)
def test_unusable_input_is_named(change, timestamps, sentence):
    asset = make_asset(Identity())
    asset = dataclasses.replace(asset, splats=dataclasses.replace(asset.splats, **change))
    with pytest.raises(ValueError, match=sentence):
        sample(asset, timestamps)


class Page(html.parser.HTMLParser):
    """The elements of a page, and what it would load."""

    VOID = frozenset({"meta", "input"})

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.links, self.title, self.ids = [], [], [], "", set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.links += [found[name] for name in ("src", "href", "data", "action") if name in found]
        if "id" in found:
            assert found["id"] not in self.ids
            self.ids.add(found["id"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.title += data if "title" in self.open else ""


def test_the_page_stands_alone(tmp_path):
    viewer.write_viewer(tmp_path / "new" / "page.html", make_asset(), title=TITLE)
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.title == TITLE  # escaped: the parser gives it back as it was
    assert page.links == [] and "link" not in page.tags and "iframe" not in page.tags
    assert page.tags.count("script") == 5 and "alert(1)" not in page.tags
    assert not re.search(r"@import|url\(|https?://", re.sub(r"<script.*?</script>", "", text))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy and policy[1].startswith("default-src 'none'") and "http" not in policy[1]


def test_the_libraries_keep_their_licences(tmp_path):
    folder = Path(viewer.__file__).parent / "vendor"
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    viewer.write_viewer(tmp_path / "page.html", make_asset())
    text = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert set(wanted) == {"@sparkjsdev/spark", "three"}
    for name, version in wanted.items():
        assert f"---- {name} {version}\n" in text
    assert text.count("Permission is hereby granted") == len(wanted) + 1  # fflate is part of Spark
    lock = (folder / "package-lock.json").read_text()
    assert "resolved" not in lock and all(f'"{v}"' in lock for v in wanted.values())


def test_a_page_reads_back_and_renders_alike(tmp_path):
    asset = make_asset(sh_degree=2)
    viewer.write_viewer(tmp_path / "page.html", asset, timestamps=np.linspace(0, 1, 9))
    track = viewer.read_viewer(tmp_path / "page.html")
    camera = cameras.orbit(3, elevation=0.3, width=SIZE, height=SIZE)[1]
    exact = render(asset.at(0.5), camera)
    assert float(psnr(render(track.at(0.5), camera), exact)) > 45
    assert float(psnr(render(track.at(0.0), camera), exact)) < 25  # it does move
    assert float(psnr(render(track.at(0.43), camera), render(asset.at(0.43), camera))) > 40


@pytest.mark.parametrize(
    "damage",
    [lambda text: "<html></html>", lambda text: re.sub('(id="payload">.{900})[^<]*', r"\1", text)],
)
def test_reading_something_else_is_refused(tmp_path, damage):
    path = tmp_path / "page.html"
    viewer.write_viewer(path, make_asset())
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=r"page\.html is not a complete viewer page"):
        viewer.read_viewer(path)


def test_twelve_thousand_splats_fit_even_without_any_regularity():
    rng = np.random.default_rng(0)
    frames, n = 24, 12_000

    def noise(*shape):
        return rng.random((frames, n, *shape), np.float32)

    track = Track(
        timestamps=np.linspace(0, 1, frames, dtype=np.float32),
        means=noise(3),
        quaternions=noise(4),
        log_scales=noise(3),
        opacities=noise(),
        colours=noise(3)[:1],
        harmonics=noise(0, 3)[:1],
    )
    program = Path(viewer.__file__).parent / "vendor" / "vendor.js"
    assert program.stat().st_size < 4_000_000
    assert len(encode(track)[1]) * 4 / 3 + 2_000_000 < 15_000_000


def test_a_large_page_takes_fewer_samples_or_is_refused(tmp_path):
    asset, path = make_asset(n=3000), tmp_path / "page.html"
    viewer.write_viewer(path, asset)
    assert len(viewer.read_viewer(path).timestamps) == 24
    size = path.stat().st_size
    viewer.write_viewer(path, asset, max_bytes=size - 1)
    assert len(viewer.read_viewer(path).timestamps) == 16
    assert path.stat().st_size < size
    with pytest.raises(ValueError, match=r"With 24 timestamps .* fewer timestamps"):
        viewer.write_viewer(path, asset, timestamps=np.linspace(0, 1, 24), max_bytes=size - 1)
    with pytest.raises(ValueError, match=r"got -1\.0"):
        viewer.write_viewer(path, asset, seconds=-1.0)
    assert len(viewer.read_viewer(path).timestamps) == 16  # a refusal leaves the file alone
