"""Render animated assets to clip folders: one Blender process per asset, under limits.

`render` makes a folder per animation in the published layout (`d4d_jax.clips`), with `caption.txt`
and `clip.json` (what it was made from, and how), and lists them in `manifest.tsv`, and what failed
in `failures.tsv`. What is there already is kept, so a run that was stopped goes on where it was.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d4d_jax import clips, registry
from d4d_jax.data import (
    blender,
    blender_gltf,
    bulk,
    captions,
    render_list,
    render_process,
    tables,
)
from d4d_jax.data.render_list import Asset
from d4d_jax.data.render_settings import Settings

COLUMNS = (
    "clip",
    "asset",
    "action",
    "caption",
    "source",
    "licence",
    "frames",
    "loop",
    "motion",
)
FAILURE_COLUMNS = ("asset", "action", "reason")


@dataclasses.dataclass(frozen=True)
class Renderer:
    """Renders one asset; the work of `bulk.run`.

    Attributes:
        out: folder of the clips.
        command: `render_process.blender_command`.
        settings: of the pictures.
        at_most: animations of an asset, drawn; 0 is all.
        time_limit: seconds that the import or one clip may take; 0 is any number.
        memory_limit: GiB that Blender may use; 0 is any number.
        max_megabytes: of a file that is read; 0 is any number.
        threads: of Blender; 0 is one per core.
        captioner: "package.module:function" (`captions.Captioner`), or None.
    """

    out: str
    command: tuple[str, ...]
    settings: Settings = dataclasses.field(default_factory=Settings)
    at_most: int = 0
    time_limit: float = 600.0
    memory_limit: float = 8.0
    max_megabytes: float = 128.0
    threads: int = 0
    captioner: str | None = None

    def __call__(self, asset: Asset) -> dict[str, Any]:
        """Renders the animations of `asset` that are not there yet.

        Returns:
            `clips`, the names of those rendered now.

        Raises:
            RenderError: the asset, or one of its animations, failed. The others are there, and the
                reasons in a file that `failures` reads.
        """
        failures_path(self.out, self.settings, asset.name).unlink(missing_ok=True)
        blender_gltf.check_asset(asset.path, self.max_megabytes)
        job = _Job(self, asset)
        job.run()
        if job.failed:
            path = failures_path(self.out, self.settings, asset.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            tables.write_text(path, json.dumps(list(job.failed.items())))
            action, reason = next(iter(job.failed.items()))
            raise blender.plan.RenderError(
                f"{len(job.failed)} of {job.wanted} animations failed; {action}: {reason}"
            )
        return {"clips": job.made}

    def options(self, asset: Asset, folder: Path, skip: Sequence[str]) -> list[str]:
        """The words that make `blender.py` render an asset, without some of its animations."""
        words = [
            f"--asset={asset.path}",
            f"--key={asset.name}",
            f"--out={folder}",
            "--each",
            "--overwrite",
            f"--at_most={self.at_most}",
            f"--parent={os.getpid()}",
            f"--threads={self.threads}",
        ]
        words += [f"--action={clip.action}" for clip in asset.clips]
        words += [f"--skip={action}" for action in skip]
        return [*self.command, *words, *self.settings.options()]


class _Job:
    """One asset on its way: Blender is started again after an animation that it did not survive."""

    def __init__(self, renderer: Renderer, asset: Asset):
        self.made: list[str] = []
        self.failed: dict[str, str] = {}
        self.wanted = 0
        self._renderer, self._asset = renderer, asset
        self._out = Path(renderer.out)
        self._waiting: list[str] | None = None
        self._names: dict[str, str] = {}
        self._asked: dict[str, render_list.Clip] = {}
        self._finished = _finished_actions(self._out, asset, renderer.settings.digest)

    def run(self) -> None:
        """Renders all that is asked for; raises RenderError where Blender lists no animations."""
        limits = {
            "seconds": self._renderer.time_limit,
            "gigabytes": self._renderer.memory_limit,
        }
        scratch = self._out / ".partial"
        scratch.mkdir(parents=True, exist_ok=True)
        while self._waiting is None or self._waiting:
            with tempfile.TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as name:
                folder = Path(name)
                skip = [*self._finished, *self.failed]
                command = self._renderer.options(self._asset, folder / "clips", skip)
                lines = _Lines(folder / "clips" / blender.REPORT)
                error = render_process.run_limited(
                    command,
                    folder=folder,
                    alive=lambda lines=lines: self._take(lines),
                    **limits,
                )
            if self._waiting is None:
                raise blender.plan.RenderError(error or "Blender listed no animations.")
            if self._waiting:
                self.failed[self._waiting.pop(0)] = error or "Blender ended before it."

    def _take(self, lines: "_Lines") -> bool:
        """Deals with what Blender has reported since; whether there was anything."""
        records = lines.read()
        for record in records:
            if "actions" in record:
                self._waiting = list(record["actions"])
                self.wanted = max(self.wanted, len(self._waiting))
                self._names = render_list.clip_names(self._asset.stem, record["all_actions"])
                self._asked = _asked(self._asset, record["all_actions"])
                continue
            action = record["action"]
            if self._waiting and action in self._waiting:
                self._waiting.remove(action)
            error = record["error"]
            if error is None:
                try:
                    self._finish(lines.path.parent / record["folder"], record)
                except Exception as raised:  # The captioner is the user's code.
                    error = " ".join(str(raised).split()) or type(raised).__name__
            if error is not None:
                self.failed[action] = error
            else:
                self._finished.append(action)
        return bool(records)

    def _finish(self, folder: Path, record: dict[str, Any]) -> None:
        """Makes a clip of a folder of frames, and moves it to its place."""
        asset, settings, action = self._asset, self._renderer.settings, record["action"]
        if settings.supersample > 1:
            shrink(folder, settings.supersample)
        clip = self._asked.get(action, render_list.Clip(action))
        views = blender.parse_views(settings.views)
        motion = None
        if {"dynamic", "static"} <= set(views):
            motion = clips.read_clip(folder).motion
        caption = clip.caption or asset.caption
        caption = caption or captions.describe(Path(asset.name).stem, action)
        if self._renderer.captioner:
            caption = _ask(self._renderer.captioner, asset, action, caption, folder)
        facts = {
            "asset": asset.name,
            "action": action,
            "caption": caption,
            "source": asset.source,
            "licence": asset.licence,
            "motion": motion,
            **{key: value for key, value in record.items() if key not in ("folder", "error")},
            "settings": dataclasses.asdict(settings),
            "digest": settings.digest,
        }
        (folder / "caption.txt").write_text(caption + "\n", encoding="utf-8")
        text = json.dumps(facts, indent=1, ensure_ascii=False)
        (folder / "clip.json").write_text(text + "\n", encoding="utf-8")
        self.made.append(self._place(folder, clip.name or self._names[action], facts))

    def _place(self, folder: Path, name: str, facts: dict[str, Any]) -> str:
        """Gives a clip folder its name; one of the same clip by other settings makes way."""
        there = _read_facts(self._out / name)
        same = there and all(there[key] == facts[key] for key in ("asset", "action"))
        if (self._out / name).exists() and not same:
            name = f"{name}-{render_list.short_hash(facts['asset'] + facts['action'])}"
        target = self._out / name
        if target.exists():
            target.rename(folder.with_name(f"old-{folder.name}"))
        folder.rename(target)
        return name


class _Lines:
    """The records of a file that another process adds to, each once."""

    def __init__(self, path: Path):
        self.path = path
        self._place = 0

    def read(self) -> list[dict[str, Any]]:
        """Those that are complete and new."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            stream.seek(self._place)
            whole = stream.read().rpartition(b"\n")[0]
        self._place += len(whole) + 1 if whole else 0
        return [json.loads(line) for line in whole.splitlines()]


