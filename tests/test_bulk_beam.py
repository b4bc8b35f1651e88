"""Bulk work as an Apache Beam pipeline, on two runners: rendering with a Blender that is none."""

import contextlib
import socket
import subprocess
import sys
import time

import gltf_files
import pytest

from d4d_jax import clips
from d4d_jax.data import (
    curation,
    records,
    render,
    render_list,
    render_process,
    shards,
    synthetic,
)
from d4d_jax.data.render_settings import Settings

pytestmark = pytest.mark.beam

TINY = Settings(resolution=8, frames=3, views="dynamic,static")


@contextlib.contextmanager
def job_server():
    """Beam's own job service, which takes jobs as those of Flink and Spark do; yields options."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    module = "apache_beam.runners.portability.local_job_service_main"
    process = subprocess.Popen([sys.executable, "-m", module, f"--port={port}"])
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{port}",
            "--environment_type=LOOPBACK",
        ]
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def direct():
    """Two processes of the runner that Beam brings."""
    yield [
        "--runner=DirectRunner",
        "--direct_running_mode=multi_processing",
        "--direct_num_workers=2",
    ]


@contextlib.contextmanager
def dask():
    """A local Dask cluster."""
    yield ["--runner=apache_beam.runners.dask.dask_runner.DaskRunner"]


@pytest.mark.parametrize("runner", [direct, job_server, dask])
def test_two_poisoned_assets_of_ten_cost_themselves(tmp_path, runner):
    for name in ("hang", *(f"good-{i}" for i in range(8))):
        gltf_files.write_glb(tmp_path / "glb" / f"{name}.glb")
    (tmp_path / "glb" / "corrupt.glb").write_bytes(b"glTF" + bytes(40))
    fake = gltf_files.fake_blender(tmp_path / "python")
    command = tuple(render_process.blender_command(fake))
    renderer = render.Renderer(str(tmp_path / "out"), command, TINY, time_limit=4.0)
    assets = render_list.find_assets(tmp_path / "glb")
    with runner() as options:
        count, failures = render.render(assets, renderer, beam=options)
    assert count == 8 * 3
    assert [asset for asset, _, _ in failures] == ["corrupt.glb", "hang.glb"]
    assert "only 2 can be read" in failures[0][2]
    assert failures[1][2] == "It was stopped after --time_limit=4 seconds."
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/clip.json")}
    assert render.render(assets[:1], renderer, beam=[])[0] == 24  # nothing to do but the failed
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())


@pytest.mark.parametrize("runner", [direct, job_server, dask])
def test_clips_are_curated_and_built_as_without_beam(tmp_path, runner):
    source = tmp_path / "clips"
    for i in range(6):
        clips.write_clip(synthetic.make_clip(i, num_frames=4, size=16, samples=1), source / f"{i}")
    (source / "3" / "multi_frame1.png").write_bytes(b"")
    with runner() as options:
        verdicts, failures = curation.curate(source, tmp_path / "curated", beam=options)
        index, left_out = shards.build(source, tmp_path / "data", shard_clips=2, beam=options)
    assert (verdicts, failures) == curation.curate(source, tmp_path / "here")
    assert [name for name, _ in failures] == [name for name, _ in left_out] == ["3"]
    assert shards.build(source, tmp_path / "too", shard_clips=2) == (index, left_out)
    assert records.verify(tmp_path / "data") == records.verify(tmp_path / "too")
