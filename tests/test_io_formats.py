"""SPZ and glTF, each read by somebody else's code; exports of a moving asset."""

import dataclasses
import json
import os
import sys
import types
from io import BytesIO

import gaussforge
import jax.numpy as jnp
import numpy as np
import plyfile
import pygltflib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from d4d_jax import cameras, metrics
from gaussians import io, sh
from gaussians.asset import Asset, draw
from gaussians.deformation.identity import Identity
from gaussians.types import Splats

#: Our z-up world in the y-up axes of both formats.
Y_UP = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], float)
KHR = "KHR_gaussian_splatting:"
WRITERS = {"ply": io.write_ply, "spz": io.write_spz, "glb": io.write_glb}


def make_splats(sh_degree: int = 0, count: int = 200) -> Splats:
    """An opaque, long-splatted, colourful cloud without symmetry; every fifth slot is inactive."""
    rng = np.random.default_rng(sh_degree)
    normal = rng.standard_normal
    constant = np.clip(0.8 * normal((count, 1, 3)), -1.6, 1.6)
    rest = np.clip(0.15 * normal((count, (sh_degree + 1) ** 2 - 1, 3)), -0.9, 0.9)
    fields = {
        "means": normal((count, 3)) * [0.3, 0.15, 0.2],
        "log_scales": -2.8 + 0.5 * normal((count, 3)),
        "quaternions": 3 * normal((count, 4)),
        "opacity_logits": 1.0 + normal(count),
        "sh": np.concatenate([constant, rest], axis=1),
    }
    active = jnp.arange(count) % 5 != 2
    return Splats(**{k: jnp.asarray(v, jnp.float32) for k, v in fields.items()}, active=active)


def active_rows(splats: Splats) -> dict[str, np.ndarray]:
    kept = np.flatnonzero(splats.active)
    rows = {name: np.asarray(values, float)[kept] for name, values in splats.parameters.items()}
    rows["quaternions"] /= np.linalg.norm(rows["quaternions"], axis=1, keepdims=True)
    return rows


def read_spz(path) -> dict[str, np.ndarray]:
    """Through gaussforge, which wraps Niantic's own C++ library and hands out a PLY."""
    ply = gaussforge.GaussForge().convert(path.read_bytes(), "spz", "ply")["data"]
    vertex = plyfile.PlyData.read(BytesIO(ply))["vertex"]
    names = [p.name for p in vertex.properties]

    def columns(prefix):
        return np.stack([vertex[n] for n in names if n.startswith(prefix)], axis=1)

    constant = columns("f_dc_")[:, None]
    rest = columns("f_rest_").reshape(len(constant), 3, -1) if "f_rest_0" in names else None
    return {
        "means": np.stack([vertex["x"], vertex["y"], vertex["z"]], axis=1),
        "log_scales": columns("scale_"),
        "quaternions": columns("rot_"),
        "opacity_logits": vertex["opacity"],
        "sh": constant if rest is None else np.hstack([constant, rest.transpose(0, 2, 1)]),
    }


def read_attributes(path) -> dict[str, np.ndarray]:
    """The vertex attributes of a GLB's only primitive, through pygltflib."""
    file = pygltflib.GLTF2().load(str(path))
    blob, attributes = file.binary_blob(), {}
    for name, index in vars(file.meshes[0].primitives[0].attributes).items():
        if index is not None:
            accessor = file.accessors[index]
            view = file.bufferViews[accessor.bufferView]
            dtype = {pygltflib.FLOAT: "<f4", pygltflib.UNSIGNED_SHORT: "<u2"}
            width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor.type]
            dtype, count = dtype[accessor.componentType], accessor.count * width
            values = np.frombuffer(blob, dtype, count, view.byteOffset + accessor.byteOffset)
            assert values.nbytes == view.byteLength and view.byteOffset % 4 == 0
            attributes[name] = values.reshape(-1, width)
    return attributes


