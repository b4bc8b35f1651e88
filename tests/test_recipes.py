"""The launch recipes of docs/training.md: dry runs, in which the binary checks its arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
CHECK = "--only_check_args"


def block(language):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return text


def dry_run(command, **options):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"} | options.pop("env", {})
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options
    )


def test_every_pod_of_the_job_is_started_with_flags_that_exist():
    service, job = yaml.safe_load_all(block("yaml"))
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    named = {variable["name"] for variable in container["env"]}
    arguments = " ".join(container["args"])
    assert set(re.findall(r"\$\((\w+)\)", arguments)) <= named
    # The pod of index 0 is HOSTNAME.SUBDOMAIN, and the service selects it.
    name, pods = job["metadata"]["name"], spec["completions"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == pods
    assert f"--coordinator={name}-0.{service['metadata']['name']}:" in arguments
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert f"--num_processes={pods}" in arguments
    filled = arguments.replace("$(JOB_COMPLETION_INDEX)", "1").split()
    done = dry_run([sys.executable, *container["command"][1:], *filled, CHECK])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("further", "code"), [("", 0), ("--no_such_flag", 2)])
def test_the_batch_script_starts_the_trainer(tmp_path, further, code):
    fake = tmp_path / "srun"
    fake.write_text(f'#!/bin/bash\nshift\nexec {sys.executable} "$@" {CHECK} {further}\n')
    fake.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = dry_run(["bash", "-s"], input=block("slurm"), env={"PATH": path})
    assert done.returncode == code, done.stderr


@pytest.mark.parametrize("key", sorted(set(re.findall(r"--config\.([\w.]+)=", PAGE))))
def test_keys_of_the_page_exist(key):
    from experiments.configs import paper_image

    value = paper_image.get_config()
    for part in key.split("."):
        value = value[part]
