import dataclasses

import gsply
import jax
import jax.numpy as jnp
import numpy as np
import plyfile
import pytest

from gaussians import io
from gaussians.types import Splats

ATTRIBUTES = "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2".split()
TAIL = "opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split()


def make_splats(sh_degree: int = 0, capacity: int = 7) -> Splats:
    rng = np.random.default_rng(0)
    shapes = {"means": 3, "log_scales": 3, "quaternions": 4}
    fields = {
        name: jnp.asarray(rng.standard_normal((capacity, size)), jnp.float32)
        for name, size in shapes.items()
    }
    return Splats(
        **fields,
        opacity_logits=jnp.asarray(rng.standard_normal(capacity), jnp.float32),
        sh=jnp.asarray(rng.standard_normal((capacity, (sh_degree + 1) ** 2, 3)), jnp.float32),
        active=jnp.asarray(np.arange(capacity) % 3 != 1),
    )


@pytest.mark.parametrize("sh_degree", [0, 1, 2, 3])
def test_ply_opens_in_independent_readers(tmp_path, sh_degree):
    splats = make_splats(sh_degree)
    path = tmp_path / "new folder" / "cloud.ply"
    io.write_ply(path, splats)
    kept = np.flatnonzero(splats.active)
    num_rest = 3 * ((sh_degree + 1) ** 2 - 1)

    table = plyfile.PlyData.read(path)
    assert not table.text and table.byte_order == "<"
    names = [p.name for p in table["vertex"].properties]
    assert names == ATTRIBUTES + [f"f_rest_{i}" for i in range(num_rest)] + TAIL
    vertex = table["vertex"]
    np.testing.assert_array_equal(vertex["y"], splats.means[kept, 1])
    np.testing.assert_array_equal(vertex["f_dc_2"], splats.sh[kept, 0, 2])
    np.testing.assert_array_equal(vertex["opacity"], splats.opacity_logits[kept])
    np.testing.assert_array_equal(vertex["scale_1"], splats.log_scales[kept, 1])
    if sh_degree:  # channel-major: the last third is blue
        blue = vertex[f"f_rest_{num_rest - 1}"]
        np.testing.assert_array_equal(blue, splats.sh[kept, -1, 2])

    other = gsply.plyread(path)
    np.testing.assert_array_equal(other.means, splats.means[kept])
    np.testing.assert_array_equal(other.scales, splats.log_scales[kept])
    np.testing.assert_array_equal(other.opacities, splats.opacity_logits[kept])
    np.testing.assert_array_equal(other.sh0, splats.sh[kept, 0])
    np.testing.assert_array_equal(other.shN, splats.sh[kept, 1:])
    norms = np.linalg.norm(splats.quaternions[kept], axis=-1, keepdims=True)
    np.testing.assert_allclose(other.quats, splats.quaternions[kept] / norms, rtol=1e-6)


def test_ply_reads_back(tmp_path):
    splats = make_splats(2)
    io.write_ply(tmp_path / "a.ply", splats)
    kept = np.flatnonzero(splats.active)
    read = io.read_ply(tmp_path / "a.ply", capacity=9)
    np.testing.assert_array_equal(read.active, np.arange(9) < len(kept))
    for name in ("means", "log_scales", "opacity_logits", "sh"):
        np.testing.assert_array_equal(getattr(read, name)[: len(kept)], getattr(splats, name)[kept])
    turns = splats.quaternions[kept] / np.linalg.norm(splats.quaternions[kept], axis=1)[:, None]
    np.testing.assert_allclose(read.quaternions[: len(kept)], turns, rtol=1e-6)
    np.testing.assert_array_equal(read.quaternions[len(kept) :], [[1, 0, 0, 0]] * 4)
    io.write_ply(tmp_path / "b.ply", io.read_ply(tmp_path / "a.ply"))
    assert len(io.read_ply(tmp_path / "b.ply")) == len(kept)
    with pytest.raises(ValueError, match=r"a\.ply holds 5 splats, more than a capacity of 4"):
        io.read_ply(tmp_path / "a.ply", capacity=4)


def test_ply_of_another_writer_is_read_by_name(tmp_path):
    """Attributes shuffled, doubles, one unknown attribute, comments, a second element."""
    splats = make_splats(1)
    io.write_ply(tmp_path / "ours.ply", splats)
    vertex = plyfile.PlyData.read(tmp_path / "ours.ply")["vertex"]
    names = [p.name for p in vertex.properties if not p.name.startswith("n")][::-1]
    shuffled = np.empty(len(vertex.data), [("mass", "u1")] + [(name, "f8") for name in names])
    for name in names:
        shuffled[name] = vertex[name]
    faces = plyfile.PlyElement.describe(np.zeros(1, [("count", "i4")]), "face")
    elements = [plyfile.PlyElement.describe(shuffled, "vertex"), faces]
    plyfile.PlyData(elements, byte_order="<", comments=["element of surprise"]).write(
        tmp_path / "theirs.ply"
    )
    ours, theirs = io.read_ply(tmp_path / "ours.ply"), io.read_ply(tmp_path / "theirs.ply")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_splats_that_cannot_be_written(tmp_path):
    splats = make_splats()
    empty = dataclasses.replace(splats, active=jnp.zeros(7, bool))
    with pytest.raises(ValueError, match="no active splat"):
        io.write_ply(tmp_path / "a.ply", empty)
    broken = dataclasses.replace(splats, sh=splats.sh.at[2].set(jnp.nan).at[1].set(jnp.inf))
    with pytest.raises(ValueError, match=r"1 of the 5 active .*the first is slot 2"):
        io.write_ply(tmp_path / "a.ply", broken)
    huge = dataclasses.replace(splats, log_scales=splats.log_scales.at[3, 1].set(89.0))
    with pytest.raises(ValueError, match="the first is slot 3"):
        io.write_ply(tmp_path / "a.ply", huge)
    flat = dataclasses.replace(splats, quaternions=splats.quaternions.at[5].set(0.0))
    with pytest.raises(ValueError, match="the first is slot 5"):
        io.write_ply(tmp_path / "a.ply", flat)
    assert not list(tmp_path.iterdir())


def test_damaged_ply_files_are_named(tmp_path):
    path = tmp_path / "cloud.ply"
    io.write_ply(path, make_splats(1))
    content = path.read_bytes()

    def refused(changed: bytes, sentence: str) -> None:
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"cloud\.ply .*{sentence}"):
            io.read_ply(path)

    refused(content[:-1], "is cut off: 5 vertices take 520 bytes .* only 519")
    refused(content[:40], "lacks the header")
    refused(b"\x89PNG" + content, "lacks the header")
    refused(content.replace(b"opacity", b"opaque_"), "has no attribute opacity")
    refused(content.replace(b"f_rest_8", b"unknown8"), "has 8 attributes f_rest_")
    refused(content.replace(b"binary_little_endian", b"ascii"), "format ascii")
    refused(content.replace(b"element vertex", b"element chunks"), "does not begin with vertices")
    refused(content.replace(b"float nx", b"quad nx"), "cannot be read: .'quad nx'")
    with pytest.raises(FileNotFoundError):
        io.read_ply(tmp_path / "absent.ply")
