"""Data sets: records, files, splits, resuming, checksums, mistakes; TFDS without TensorFlow."""

import dataclasses
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import msgpack
import numpy as np
import pytest

from d4d_jax import clips
from d4d_jax.data import bulk, pipeline, records, shards, synthetic

SHIPPED = Path(clips.__file__).parent / "assets" / "clips"
HALVES = shards.Fractions(val=0.3, test=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight clips of four assets, two animations of each, and front frames in the first."""
    root = tmp_path_factory.mktemp("clips")
    for i in range(8):
        clip = synthetic.make_clip(i, num_frames=4, size=16, samples=1)
        clip = dataclasses.replace(clip, caption=f"a thing, number {i}")
        if i == 0:
            clip = dataclasses.replace(clip, front=clip.dynamic, front_alpha=clip.dynamic_alpha)
        name = f"thing {i // 2} ü-{i % 2}"
        clips.write_clip(clip, root / name)
        facts = {"asset": f"thing {i // 2}.glb", "action": f"move {i % 2}", "licence": "CC0-1.0"}
        (root / name / "clip.json").write_text(json.dumps(facts), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def dataset(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("dataset")
    shards.build(folder, out, fractions=HALVES, shard_clips=2)
    return out


def all_records(dataset, views=records.VIEWS):
    splits = records.read_index(dataset)["splits"]
    return [record for split in splits for record in records.Records(dataset, split, views=views)]


def assert_equal(record, other):
    assert record.keys() == other.keys()
    for name, value in record.items():
        assert type(value) is type(other[name])
        np.testing.assert_array_equal(value, other[name])


def test_every_clip_is_in_the_data_set_as_it_was(folder, dataset):
    found = {record["clip"]: record for record in all_records(dataset)}
    assert sorted(found) == sorted(path.name for path in folder.iterdir())
    for name, record in found.items():
        assert_equal(record, records.read_folder(folder / name))
        assert record["asset"] == name.split(" ü")[0] + ".glb" and record["licence"] == "CC0-1.0"
        for background in (clips.WHITE, (0.2, 0.5, 0.0)):
            clip = clips.read_clip(folder / name, background=background)
            again = records.to_clip(record, background=background)
            for view in ("dynamic", "static", "front"):
                frames = getattr(clip, view)
                if frames is None:
                    assert getattr(again, view) is None
                    continue
                np.testing.assert_allclose(getattr(again, view), frames, atol=1e-6)
                np.testing.assert_array_equal(
                    getattr(again, f"{view}_alpha"), getattr(clip, f"{view}_alpha")
                )
            np.testing.assert_allclose(
                again.camera.world_to_camera, clip.camera.world_to_camera, atol=1e-6
            )
            np.testing.assert_array_equal(again.camera.intrinsics, clip.camera.intrinsics)
            assert again.motion == pytest.approx(clip.motion, rel=1e-6)
            assert again.caption == clip.caption


def test_records_can_be_read_without_this_library(folder):
    record = records.read_folder(next(folder.iterdir()))
    entries = msgpack.unpackb(records.encode(record))
    frames = entries["dynamic"]
    data = np.frombuffer(zlib.decompress(frames["zlib"]), frames["dtype"])
    np.testing.assert_array_equal(data.reshape(frames["shape"]), record["dynamic"])
    assert entries["caption"] == record["caption"] and entries["motion"] == record["motion"]


def test_what_is_not_wanted_is_not_decoded(dataset):
    for record in all_records(dataset, views=("dynamic",)):
        assert "dynamic" in record and "static" not in record and "front" not in record


def test_an_asset_is_in_one_split_whatever_else_there_is(folder, dataset, tmp_path):
    split_of = {}
    for split in records.read_index(dataset)["splits"]:
        for record in records.Records(dataset, split):
            assert split_of.setdefault(record["asset"], split) == split
    assert len(set(split_of.values())) > 1
    names = [path.name for path in sorted(folder.iterdir())][:4]
    shards.build(folder, tmp_path / "part", names=names, fractions=HALVES)
    for split in records.read_index(tmp_path / "part")["splits"]:
        assert {r["asset"] for r in records.Records(tmp_path / "part", split)} <= {
            asset for asset, other in split_of.items() if other == split
        }


def test_splits_have_about_their_share():
    fractions = shards.Fractions(val=0.1, test=0.2)
    drawn = [shards.split_of(f"asset {i}", fractions) for i in range(4000)]
    assert drawn.count("val") / 4000 == pytest.approx(0.1, abs=0.02)
    assert drawn.count("test") / 4000 == pytest.approx(0.2, abs=0.02)
    # More validation does not move what was a test asset.
    wider = shards.Fractions(val=0.3, test=0.2)
    assert all(
        (old == "test") == (shards.split_of(f"asset {i}", wider) == "test")
        for i, old in enumerate(drawn)
    )


def test_files_hold_no_more_than_asked_and_the_index_counts_them(dataset):
    index = records.read_index(dataset)
    assert index["shapes"] == [[4, 16, 16]]
    for split in index["splits"].values():
        counts = [entry["clips"] for entry in split["files"].values()]
        assert sum(counts) == split["clips"] and max(counts) <= 2


def test_equal_clips_give_equal_bytes_with_any_number_of_workers(folder, dataset, tmp_path):
    shards.build(folder, tmp_path, fractions=HALVES, shard_clips=2, workers=2)
    assert records.read_index(tmp_path) == records.read_index(dataset)
    for file in dataset.glob("*.array_record"):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_a_stopped_build_goes_on_with_the_files_that_are_missing(folder, tmp_path, monkeypatch):
    read, reads = records.read_folder, []

    def stop_in_the_middle(path):
        reads.append(path)
        if len(reads) == 4:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(records, "read_folder", stop_in_the_middle)
    with pytest.raises(KeyboardInterrupt):
        shards.build(folder, tmp_path, fractions=HALVES, shard_clips=2)
    assert not records.is_dataset(tmp_path)
    finished = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.array_record")}
    assert finished
    shards.build(folder, tmp_path, fractions=HALVES, shard_clips=2)
    assert all(file.stat().st_mtime_ns == written for file, written in finished.items())
    assert len(reads) < 8 + 4
    assert len(all_records(tmp_path)) == 8


def test_a_clip_that_cannot_be_read_costs_itself(folder, tmp_path):
    source = tmp_path / "clips"
    shutil.copytree(folder, source)
    broken = source / "thing 1 ü-0"
    (broken / "multi_frame2.png").write_bytes(b"no image")
    index, failures = shards.build(source, tmp_path / "out", fractions=HALVES)
    assert sum(split["clips"] for split in index["splits"].values()) == 7
    ((name, reason),) = failures
    assert name == broken.name and "multi_frame2.png' cannot be decoded" in reason
    table = (tmp_path / "out" / "failures.tsv").read_text(encoding="utf-8").splitlines()
    assert table[0] == "clip\treason" and len(table) == 2


def test_another_data_set_is_not_overwritten(folder, dataset, tmp_path):
    before = {file: file.read_bytes() for file in dataset.glob("[!.]*")}
    with pytest.raises(FileExistsError, match="holds a data set of other clips or settings"):
        shards.build(folder, dataset, fractions=shards.Fractions(), shard_clips=2)
    assert {file: file.read_bytes() for file in dataset.glob("[!.]*")} == before
    shards.build(folder, dataset, fractions=HALVES, shard_clips=2)  # the same again
    assert {file: file.read_bytes() for file in dataset.glob("[!.]*")} == before


def test_damage_is_found_and_named(dataset, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    assert records.verify(copy) == len(list(copy.glob("*.array_record")))
    victim = sorted(copy.glob("*.array_record"))[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ValueError, match=f"{victim.name}' is damaged"):
        records.verify(copy)
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=f"{victim.name}' is missing"):
        records.verify(copy)


def test_mistakes_are_told(folder, dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set in .*absent"):
        records.Records(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no split 'dev', only train"):
        records.Records(dataset, "dev")
    with pytest.raises(IndexError, match="no clip 99"):
        records.Records(dataset)[99]
    with pytest.raises(ValueError, match=r"val=0\.5 and test=0\.5"):
        shards.Fractions(val=0.5, test=0.5)
    with pytest.raises(ValueError, match="shard_clips must be at least 1; got 0"):
        shards.build(folder, tmp_path, shard_clips=0)
    with pytest.raises(FileNotFoundError, match=r"no clip folder .*ghost"):
        shards.build(folder, tmp_path, names=["ghost"])
    with pytest.raises(ValueError, match="7 bytes are no record"):
        records.decode(b"rubbish")
    future = tmp_path / "future"
    shutil.copytree(dataset, future)
    text = (future / "dataset.json").read_text(encoding="utf-8")
    (future / "dataset.json").write_text(text.replace('"1.0.0"', '"9.0.0"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"version 9.0.0, and this library reads 1.0.0"):
        records.Records(future)


def test_folders_are_told_apart_by_their_files(tmp_path):
    (tmp_path / "a").write_text("1")
    first = bulk.fingerprint(tmp_path)
    assert bulk.fingerprint(tmp_path) == first
    (tmp_path / "b").write_text("2")
    assert bulk.fingerprint(tmp_path) != first


def test_the_pipeline_reads_a_data_set_like_the_clips_themselves(tmp_path):
    names = ["crab", "cube", "fox"]
    shards.build(SHIPPED, tmp_path, names=names, fractions=shards.Fractions(0.0, 0.0))
    clips_of = {path.name: i for i, path in enumerate(pipeline.find_clips(SHIPPED))}
    for size in (None, 16):
        source = pipeline.ClipSource(tmp_path, size=size)
        folders = pipeline.ClipSource(SHIPPED, size=size)
        assert source.num_frames == 24
        for i, record in enumerate(records.Records(tmp_path)):
            sample, expected = source[i], folders[clips_of[record["clip"]]]
            for name in expected:
                np.testing.assert_array_equal(sample[name], expected[name])
            clip = clips.read_clip(SHIPPED / record["clip"])
            direct = pipeline.element(clip if size is None else clip.resized(size, size))
            for name in ("dynamic", "static", "camera", "motion"):
                np.testing.assert_allclose(sample[name], direct[name], atol=2e-5)
    batch = next(iter(pipeline.make_dataset(tmp_path, batch_size=3)))
    assert batch["dynamic"].shape == (3, 24, 64, 64, 4)


_TFDS = """
import sys
import tensorflow_datasets as tfds
from d4d_jax.data import tfds_orbits
dataset, folder = sys.argv[1:]
builder = tfds.builder("orbit_clips", records=dataset, data_dir=folder)
builder.download_and_prepare()
print(builder.data_dir)
assert len(tfds.data_source("orbit_clips", split="train", data_dir=folder))
assert "tensorflow" not in sys.modules
"""


def test_tfds_holds_the_same_and_needs_no_tensorflow(dataset, tmp_path):
    command = [sys.executable, "-c", _TFDS, str(dataset), str(tmp_path)]
    prepared = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    prepared = prepared.splitlines()[-1]
    assert Path(prepared).parent.name == "orbit_clips"
    assert records.is_dataset(prepared)
    for split in records.read_index(dataset)["splits"]:
        for views in (records.VIEWS, ("static",)):
            theirs = records.Records(prepared, split, views=views)
            ours = records.Records(dataset, split, views=views)
            assert theirs.shapes == ours.shapes and len(theirs) == len(ours)
            for record, expected in zip(theirs, ours, strict=True):
                assert_equal(record, expected)
    with pytest.raises(ValueError, match="no split 'dev', only"):
        records.Records(prepared, "dev")


def test_tfds_wants_clips_of_one_size(folder, tmp_path):
    source = tmp_path / "clips"
    shutil.copytree(folder / "thing 1 ü-0", source / "small")
    clips.write_clip(synthetic.make_clip(9, num_frames=4, size=20, samples=1), source / "large")
    shards.build(source, tmp_path / "out")
    from d4d_jax.data import tfds_orbits

    with pytest.raises(ValueError, match=r"the shapes \[\[4, 16, 16\], \[4, 20, 20\]\]"):
        tfds_orbits.OrbitClips(records=tmp_path / "out", data_dir=tmp_path / "tfds")
    with pytest.raises(FileNotFoundError, match="no data set in"):
        tfds_orbits.OrbitClips(data_dir=tmp_path / "tfds")
    assert pipeline.ClipSource(tmp_path / "out", size=16)[0]["dynamic"].shape == (4, 16, 16, 4)
    with pytest.raises(ValueError, match="one length and size"):
        pipeline.ClipSource(tmp_path / "out")
