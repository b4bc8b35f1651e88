import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaussians import io
from gaussians.asset import Asset
from gaussians.deformation import build
from gaussians.deformation.identity import Identity
from gaussians.initialize import random_cube


@pytest.fixture(scope="module")
def asset() -> Asset:
    splats = random_cube(20, key=jax.random.key(0), capacity=32, sh_degree=1)
    base = {"name": "hexplane", "spatial_resolution": 4, "time_resolution": 3, "channels": 2}
    field = build({"name": "lifespan", "base": base, "knots": 3})
    shapes = jax.eval_shape(field.init, jax.random.key(1), splats)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes)
    meta = {"seconds": 1.5, "implementation": None, "deformation": {"name": "lifespan"}}
    return Asset(splats, field, params, (0.0, 0.5, 1.0), meta)


def assert_equal_bits(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_asset_round_trips_bitwise(tmp_path, asset):
    path = tmp_path / "sub" / "asset.npz"
    io.save_asset(path, asset)
    loaded = io.load_asset(path)
    assert_equal_bits(loaded.splats, asset.splats)
    assert_equal_bits(loaded.params, asset.params)
    assert loaded.deformation == asset.deformation
    assert hash(loaded.deformation) == hash(asset.deformation)  # it is a static argument of jit
    assert loaded.background == asset.background and loaded.meta == asset.meta
    assert_equal_bits(loaded.at(0.3), asset.at(0.3))
    first = path.read_bytes()
    io.save_asset(path, loaded)
    assert path.read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == ["asset.npz"]


def test_asset_keeps_every_kind_of_array(tmp_path, asset):
    params = {
        "half": [jnp.array([1.5, jnp.nan, -0.0], jnp.bfloat16), jnp.array(3, jnp.int32)],
        "pair": (jnp.zeros((0, 2)), None, {"empty": {}}),
        "flags": jnp.array([True, False]),
    }
    io.save_asset(tmp_path / "a.npz", dataclasses.replace(asset, params=params))
    assert_equal_bits(io.load_asset(tmp_path / "a.npz").params, params)


@dataclasses.dataclass(frozen=True)
class Drift(Identity):
    """A field of a user's own: all splats move along a line, each at its own speed."""

    axis: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def init(self, key, splats):
        del key
        return {"speed": jnp.zeros(len(splats)), "steps": jnp.array(0)}

    def apply(self, params, splats, t):
        moved = splats.means + t * params["speed"][:, None] * jnp.array(self.axis)
        return dataclasses.replace(splats, means=moved)

    def gather(self, params, source):
        return {**params, "speed": params["speed"][source]}


SMALL = {"name": "hexplane", "spatial_resolution": 4, "time_resolution": 3, "channels": 2}
OWN = {"name": f"{__name__}:Drift", "axis": (0.0, 1.0, 0.0)}


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "identity"},
        {**SMALL, "opacity": True},
        {"name": "control_points", "num_nodes": 12},
        {"name": "lifespan", "base": {"name": "identity"}},
        {"name": "lifespan", "base": SMALL, "knots": 2},
        OWN,
        {"name": "lifespan", "base": OWN},
    ],
    ids=lambda spec: spec["name"],
)
def test_every_field_survives(tmp_path, asset, spec):
    field = build(spec)
    leaves, tree = jax.tree.flatten(field.init(jax.random.key(1), asset.splats))
    rng = np.random.default_rng(0)
    leaves = [jnp.asarray(rng.normal(0, 5, x.shape), x.dtype) for x in leaves]
    before = dataclasses.replace(
        asset, deformation=field, params=jax.tree.unflatten(tree, leaves), meta={}
    )
    io.save_asset(tmp_path / "asset.npz", before)
    own = field if "Drift" in str(spec) else None  # A file never chooses code to import.
    if own:
        with pytest.raises(ValueError, match="Drift, which is not part of the library; build it"):
            io.load_asset(tmp_path / "asset.npz")
    after = io.load_asset(tmp_path / "asset.npz", deformation=own)
    assert after.deformation == field
    assert_equal_bits(after.params, before.params)
    assert_equal_bits(after.at(0.7), before.at(0.7))


def test_a_field_of_another_version_is_named(tmp_path, asset):
    path = tmp_path / "asset.npz"
    io.save_asset(path, dataclasses.replace(asset, deformation=build({"name": "identity"})))
    with np.load(path) as archive:
        arrays = dict(archive)
    description = json.loads(str(arrays["json"]))
    for spec, reason in (
        ({"name": "identity", "speed": 2}, "unexpected keyword argument 'speed'"),
        ({"name": "wobble"}, "Unknown deformation 'wobble'"),
    ):
        arrays["json"] = np.array(json.dumps({**description, "deformation": spec}))
        np.savez(path, **arrays)
        with pytest.raises(
            ValueError, match=rf"field of .*asset\.npz cannot be built here: .*{reason}"
        ):
            io.load_asset(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, asset):
    path = tmp_path / "asset.npz"
    io.save_asset(path, asset)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="do not fit into JSON"):
        io.save_asset(path, dataclasses.replace(asset, meta={"field": object()}))
    with pytest.raises(ValueError, match="params/net is a object"):
        io.save_asset(path, dataclasses.replace(asset, params={"net": object()}))
    with pytest.raises(ValueError, match="text without '/'"):
        io.save_asset(path, dataclasses.replace(asset, params={"a/b": jnp.zeros(1)}))
    with pytest.raises(ValueError, match="slot"):
        io.write_ply(path, dataclasses.replace(asset.splats, means=asset.splats.means * jnp.nan))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["asset.npz"]


def test_damaged_assets_are_named(tmp_path, asset):
    path = tmp_path / "asset.npz"
    io.save_asset(path, asset)
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    cuts = [content[:end] for end in np.linspace(1, len(content) - 1, 23).astype(int)]
    for damaged in (b"", b"ply", flipped, *cuts):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"asset\.npz is not a complete asset file"):
            io.load_asset(path)
    for foreign in ([], {"format": "d4d_jax gaussians 1", "splats": "many"}):
        np.savez(path, json=json.dumps(foreign))
        with pytest.raises(ValueError, match=r"asset\.npz is not a complete asset file"):
            io.load_asset(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"array\.npy is not a complete asset file"):
        io.load_asset(tmp_path / "array.npy")
    np.savez(path, json=json.dumps({"format": "another 2"}))
    with pytest.raises(ValueError, match="its format is 'another 2'"):
        io.load_asset(path)
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(ValueError, match="not a complete asset file"):
        io.load_asset(path)
    with pytest.raises(FileNotFoundError, match=r"There is no asset .*absent\.npz"):
        io.load_asset(tmp_path / "absent.npz")
