"""Who may import whom, read from the source, and how much an import costs."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: A module may import those of the lines above its own, and its own package.
LAYERS = [
    ["typing", "registry", "pytree", "presets"],
    ["cameras", "schedules", "motion", "media", "metrics"],
    ["clips", "losses"],
    ["models", "guidance"],
    ["sampling", "conversion"],
    ["objective"],
    ["pipeline"],
]

#: Parts beside the layers, and what they may import of d4d_jax.
SIDES = {
    "data": {*LAYERS[0], "cameras", "clips", "motion", "metrics"},
    "train": {*LAYERS[0], "losses", "motion", "schedules", "media"},
    "gaussians": {*LAYERS[0], "cameras", "clips", "metrics", "media"},
}

#: Never imported at the top of a module.
HEAVY = {"torch", "tensorflow", "bpy", "apache_beam", "wandb", "viser"}

SOURCES = sorted([*ROOT.glob("d4d_jax/**/*.py"), *ROOT.glob("gaussians/**/*.py")])


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(nodes):
    """The dotted names that import statements among `nodes` may load."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def part(name):
    """`d4d_jax.models.unet` -> `models`, `gaussians.io` -> `gaussians`, anything else -> None."""
    parts = name.split(".")
    if parts[0] == "gaussians":
        return "gaussians"
    return parts[1] if parts[0] == "d4d_jax" and len(parts) > 1 else None


def allowed(own):
    if own in SIDES:
        return SIDES[own]
    level = next((i for i, layer in enumerate(LAYERS) if own in layer), None)
    assert level is not None, f"d4d_jax.{own} has no place in LAYERS or SIDES"
    return {name for layer in LAYERS[:level] for name in layer}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_layers(path):
    own = part(module_name(path))
    for name in imported_names(ast.walk(parse(path))):
        root = name.split(".")[0]
        assert root not in ("experiments", "ml_collections"), name
        assert not name.startswith("absl.flags"), name
        if part(name) not in (None, own):
            assert part(name) in allowed(own), f"{module_name(path)} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_heavy_packages_are_imported_where_used(path):
    names = {name.split(".")[0] for name in imported_names(parse(path).body)}
    assert not names & HEAVY


def test_no_circles():
    modules = {module_name(path): path for path in SOURCES}
    graph = {
        name: {other for other in imported_names(parse(path).body) if other in modules} - {name}
        for name, path in modules.items()
    }
    # A package's __init__ is loaded before its modules and may import them.
    for name, path in modules.items():
        if path.name == "__init__.py":
            for other in graph:
                graph[other] -= {name} if other.startswith(f"{name}.") else set()
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_configs_import_plain_values_only():
    """The published presets hold numbers and names; everything else is for `experiments.build`."""
    plain = ("ml_collections", "d4d_jax.presets", "experiments.configs")
    for path in ROOT.glob("experiments/configs/*.py"):
        for name in imported_names(ast.walk(parse(path))):
            assert name.startswith(plain), f"{path.name}: {name}"


def test_import_is_fast_and_light():
    code = f"""
import time
start = time.perf_counter()
import d4d_jax, gaussians
seconds = time.perf_counter() - start
import sys
print(sorted(set(sys.modules) & {HEAVY!r}), seconds < 1.5)
"""
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert output.strip() == "[] True"
