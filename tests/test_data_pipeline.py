"""The grain pipeline: order, resumption, shards, static samples, elements, mistakes."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from d4d_jax import cameras, clips, motion
from d4d_jax.data import pipeline, records, synthetic


@pytest.fixture(scope="module")
def made():
    """Seven small clips with captions "0" to "6" that tell them apart."""
    return [
        dataclasses.replace(
            synthetic.make_clip(seed, num_frames=4, size=16, samples=1), caption=str(seed)
        )
        for seed in range(7)
    ]


@pytest.fixture
def folder(made, tmp_path):
    for i in (2, 0, 1):
        clips.write_clip(made[i], tmp_path / f"clip_{i}")
    return tmp_path


def take(dataset, count):
    return list(itertools.islice(iter(dataset), count))


def captions(batches):
    return [caption for batch in batches for caption in batch["caption"].tolist()]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def test_a_batch_has_the_documented_arrays(made):
    (batch,) = take(pipeline.make_dataset(made, batch_size=3), 1)
    assert {key: value.shape for key, value in batch.items()} == {
        "dynamic": (3, 4, 16, 16, 4),
        "static": (3, 4, 16, 16, 4),
        "camera": (3, 4, 4, 4),
        "motion": (3,),
        "caption": (3,),
    }
    for key in ("dynamic", "static", "camera", "motion"):
        assert batch[key].dtype == np.float32
    assert batch["dynamic"].min() >= -1 and batch["dynamic"].max() <= 1


def test_an_element_is_on_white_with_alpha_poses_and_magnitude(made):
    record = pipeline.element(made[1])
    white = record["dynamic"][record["dynamic"][..., 3] == -1]
    assert len(white) > 100
    np.testing.assert_allclose(white[:, :3], 1)
    np.testing.assert_allclose(record["dynamic"][..., 3], 2 * made[1].dynamic_alpha - 1)
    np.testing.assert_allclose(record["camera"], cameras.orbit(4).opengl_camera_to_world, atol=1e-6)
    expected = motion.motion_magnitude(2 * made[1].dynamic - 1, 2 * made[1].static - 1)
    assert record["motion"] == pytest.approx(float(expected), rel=1e-5)


def test_the_background_of_a_clip_does_not_reach_the_network():
    settings = {"num_frames": 3, "size": 16}
    on_black = pipeline.element(synthetic.make_clip(2, background=(0.0, 0.0, 0.0), **settings))
    on_white = pipeline.element(synthetic.make_clip(2, **settings))
    np.testing.assert_allclose(on_black["dynamic"], on_white["dynamic"], atol=1e-6)
    assert on_black["motion"] == pytest.approx(on_white["motion"], rel=1e-4)


def test_the_seed_fixes_the_stream(made):
    settings = {"batch_size": 2, "static_probability": 0.5}
    first = take(pipeline.make_dataset(made, seed=3, **settings), 8)
    assert_same(first, take(pipeline.make_dataset(made, seed=3, **settings), 8))
    other = take(pipeline.make_dataset(made, seed=4, **settings), 8)
    assert captions(first) != captions(other)


def test_the_number_of_threads_does_not_change_the_stream(made):
    one, four = (take(pipeline.make_dataset(made, batch_size=2, num_threads=n), 8) for n in (1, 4))
    assert_same(one, four)


def test_every_epoch_holds_every_clip_in_a_new_order(made):
    stream = captions(take(pipeline.make_dataset(made, batch_size=1), 28))
    epochs = [stream[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list("0123456") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_without_shuffling_the_order_is_that_of_the_source(made):
    dataset = pipeline.make_dataset(made, batch_size=3, shuffle=False)
    assert captions(take(dataset, 3)) == list("012345601")


def test_epochs_end_and_batches_are_full(made):
    dataset = pipeline.make_dataset(made, batch_size=4, num_epochs=2)
    assert [len(batch["motion"]) for batch in dataset] == [4, 4, 4]


def test_a_resumed_iterator_continues_as_if_uninterrupted(made):
    def dataset():
        return pipeline.make_dataset(made, batch_size=2, seed=1, static_probability=0.4)

    uninterrupted = take(dataset(), 9)
    before = iter(dataset())
    for _ in range(4):
        next(before)
    state = before.get_state()
    after = iter(dataset())
    after.set_state(state)
    assert_same(list(itertools.islice(after, 5)), uninterrupted[4:])


def test_shards_are_disjoint_and_make_up_the_whole_stream(made):
    settings = {"batch_size": 1, "static_probability": 0.5, "num_epochs": 3}
    whole = list(pipeline.make_dataset(made, **settings))
    shards = [
        list(pipeline.make_dataset(made, shard_index=i, shard_count=3, **settings))
        for i in range(3)
    ]
    assert [len(shard) for shard in shards] == [7, 7, 7]
    for i, shard in enumerate(shards):
        assert_same(shard, whole[i::3])


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_static_samples_come_as_often_as_asked(made, probability):
    dataset = pipeline.make_dataset(made, batch_size=7, static_probability=probability)
    batches = take(dataset, 20)
    still = np.concatenate([batch["motion"] == 0 for batch in batches])
    assert still.mean() == pytest.approx(probability, abs=0.1)
    for batch in batches[:5]:
        frozen = (batch["dynamic"] == batch["static"]).all((1, 2, 3, 4))
        np.testing.assert_array_equal(frozen, batch["motion"] == 0)


def test_a_clip_can_be_frozen_in_one_epoch_and_move_in_another(made):
    dataset = pipeline.make_dataset(made[:1], batch_size=1, static_probability=0.5)
    magnitudes = {float(batch["motion"][0]) for batch in take(dataset, 20)}
    assert len(magnitudes) == 2 and 0.0 in magnitudes


def test_a_folder_gives_the_clips_by_name(folder, made):
    (batch,) = take(pipeline.make_dataset(folder, batch_size=3, shuffle=False), 1)
    assert batch["caption"].tolist() == ["0", "1", "2"]
    for i in range(3):
        np.testing.assert_allclose(
            batch["dynamic"][i], pipeline.element(made[i])["dynamic"], atol=0.02
        )


def test_size_resizes_and_allows_clips_of_several_sizes(folder):
    bigger = synthetic.make_clip(9, num_frames=4, size=24, samples=1)
    clips.write_clip(bigger, folder / "clip_9")
    (batch,) = take(pipeline.make_dataset(folder, batch_size=4, size=8), 1)
    assert batch["dynamic"].shape == (4, 4, 8, 8, 4)


@pytest.mark.parametrize("cache_bytes", [0, 5_000, 2**30])
def test_the_cache_only_saves_time(folder, cache_bytes, monkeypatch):
    reads = []
    read = records.read_folder
    monkeypatch.setattr(records, "read_folder", lambda *a, **k: reads.append(a) or read(*a, **k))
    source = pipeline.ClipSource(folder, cache_bytes=cache_bytes)
    first, again = ([source[i] for i in range(3)] for _ in range(2))
    assert_same(first, again)
    # One element takes 2 * 4 * 16 * 16 * 4 bytes of frames: 8 kB.
    assert len(reads) == (3 if cache_bytes == 2**30 else 6)


def test_an_empty_or_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no clips: no subfolder has a multi_frame0"):
        pipeline.make_dataset(tmp_path, batch_size=1)
    with pytest.raises(FileNotFoundError, match=r"no folder of clips '.*absent'"):
        pipeline.make_dataset(tmp_path / "absent", batch_size=1)


def test_a_clip_in_place_of_a_folder_of_clips_is_told(folder):
    with pytest.raises(FileNotFoundError, match="clip_1' is itself a clip; give its parent"):
        pipeline.make_dataset(folder / "clip_1", batch_size=1)


def test_missing_static_frames_are_told_with_the_path(folder):
    for path in (folder / "clip_1").glob("multi_static_frame*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="clip_1' has 4 dynamic and 0 static frames"):
        pipeline.make_dataset(folder, batch_size=1)


def test_differing_sizes_are_told_with_both_paths(folder):
    clips.write_clip(synthetic.make_clip(0, num_frames=4, size=8), folder / "clip_7")
    with pytest.raises(ValueError, match=r"clip_7' has 4 frames of 8 x 8, but .*clip_0' has 4"):
        pipeline.make_dataset(folder, batch_size=1)


def test_differing_lengths_are_told_also_with_a_size(made):
    longer = synthetic.make_clip(0, num_frames=5, size=16)
    with pytest.raises(ValueError, match="'clip 7' has 5 frames"):
        pipeline.make_dataset([*made, longer], batch_size=1, size=8)


def test_frames_without_alpha_are_told_with_the_path(folder):
    for path in (folder / "clip_2").glob("*.png"):
        Image.open(path).convert("RGB").save(path)
    with pytest.raises(ValueError, match="clip_2' lacks the alpha of its dyn"):
        pipeline.ClipSource(folder)[2]


def test_a_truncated_frame_is_told_with_the_path(folder):
    broken = folder / "clip_0" / "multi_frame2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"multi_frame2\.png"):
        take(pipeline.make_dataset(folder, batch_size=3), 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"static_probability": 1.5}, r"static_probability must lie in \[0, 1\]; got 1.5"),
        ({"shard_index": 2, "shard_count": 2}, "no shard 2 of 2; count from 0"),
        ({"num_epochs": 1, "batch_size": 8}, "holds 7 clips, fewer than batch_size=8"),
    ],
)
def test_values_out_of_range_are_told(made, changes, words):
    with pytest.raises(ValueError, match=words):
        pipeline.make_dataset(made, **{"batch_size": 1, **changes})


def test_no_clips_at_all_are_told():
    with pytest.raises(ValueError, match="sequence of clips is empty"):
        pipeline.make_dataset([], batch_size=1)


def test_a_source_decodes_for_all_its_users_once(folder, monkeypatch):
    reads = []
    read = records.read_folder

    def count(path, **options):
        if path.parent == folder:  # grain may still be reading ahead for an earlier test
            reads.append(path)
        return read(path, **options)

    monkeypatch.setattr(records, "read_folder", count)
    source = pipeline.ClipSource(folder, size=8)
    assert source.num_frames == 4
    decoded = [source[i] for i in range(3)]
    dataset = pipeline.make_dataset(source, batch_size=3, shuffle=False)
    (batch,) = take(dataset, 1)
    np.testing.assert_array_equal(batch["dynamic"], np.stack([d["dynamic"] for d in decoded]))
    assert len(reads) == 3
    with pytest.raises(ValueError, match="Give size=8 to the ClipSource"):
        pipeline.make_dataset(source, batch_size=3, size=8)


def test_hidden_folders_are_no_clips(folder):
    (folder / "clip_1").rename(folder / ".clip_1.partial")
    assert [path.name for path in pipeline.find_clips(folder)] == ["clip_0", "clip_2"]


def test_elements_are_made_without_jax(made, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("the data path compiled something")

    monkeypatch.setattr(motion.jnp, "asarray", refuse)
    assert pipeline.element(made[2])["motion"].dtype == np.float32


def test_a_still_sample_begins_at_any_view_with_its_camera():
    clip = synthetic.make_clip(3, num_frames=6, size=16, samples=1)
    record = pipeline.element(clip)
    still = {**record, "dynamic": record["static"], "motion": np.float32(0)}
    rolled = pipeline.roll(still, 2)
    np.testing.assert_array_equal(rolled["camera"][0], record["camera"][2])
    np.testing.assert_array_equal(rolled["dynamic"][0], record["static"][2])
    np.testing.assert_array_equal(rolled["dynamic"], rolled["static"])
    for name in ("camera", "dynamic"):  # closed before and after, each other view once
        np.testing.assert_allclose(rolled[name][0], rolled[name][-1], atol=1e-5)
        np.testing.assert_array_equal(rolled[name][3], still[name][0])
    opened = {**still, **{k: still[k][:5] for k in ("dynamic", "static", "camera")}}
    shifted = pipeline.roll(opened, 4)
    np.testing.assert_array_equal(shifted["camera"], opened["camera"][[4, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="Only samples that stand still"):
        pipeline.roll(record, 1)


def test_random_starts_are_those_of_still_samples(made):
    settings = dict(batch_size=7, seed=1, shuffle=False, random_start=True)
    (still,) = take(pipeline.make_dataset(made, static_probability=1.0, **settings), 1)
    starts = {
        int(np.abs(pipeline.element(clip)["camera"] - batch[0]).sum((1, 2)).argmin())
        for clip, batch in zip(made, still["camera"], strict=True)
    }
    assert len(starts) > 1
    (moving,) = take(pipeline.make_dataset(made, **settings), 1)
    np.testing.assert_array_equal(moving["camera"][0], pipeline.element(made[0])["camera"])
    told = pipeline.ClipSource(made).extended([{"text": np.zeros(2)}] * 7)
    with pytest.raises(ValueError, match="random_start"):
        pipeline.make_dataset(told, batch_size=1, random_start=True)


def test_the_background_is_behind_the_object_alone(made):
    color = (0.1, 0.6, 0.3)
    settings = dict(batch_size=7, shuffle=False, static_probability=0.5)
    (white,) = take(pipeline.make_dataset(made, **settings), 1)
    (batch,) = take(pipeline.make_dataset(made, background=color, **settings), 1)
    alpha = (white["dynamic"][..., 3:] + 1) / 2
    expected = white["dynamic"][..., :3] + 2 * (1 - alpha) * (np.asarray(color, np.float32) - 1)
    np.testing.assert_allclose(batch["dynamic"][..., :3], expected, atol=1e-6)
    for name in ("camera", "motion"):
        np.testing.assert_array_equal(batch[name], white[name])
    np.testing.assert_array_equal(batch["dynamic"][..., 3], white["dynamic"][..., 3])
    (drawn,) = take(pipeline.make_dataset(made, background="random", **settings), 1)
    corners = drawn["dynamic"][:, 0, 0, 0]
    assert (corners[:, 3] == -1).all() and len(np.unique(corners[:, 0])) == 7
    np.testing.assert_allclose(drawn["static"][:, 0, 0, 0], corners, atol=1e-6)


def test_every_sample_has_a_key_of_its_own_that_the_seed_decides(made):
    def keys(seed):
        dataset = pipeline.make_dataset(made, batch_size=7, seed=seed, keys=True)
        return np.concatenate([batch["key"] for batch in take(dataset, 3)])

    first = keys(0)
    assert first.shape == (21, 2) and first.dtype == np.uint32
    assert len(np.unique(first, axis=0)) == 21
    np.testing.assert_array_equal(keys(0), first)
    assert (keys(1) != first).any()


@pytest.fixture
def eight(made, tmp_path):
    """A folder of eight clips, whose captions are their names."""
    for i in range(8):
        clip = dataclasses.replace(made[i % 7], caption=str(i))
        clips.write_clip(clip, tmp_path / str(i))
    return tmp_path


@pytest.mark.parametrize("broken", ["multi_frame2.png", "multi_frame0.png"])
def test_a_corrupt_clip_is_named_and_replaced_and_the_others_stay_in_order(eight, broken, caplog):
    def order():
        source = pipeline.ClipSource(eight, max_corrupt=0.2)
        return source, captions(take(pipeline.make_dataset(source, batch_size=2, seed=3), 8))

    _, before = order()
    (eight / "5" / broken).write_bytes(b"damaged")
    source, after = order()
    assert list(source.corrupt) == [5] and "Clip 5 is left out, the 1. of 8" in caplog.text
    assert caplog.text.count("left out") == 1 and broken in caplog.text
    assert after == ["6" if caption == "5" else caption for caption in before]


def test_a_source_ends_also_when_clips_are_left_out(eight):
    (eight / "7" / "multi_frame2.png").write_bytes(b"damaged")
    source = pipeline.ClipSource(eight, max_corrupt=0.2)
    assert [str(clip["caption"]) for clip in source] == [*map(str, range(7)), "0"]
    assert str(source[-2]["caption"]) == "6"


def test_too_many_corrupt_clips_end_the_run(eight):
    for name in ("5", "6"):
        (eight / name / "multi_frame2.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="multi_frame2"):
        captions(take(pipeline.make_dataset(eight, batch_size=8), 1))
    source = pipeline.ClipSource(eight, max_corrupt=0.2)
    with pytest.raises(ValueError, match=r"2 of 8 clips cannot be read, .*max_corrupt=0.2"):
        captions(take(pipeline.make_dataset(source, batch_size=8), 1))
    with pytest.raises(ValueError, match="max_corrupt must lie"):
        pipeline.ClipSource(eight, max_corrupt=1.0)
