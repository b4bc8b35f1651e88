"""Rules of placement, on shapes; what they do to a run is in test_scale.py."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from d4d_jax.train import sharding

MESH = AbstractMesh((2, 4), ("data", "fsdp"))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def specs(tree, rules):
    return jax.tree.map(lambda place: place.spec, sharding.shardings(tree, MESH, rules))


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((3, 3, 64, 64), P(None, None, None, "fsdp")),  # of equal axes the last
        ((3, 3, 128, 64), P(None, None, "fsdp")),
        ((8192,), P("fsdp")),
        ((64,), P()),  # small
        ((8191, 3), P()),  # no axis can be split
    ],
)
def test_the_largest_axis_is_split(sizes, expected):
    tree = {"params": {"kernel": shape(*sizes)}, "frozen": {"kernel": shape(*sizes)}}
    found = specs(tree, sharding.STATE_RULES)
    assert found["params"]["kernel"] == expected and found["frozen"]["kernel"] == P()


def test_the_first_rule_that_occurs_counts():
    tree = {"a": {"kernel": shape(8, 8), "bias": shape(8)}, "b": shape(4, 8)}
    rules = [("bias", "replicated"), ("^a/", (None, "fsdp")), ("", ("data",))]
    assert specs(tree, rules) == {"a": {"kernel": P(None, "fsdp"), "bias": P()}, "b": P("data")}


def test_batches_are_split_by_clips_or_by_clips_and_frames():
    batch = {"dynamic": shape(8, 24, 4, 4, 4), "camera": shape(8, 24, 4, 4), "motion": shape(8)}
    by_clips = specs(batch, sharding.BATCH_RULES)
    assert set(map(str, by_clips.values())) == {str(P(("data", "fsdp")))}
    by_frames = specs(batch, sharding.FRAME_RULES)
    assert by_frames["dynamic"] == by_frames["camera"] == P("data", "fsdp")
    assert by_frames["motion"] == P("data")


def test_wrong_rules_are_named():
    tree = {"params": {"kernel": shape(6, 8)}}
    with pytest.raises(ValueError, match="No sharding rule matches 'params/kernel'"):
        specs(tree, [("bias", "replicated")])
    with pytest.raises(ValueError, match="'replicated', 'largest' or axes, not 'smallest'"):
        specs(tree, [("", "smallest")])
    with pytest.raises(ValueError, match=r"into 4 parts along fsdp: .* 6 elements"):
        specs(tree, [("", ("fsdp",))])


def test_frames_must_divide():
    sharding.check_batch(2, MESH, num_frames=24, by_frames=True)
    with pytest.raises(ValueError, match="Clips of 23 frames cannot be split over fsdp=4"):
        sharding.check_batch(2, MESH, num_frames=23, by_frames=True)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        sharding.check_batch(8, MESH, accumulate=0)


def test_constraining_without_a_mesh_is_the_identity():
    x = jnp.ones((3, 2))
    assert sharding.constrain(x, "data") is x


def test_bytes_of_a_device_are_counted():
    tree = {"a": jnp.zeros((10, 3)), "b": jnp.zeros((2,), jnp.int8)}
    assert sharding.bytes_per_device(tree) == 122
