"""Metric writers: what ends up on disk and in the log."""

import io
import json
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image

from d4d_jax.train import writers
from d4d_jax.typing import MetricWriter


def read_lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_each_line_is_one_object_with_step_and_values(tmp_path):
    writer = writers.JsonlWriter(tmp_path)
    writer.write_scalars(1, {"loss": np.float32(0.5), "error": 2})
    writer.write_scalars(2, {"loss": 0.25})
    writer.close()
    assert read_lines(tmp_path) == [
        {"step": 1, "loss": 0.5, "error": 2.0},
        {"step": 2, "loss": 0.25},
    ]


def test_values_that_json_lacks_become_null(tmp_path):
    writer = writers.JsonlWriter(tmp_path)
    writer.write_scalars(1, {"loss": float("nan"), "error": float("inf")})
    writer.close()
    assert read_lines(tmp_path) == [{"step": 1, "loss": None, "error": None}]


def test_continuing_drops_later_and_torn_lines(tmp_path):
    text = '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    writer = writers.JsonlWriter(tmp_path, restored_step=2)
    writer.write_scalars(3, {"loss": 0.5})
    writer.close()
    assert [line["loss"] for line in read_lines(tmp_path)] == [3, 2, 0.5]


def test_flush_makes_lines_visible(tmp_path):
    writer = writers.JsonlWriter(tmp_path)
    writer.write_scalars(7, {"loss": 1.0})
    writer.flush()
    assert read_lines(tmp_path)[0]["step"] == 7
    writer.close()


def test_images_become_png_files(tmp_path):
    writer = writers.JsonlWriter(tmp_path)
    image = np.linspace(0, 1, 4 * 6 * 3).reshape(4, 6, 3)
    writer.write_images(12, {"samples/dynamic": image})
    writer.close()
    with Image.open(tmp_path / "images" / "samples_dynamic_0000012.png") as picture:
        assert picture.size == (6, 4)


def test_default_writer_logs_and_writes(tmp_path, caplog):
    caplog.set_level("INFO", logger="d4d_jax")
    writer = writers.default_writer(tmp_path)
    assert isinstance(writer, MetricWriter)
    writer.write_scalars(5, {"loss": 0.125})
    writer.write_images(5, {"sheet": np.zeros((2, 2, 3))})
    writer.flush()
    writer.close()
    assert "[5] loss=0.125" in caplog.text and "sheet" in caplog.text
    assert read_lines(tmp_path) == [{"step": 5, "loss": 0.125}]


def test_missing_folder_is_created(tmp_path):
    writer = writers.JsonlWriter(tmp_path / "a" / "b")
    writer.close()
    assert (tmp_path / "a" / "b" / "metrics.jsonl").exists()
    with pytest.raises(ValueError):
        writer.write_scalars(1, {"loss": 1.0})  # closed


def test_page_of_samples_has_every_step_and_escapes_names(tmp_path):
    writer = writers.JsonlWriter(tmp_path)
    image, video = np.zeros((4, 6, 3)), np.zeros((2, 4, 6, 3))
    for step in (5, 10):
        writer.write_images(step, {"a & b": image})
        writer.write_videos(step, {"orbit": video})
    writer.close()
    page = (tmp_path / "samples.html").read_text()
    names = [f"images/{n}" for n in ("a &amp; b_0000010.png", "orbit_0000010.mp4")]
    assert all(name in page for name in names)
    assert page.index("Step 10") < page.index("Step 5")
    assert (tmp_path / "images" / "orbit_0000005.mp4").stat().st_size > 100


def read_events(folder):
    """The scalars and images in TensorBoard's files, by its own record format."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                found[event.step, value.tag] = value.image or value.simple_value
            data = data[16 + length :]
    return found


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    writer = writers.default_writer(tmp_path, further=["tensorboard"])
    writer.write_scalars(3, {"loss": np.float32(0.5)})
    writer.write_images(3, {"sheet": np.full((4, 6, 3), 0.5)})
    writer.write_videos(3, {"orbit": np.full((2, 4, 6, 3), 0.5)})
    writer.flush()
    writer.close()
    found = read_events(tmp_path / "tensorboard")
    assert (3, "loss") in found and {(3, "sheet"), (3, "orbit")} <= found.keys()
    sheet = Image.open(io.BytesIO(found[3, "sheet"].encoded_image_string))
    assert sheet.size == (6, 4) and abs(np.asarray(sheet).mean() - 127.5) < 1


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.id, self.finished = options, [], "abc", False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_run_is_continued_by_its_id(tmp_path, monkeypatch):
    runs = []
    module = types.SimpleNamespace(
        init=lambda **options: runs.append(FakeRun(**options)) or runs[-1],
        Image=lambda pixels: pixels,
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    for step in (0, 4):
        writer = writers.default_writer(tmp_path, restored_step=step, further=["wandb"])
        writer.write_scalars(step + 1, {"loss": 0.5})
        writer.write_videos(step + 1, {"orbit": np.ones((2, 4, 6, 3))})
        writer.close()
    assert [run.options["id"] for run in runs] == [None, "abc"] and runs[0].finished
    assert runs[1].logged[0] == (5, {"loss": 0.5})
    (step, pictures) = runs[1].logged[1]
    assert step == 5 and pictures["orbit"].dtype == np.uint8 and pictures["orbit"].max() == 255


def test_unknown_and_missing_writers_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="one of tensorboard, wandb, not 'mlflow'"):
        writers.default_writer(tmp_path / "a", further=["mlflow"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="'wandb' needs the package wandb: pip install wandb"):
        writers.default_writer(tmp_path / "b", further=["wandb"])
