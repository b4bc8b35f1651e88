"""First splats by name: from the frames at rest, at random, and from PLY files of any writer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plyfile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d4d_jax.data import synthetic
from gaussians import initialize, io, preparation
from gaussians.captures import Capture, of_clip
from gaussians.reconstruct import ReconstructConfig
from gaussians.sh import C0
from gaussians.types import Splats

KEY = jax.random.key(0)
SIZES = {"num_splats": 40, "capacity": 60, "sh_degree": 1, "key": KEY}


@pytest.fixture(scope="module")
def capture() -> Capture:
    return of_clip(synthetic.make_clip(0, num_frames=4, size=24), 0.0)


def start(capture, spec, **sizes):
    return initialize.build(spec)(capture, **SIZES | sizes)


def write_points(path, count=30, *, text=False, order="<", colour="u1", seed=0):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, 3)).astype(np.float32)
    columns = [("x", "f4"), ("quality", "f8"), ("y", "f4"), ("z", "f8")]
    if colour:
        columns += [(name, colour) for name in ("red", "green", "blue")]
    rows = np.zeros(count, columns)
    for name, values in zip("xyz", points.T, strict=True):
        rows[name] = values
    colours = rng.random((count, 3)).astype(np.float32)
    if colour and colour[0] == "u":
        largest = np.iinfo(colour).max
        colours = np.round(colours * largest) / largest
    for name, values in zip(("red", "green", "blue"), colours.T, strict=True):
        if colour:
            rows[name] = np.round(values * largest) if colour[0] == "u" else values
    triangle = np.array([([0, 1, 2],)], [("vertex_indices", "i4", (3,))])
    elements = [plyfile.PlyElement.describe(rows, "vertex")]
    elements += [plyfile.PlyElement.describe(triangle, "face")]
    plyfile.PlyData(elements, text=text, byte_order=order).write(str(path))
    return points, colours


@pytest.mark.parametrize(
    "style", [{}, {"text": True}, {"order": ">"}, {"colour": "u2"}, {"colour": "f4"}]
)
def test_points_of_every_kind_of_ply_become_splats(capture, tmp_path, style):
    points, colours = write_points(tmp_path / "cloud.ply", **style)
    splats = start(capture, {"name": "ply", "path": str(tmp_path / "cloud.ply"), "opacity": 0.3})
    np.testing.assert_array_equal(splats.active, np.arange(60) < 30)
    place = [int(np.abs(points - mean).sum(axis=1).argmin()) for mean in splats.means[:30]]
    assert sorted(place) == list(range(30))
    np.testing.assert_allclose(splats.means[:30], points[place], rtol=1e-6)
    np.testing.assert_allclose(0.5 + C0 * splats.sh[:30, 0], colours[place], atol=1e-5)
    assert splats.sh.shape == (60, 4, 3) and not np.asarray(splats.sh[:, 1:]).any()
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    expected = np.sort(distances, axis=1)[place, 1:4].mean(axis=1)
    np.testing.assert_allclose(np.exp(splats.log_scales[:30]), expected[:, None].repeat(3, 1), 1e-4)
    np.testing.assert_allclose(jax.nn.sigmoid(splats.opacity_logits[:30]), 0.3, rtol=1e-5)


def test_large_clouds_are_thinned_at_random(capture, tmp_path):
    points, _ = write_points(tmp_path / "cloud.ply", 500, colour=None)
    spec = {"name": "ply", "path": tmp_path / "cloud.ply"}
    one, same, other = (start(capture, spec, key=jax.random.key(seed)) for seed in (0, 0, 1))
    assert int(one.active.sum()) == 40
    np.testing.assert_array_equal(one.means, same.means)
    assert not np.array_equal(one.means, other.means)
    known = {tuple(point) for point in points.tolist()}
    assert {tuple(mean) for mean in np.asarray(one.means)[:40].tolist()} <= known
    np.testing.assert_array_equal(one.sh[:40], 0)  # grey


def make_splats(degree, count=20, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"means": (3,), "log_scales": (3,), "quaternions": (4,), "opacity_logits": ()}
    shapes["sh"] = ((degree + 1) ** 2, 3)
    fields = {k: jnp.asarray(rng.normal(size=(count, *s)), jnp.float32) for k, s in shapes.items()}
    fields["quaternions"] /= jnp.linalg.norm(fields["quaternions"], axis=1, keepdims=True)
    return Splats(**fields, active=jnp.ones(count, bool))


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 3), st.integers(0, 3))
def test_gaussians_are_taken_as_they_are_with_the_degree_that_is_asked_for(
    capture, tmp_path_factory, degree, wanted
):
    path = tmp_path_factory.mktemp("ply") / "cloud.ply"
    given_splats = make_splats(degree)
    io.write_ply(path, given_splats)
    splats = start(capture, {"name": "ply", "path": str(path)}, sh_degree=wanted, num_splats=4)
    assert splats.sh_degree == wanted and len(splats) == 60
    np.testing.assert_array_equal(splats.active, np.arange(60) < 20)
    for name in ("means", "log_scales", "quaternions", "opacity_logits"):
        written, read = getattr(given_splats, name), getattr(splats, name)[:20]
        np.testing.assert_allclose(read, written, rtol=1e-5, atol=1e-6)
    kept = (min(degree, wanted) + 1) ** 2
    np.testing.assert_array_equal(splats.sh[:20, :kept], given_splats.sh[:, :kept])
    assert not np.asarray(splats.sh[:20, kept:]).any()


def test_files_follow_the_world_of_the_capture_unless_they_are_normalised(capture, tmp_path):
    moved = dataclasses.replace(capture, centre=(1.0, -2.0, 0.5), scale=0.25)
    write_points(tmp_path / "cloud.ply", 30)
    given_splats = make_splats(0)
    io.write_ply(tmp_path / "splats.ply", given_splats)
    for name in ("cloud", "splats"):
        spec = {"name": "ply", "path": str(tmp_path / f"{name}.ply")}
        world, own = start(moved, spec), start(moved, spec | {"normalised": True})
        active = np.asarray(world.active)
        expected = (np.asarray(own.means) - [1.0, -2.0, 0.5]) * 0.25
        np.testing.assert_allclose(world.means[active], expected[active], atol=1e-6)
        ratio = np.exp(np.asarray(world.log_scales - own.log_scales))[active]
        np.testing.assert_allclose(ratio, 0.25, rtol=1e-4)


def damage(path, kind):
    if kind == "absent":
        path.unlink()
    elif kind == "text cut off":
        write_points(path, text=True)
        path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:20]))
    elif kind == "no z":
        path.write_bytes(path.read_bytes().replace(b"double z", b"double w"))
    elif kind == "nan":
        splats = make_splats(0)
        io.write_ply(path, splats)
        end = path.read_bytes()[:-4] + np.float32(np.nan).tobytes()
        path.write_bytes(end)
    elif kind == "large":
        io.write_ply(path, make_splats(0, count=61))
    elif kind == "few":
        write_points(path, 3)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("absent", r"cloud\.ply"),
        ("text cut off", "format ascii|cut off"),
        ("no z", "holds no points: its vertices lack x, y or z"),
        ("nan", "holds numbers that are not finite"),
        ("large", "holds 61 splats, more than a capacity of 60"),
        ("few", "3 points do not have 3 neighbours"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_a_sentence(capture, tmp_path, kind, sentence):
    path = tmp_path / "cloud.ply"
    write_points(path)
    damage(path, kind)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        start(capture, {"name": "ply", "path": str(path)})


def test_without_a_name_the_hull_of_the_frames_at_rest(capture):
    sizes = (40, 60, 0, KEY)
    default = preparation.first_splats(capture, *sizes)
    named = preparation.first_splats(capture, *sizes, {"name": "visual_hull"})
    jax.tree.map(np.testing.assert_array_equal, default, named)
    finer = preparation.first_splats(capture, *sizes, {"name": "visual_hull", "resolution": 64})
    assert not np.array_equal(finer.means, default.means)
    cube = preparation.first_splats(capture, *sizes, {"name": "random_cube", "half_extent": 2.0})
    assert np.abs(np.asarray(cube.means)).max() > 1.5
    nothing = np.zeros_like(np.asarray(capture.still.alpha))
    empty = dataclasses.replace(capture, still=dataclasses.replace(capture.still, alpha=nothing))
    fallback = preparation.first_splats(empty, *sizes)  # grey, in the small cube
    assert np.abs(np.asarray(fallback.means)).max() <= 0.5 and not np.asarray(fallback.sh).any()
    with pytest.raises(initialize.EmptyHull):
        preparation.first_splats(empty, *sizes, {"name": "visual_hull"})


def test_frames_of_a_moving_object_may_miss_a_point(capture):
    """Frames of several instants: a quarter of the silhouettes may disagree, unless told."""
    still = capture.still
    times = np.linspace(0, 1, len(still), dtype=np.float32)
    alpha = np.asarray(still.alpha).copy()
    alpha[0] = 0
    moving = dataclasses.replace(
        capture, still=dataclasses.replace(still, alpha=alpha, timestamps=times)
    )
    assert int(start(moving, {"name": "visual_hull"}).active.sum()) == 40
    with pytest.raises(initialize.EmptyHull):
        start(moving, {"name": "visual_hull", "tolerance": 0})
    with pytest.raises(ValueError, match="needs frames of the object at rest"):
        start(dataclasses.replace(capture, still=None), {"name": "visual_hull"})


def test_the_configuration_refuses_unknown_initialisers():
    with pytest.raises(ValueError, match="known: ply, random_cube, visual_hull"):
        ReconstructConfig(initializer={"name": "sphere"})
    with pytest.raises(ValueError, match="missing a required argument: 'path'"):
        ReconstructConfig(initializer={"name": "ply"})
    own = {"name": f"{__name__}:at_origin"}
    assert isinstance(initialize.build(own), initialize.Initializer)
    assert ReconstructConfig(initializer=own).initializer == own


def at_origin():
    """An initialiser of somebody's own."""

    def make(capture, *, num_splats, capacity, sh_degree, key):
        points = np.zeros((num_splats, 3), np.float32)
        return initialize.point_cloud(points, capacity=capacity, sh_degree=sh_degree)

    return make