def read_glb(path) -> dict[str, np.ndarray]:
    found = read_attributes(path)
    names = [
        f"{KHR}SH_DEGREE_{degree}_COEF_{n}" for degree in range(4) for n in range(2 * degree + 1)
    ]
    opacity = found[f"{KHR}OPACITY"][:, 0].astype(float)
    return {
        "means": found["POSITION"],
        "log_scales": np.log(found[f"{KHR}SCALE"]),
        "quaternions": found[f"{KHR}ROTATION"][:, [3, 0, 1, 2]],
        "opacity_logits": np.log(opacity / (1 - opacity)),
        "sh": np.stack([found[name] for name in names if name in found], axis=1),
    }


READERS = {"spz": read_spz, "glb": read_glb}


def shown(rows, direction: np.ndarray) -> np.ndarray:
    """The colours of all splats in one direction."""
    directions = np.broadcast_to(direction, rows["means"].shape)
    return np.asarray(sh.to_rgb(rows["sh"], directions))


def render(rows, world: np.ndarray) -> np.ndarray:
    """Three views of splats whose axes are `world` @ ours, as our cameras see them."""
    fields = {name: jnp.asarray(values, jnp.float32) for name, values in rows.items()}
    splats = Splats(**fields, active=jnp.ones(len(rows["means"]), bool))
    orbit = cameras.orbit(4, elevation=0.5, azimuth=0.3, width=64, height=64)
    pose = np.array(orbit.world_to_camera)
    pose[:, :3, :3] = pose[:, :3, :3] @ world.T
    views = dataclasses.replace(orbit, world_to_camera=pose)
    return np.stack([draw(splats, views[i], jnp.ones(3)).rgb for i in range(3)])


@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
@pytest.mark.parametrize(("suffix", "least"), [("spz", 40.0), ("glb", 90.0)])
def test_the_file_shows_the_same_object(tmp_path, suffix, least, sh_degree):
    splats = make_splats(sh_degree)
    path = tmp_path / "new folder" / f"cloud.{suffix}"
    WRITERS[suffix](path, splats)
    ours = render(active_rows(splats), np.eye(3))
    theirs = render(READERS[suffix](path), Y_UP)
    assert ours.std() > 0.1  # there is something to compare
    assert np.min(metrics.psnr(np.clip(theirs, 0, 1), np.clip(ours, 0, 1))) > least
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(("suffix", "turn"), [("spz", 3e-3), ("glb", 1e-6)])
def test_rotations_and_positions_are_turned_upright(tmp_path, suffix, turn):
    splats = make_splats()
    WRITERS[suffix](tmp_path / f"a.{suffix}", splats)
    rows, read = active_rows(splats), READERS[suffix](tmp_path / f"a.{suffix}")
    bound = 2.0**-13 if suffix == "spz" else 0.0
    assert np.abs(read["means"] - rows["means"] @ Y_UP.T).max() <= bound + 1e-12
    np.testing.assert_allclose(np.linalg.norm(read["quaternions"], axis=1), 1, atol=1e-6)
    wanted = Rotation.from_matrix(Y_UP) * Rotation.from_quat(rows["quaternions"][:, [1, 2, 3, 0]])
    found = Rotation.from_quat(read["quaternions"][:, [1, 2, 3, 0]])
    assert (wanted.inv() * found).magnitude().max() < turn


