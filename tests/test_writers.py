"""Metric writers: what ends up on disk and in the log."""

import json

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