def _asked(asset: Asset, actions: Sequence[str]) -> dict[str, render_list.Clip]:
    """What the list says about the animations, by their whole names."""
    asked = {}
    for clip in asset.clips:
        try:
            asked[blender.plan.pick_action(actions, clip.action)] = clip
        except blender.plan.RenderError:
            pass  # Blender says so, too.
    return asked


def _finished_actions(out: Path, asset: Asset, digest: str) -> list[str]:
    """The animations of an asset that have a clip by these settings."""
    folders = [out / clip.name for clip in asset.clips if clip.name]
    folders += out.glob(f"{asset.stem}-*")
    facts = [_read_facts(folder) for folder in folders]
    return sorted(
        {f["action"] for f in facts if f.get("asset") == asset.name and f["digest"] == digest}
    )


def _read_facts(folder: Path) -> dict[str, Any]:
    """What `clip.json` says; nothing where there is none of ours."""
    try:
        facts = json.loads((folder / "clip.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if {"asset", "action", "digest"} <= set(facts) else {}


def _ask(name: str, asset: Asset, action: str, caption: str, folder: Path) -> str:
    """The caption by the user's function."""
    clip = clips.read_clip(folder)
    frames = next(f for f in (clip.front, clip.dynamic, clip.static) if f is not None)
    captioner = registry.lookup("captioner", name)
    answer = captioner(asset=asset.path, action=action, caption=caption, frames=frames)
    if not isinstance(answer, str):
        raise ValueError(f"--captioner={name} returned {answer!r} instead of a sentence.")
    return " ".join(answer.split())


def shrink(folder: Path, factor: int) -> None:
    """Makes the pictures of a folder that many times smaller a side.

    Colours and alpha are averaged over squares, premultiplied, which takes much of the path
    tracer's noise away; of depths and masks every `factor`-th pixel is kept.
    """
    for path in folder.rglob("*.png"):
        with Image.open(path) as file:
            pixels = np.asarray(file)
        if pixels.ndim == 2:
            small = pixels[factor // 2 :: factor, factor // 2 :: factor]
        else:
            height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
            values = pixels.astype(np.float32) / 255
            values[..., :3] *= values[..., 3:]
            values = clips.resize(values[None], width, height)[0]
            values[..., :3] /= np.maximum(values[..., 3:], 1e-6)
            small = np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)
        Image.fromarray(small).save(path, optimize=True)


def render(
    assets: Sequence[Asset],
    renderer: Renderer,
    *,
    workers: int = 1,
    beam: Sequence[str] | None = None,
    overwrite: bool = False,
) -> tuple[int, list[tuple[str, str, str]]]:
    """Renders assets, and writes `manifest.tsv` and `failures.tsv`.

    Args:
        assets: of `render_list.find_assets`.
        renderer: which knows the output folder and all options.
        workers: assets at a time, each in a Blender of its own; of this machine.
        beam: options of an Apache Beam pipeline, which then does the work (`bulk.run`).
        overwrite: whether clips that were made with other settings may be replaced.

    Returns:
        The number of clips that are there now, and the rows of `failures.tsv`.

    Raises:
        FileExistsError: clips are there that were made with other settings.
        RuntimeError: a worker process was killed.
    """
    out, settings = Path(renderer.out), renderer.settings
    _claim(out, settings, overwrite)
    shutil.rmtree(out / ".partial", ignore_errors=True)  # of a run that was stopped
    items = {_key(asset, renderer.at_most): asset for asset in assets}
    folder = out / ".records" / settings.digest
    outcomes = bulk.run(renderer, items, folder=folder, workers=workers, beam=beam)
    failures = []
    for asset, outcome in zip(items.values(), outcomes, strict=True):
        if outcome.error is not None:
            path = failures_path(out, settings, asset.name)
            single = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            failures += [
                (asset.name, action, reason) for action, reason in single or [("", outcome.error)]
            ]
    made = sorted((path.parent.name, _read_facts(path.parent)) for path in out.glob("*/clip.json"))
    rows = [_row(name, facts) for name, facts in made if facts.get("digest") == settings.digest]
    tables.write_table(out / "manifest.tsv", COLUMNS, rows)
    tables.write_table(out / "failures.tsv", FAILURE_COLUMNS, failures)
    shutil.rmtree(out / ".partial", ignore_errors=True)
    return len(rows), failures


def _key(asset: Asset, at_most: int) -> str:
    """Names an asset and what is wanted of it: asking for more is another piece of work."""
    if asset.clips:
        return f"{asset.name} [{', '.join(clip.action for clip in asset.clips)}]"
    return f"{asset.name} [{at_most} drawn]" if at_most else asset.name


def _claim(out: Path, settings: Settings, overwrite: bool) -> None:
    """Notes the settings in the output folder; others must not be there."""
    record, wanted = out / ".records" / "settings.json", dataclasses.asdict(settings)
    wanted["digest"] = settings.digest
    if record.exists() and not overwrite:
        there = json.loads(record.read_text(encoding="utf-8"))
        for name, value in wanted.items():
            if there.get(name) != value:
                raise FileExistsError(
                    f"{str(out)!r} holds clips rendered with --{name}={there.get(name)}, not"
                    f" {value}; choose another --out or add --overwrite."
                )
    record.parent.mkdir(parents=True, exist_ok=True)
    tables.write_text(record, json.dumps(wanted, indent=1) + "\n")


def failures_path(out: str | os.PathLike, settings: Settings, asset: str) -> Path:
    """Where the failures of single animations of an asset are kept: [[action, reason], ...]."""
    name = hashlib.sha256(asset.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(out) / ".records" / settings.digest / "failures" / f"{name}.json"


def _row(name: str, facts: dict[str, Any]) -> tuple[str, ...]:
    values = {
        **facts,
        "clip": name,
        "frames": f"{facts['frames']:g}",
        "loop": "yes" if facts["loop"] else "no",
        "motion": "" if facts["motion"] is None else f"{facts['motion']:.4f}",
    }
    return tuple(values[column] for column in COLUMNS)