def test_spz_rounds_as_documented(tmp_path):
    splats = make_splats(3)
    io.write_spz(tmp_path / "a.spz", splats)
    rows, read = active_rows(splats), read_spz(tmp_path / "a.spz")

    def opacity(logits):
        return 1 / (1 + np.exp(-logits))

    def error(name):
        return np.abs(read[name] - rows[name]).max()

    assert error("log_scales") <= 1 / 32 + 1e-6
    gap = np.abs(opacity(read["opacity_logits"]) - opacity(rows["opacity_logits"])).max()
    assert gap <= 0.5 / 255 + 1e-6
    constant = np.abs(read["sh"] - rows["sh"])[:, 0].max()
    assert constant <= 0.5 / (255 * 0.15) + 1e-6
    # The coefficients above degree 0 are turned, each by a mixture of at most 7 rounded ones.
    seen = np.array([0.6, 0.0, 0.8])
    assert np.abs(shown(rows, seen) - shown(read, Y_UP @ seen)).max() < 0.03
    assert np.abs(shown(rows, seen) - shown(read, seen)).max() > 0.1


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Splats with harmonics of degree 3, and the same from a GLB."""
    splats, path = make_splats(3, 20), tmp_path_factory.mktemp("glb") / "a.glb"
    io.write_glb(path, splats)
    return active_rows(splats), read_glb(path)


@given(direction=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda d: np.linalg.norm(d) > 0.1))
@settings(max_examples=50, deadline=None)
def test_colours_turn_with_the_axes(coloured, direction):
    seen = np.array(direction) / np.linalg.norm(direction)
    ours, theirs = shown(coloured[0], seen), shown(coloured[1], Y_UP @ seen)
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_spz_precision_of_positions(tmp_path):
    splats = make_splats()
    io.write_spz(tmp_path / "a.spz", splats, fractional_bits=20)
    error = read_spz(tmp_path / "a.spz")["means"] - active_rows(splats)["means"] @ Y_UP.T
    assert np.abs(error).max() <= 2.0**-21
    far = dataclasses.replace(splats, means=splats.means.at[0, 1].set(-8.0))
    with pytest.raises(ValueError, match=r"coordinate 8 is beyond the 8 units that .*a\.spz holds"):
        io.write_spz(tmp_path / "a.spz", far, fractional_bits=20)
    io.write_spz(tmp_path / "a.spz", far, fractional_bits=19)
    assert read_spz(tmp_path / "a.spz")["means"][0, 2] == 8.0


@pytest.mark.parametrize("sh_degree", [0, 3])
def test_glb_follows_the_specification(tmp_path, sh_degree):
    splats = make_splats(sh_degree)
    io.write_glb(tmp_path / "a.glb", splats)
    content = (tmp_path / "a.glb").read_bytes()
    assert content[:8] == b"glTF\2\0\0\0"
    assert int.from_bytes(content[8:12], "little") == len(content) and len(content) % 4 == 0
    file = pygltflib.GLTF2().load(str(tmp_path / "a.glb"))
    assert file.asset.version == "2.0" and file.buffers[0].byteLength == len(file.binary_blob())
    assert file.extensionsUsed == ["KHR_gaussian_splatting"] and not file.extensionsRequired
    (primitive,) = file.meshes[0].primitives
    assert primitive.mode == pygltflib.POINTS
    assert primitive.extensions == {
        "KHR_gaussian_splatting": {
            "kernel": "ellipse",
            "colorSpace": "srgb_rec709_display",
            "projection": "perspective",
            "sortingMethod": "cameraDistance",
        }
    }
    found, rows = read_attributes(tmp_path / "a.glb"), active_rows(splats)
    assert len(found) == 5 + (sh_degree + 1) ** 2
    assert {len(values) for values in found.values()} == {160}
    position = file.accessors[primitive.attributes.POSITION]
    assert position.min == found["POSITION"].min(0).tolist()
    assert position.max == found["POSITION"].max(0).tolist()
    np.testing.assert_allclose(found[f"{KHR}SCALE"], np.exp(rows["log_scales"]), rtol=1e-6)
    opacity = 1 / (1 + np.exp(-rows["opacity_logits"]))
    np.testing.assert_allclose(found[f"{KHR}OPACITY"][:, 0], opacity, rtol=1e-6)
    assert file.accessors[primitive.attributes.COLOR_0].normalized
    colour = found["COLOR_0"] / 65535
    np.testing.assert_allclose(colour[:, 3], opacity, atol=1e-5)
    encoded = np.where(  # the sRGB curve, forwards
        colour <= 0.0031308, 12.92 * colour, 1.055 * colour ** (1 / 2.4) - 0.055
    )
    shown = np.clip(0.5 + 0.28209479 * rows["sh"][:, 0], 0, 1)
    np.testing.assert_allclose(encoded[:, :3], shown, atol=2e-4)


@pytest.mark.parametrize("suffix", ["spz", "glb"])
def test_splats_that_cannot_be_written(tmp_path, suffix):
    splats, path = make_splats(), tmp_path / f"a.{suffix}"
    with pytest.raises(ValueError, match="no active splat"):
        WRITERS[suffix](path, dataclasses.replace(splats, active=jnp.zeros(200, bool)))
    broken = dataclasses.replace(splats, means=splats.means.at[1].set(jnp.nan))
    with pytest.raises(ValueError, match=r"1 of the 160 active .*the first is slot 1\)"):
        WRITERS[suffix](path, broken)
    idle = dataclasses.replace(splats, means=splats.means.at[2].set(jnp.nan))
    WRITERS[suffix](path, idle)  # slot 2 is inactive
    assert len(READERS[suffix](path)["means"]) == 160


def test_spz_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gsply", None)
    with pytest.raises(ValueError, match=r"pip install 'd4d_jax\[formats\]'"):
        io.check_format(".spz")
    with pytest.raises(ValueError, match=r"pip install 'd4d_jax\[formats\]'"):
        io.write_spz(tmp_path / "a.spz", make_splats())
    io.check_format(".glb")
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "gsply", types.ModuleType("gsply"))  # an old one
    with pytest.raises(ValueError, match=r"0\.4\.6 or later"):
        io.check_format(".SPZ")


@dataclasses.dataclass(frozen=True)
class Rise(Identity):
    """Everything goes up by one unit."""

    def apply(self, params, splats, t):
        return dataclasses.replace(splats, means=splats.means + t * jnp.array([0.0, 0.0, 1.0]))


@pytest.fixture(scope="module")
def asset() -> Asset:
    return Asset(make_splats(), Rise(), {})


def test_export_by_suffix(tmp_path, asset):
    heights = active_rows(asset.splats)["means"][:, 2]
    for name in ("a.ply", "b.SPZ", "c.glb"):
        io.export(tmp_path / name, asset, 0.5)
    vertex = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    np.testing.assert_allclose(vertex["z"], heights + 0.5, atol=1e-6)
    for read in (read_spz(tmp_path / "b.SPZ"), read_glb(tmp_path / "c.glb")):
        np.testing.assert_allclose(read["means"][:, 1], heights + 0.5, atol=2e-4)
    io.export(tmp_path / "a.ply", asset)  # replaces; t = 0
    vertex = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    np.testing.assert_array_equal(vertex["z"], heights.astype(np.float32))
    with pytest.raises(ValueError, match=r"written as \.ply, \.spz, \.glb, not as '\.obj'"):
        io.export(tmp_path / "a.obj", asset)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\]; got 1.5"):
        io.export(tmp_path / "d.ply", asset, 1.5)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("suffix", [".ply", ".spz", ".glb"])
def test_sequences_are_replaced_whole(tmp_path, asset, suffix):
    folder = tmp_path / "out" / "frames"
    io.export_sequence(folder, asset, np.linspace(0, 1, 3), suffix=suffix)
    names = [f"000{i}{suffix}" for i in range(3)]
    assert sorted(os.listdir(folder)) == [*names, "frames.json"]
    listed = json.loads((folder / "frames.json").read_text())["frames"]
    assert listed == [{"file": names[i], "t": i / 2} for i in range(3)]
    assert os.listdir(folder.parent) == ["frames"]

    (folder / "notes.txt").write_text("mine")
    before = (folder / names[1]).read_bytes()
    with pytest.raises(FileExistsError, match=f"frames already holds 0000{suffix}: choose another"):
        io.export_sequence(folder, asset, [0.25], suffix=suffix)
    with pytest.raises(ValueError, match=r"got 1\.25"):
        io.export_sequence(folder, asset, [0.25, 1.25], suffix=suffix, overwrite=True)
    assert (folder / names[1]).read_bytes() == before
    assert sorted(os.listdir(folder)) == [*names, "frames.json", "notes.txt"]

    io.export_sequence(folder, asset, [0.25], overwrite=True)  # PLY by default
    assert sorted(os.listdir(folder)) == ["0000.ply", "frames.json", "notes.txt"]
    vertex = plyfile.PlyData.read(folder / "0000.ply")["vertex"]
    heights = active_rows(asset.splats)["means"][:, 2]
    np.testing.assert_allclose(vertex["z"], heights + 0.25, atol=1e-6)
    assert os.listdir(folder.parent) == ["frames"]


def test_sequences_that_cannot_be_written(tmp_path, asset):
    with pytest.raises(ValueError, match="no timestamps"):
        io.export_sequence(tmp_path / "frames", asset, [])
    with pytest.raises(ValueError, match=r"not as '\.npz'"):
        io.export_sequence(tmp_path / "frames", asset, [0.0], suffix=".npz")
    assert not list(tmp_path.iterdir())
