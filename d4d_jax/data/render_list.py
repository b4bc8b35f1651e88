"""What is to be rendered: the assets of a folder or of a list, and names for their clips."""

import collections
import csv
import dataclasses
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from d4d_jax.data import blender_gltf

_SAFE = re.compile(r"[A-Za-z0-9_-]+")


@dataclasses.dataclass(frozen=True)
class Clip:
    """One animation that a list asks for.

    Attributes:
        action: its name, or the unique last part of it after `|`.
        name: of the clip's folder; empty leaves it to us.
        caption: what it shows; empty leaves it to us.
    """

    action: str
    name: str = ""
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Asset:
    """A file to render, and what is known about it.

    Attributes:
        path: of the .glb or .gltf file.
        name: its path relative to the folder of assets, with `/`.
        stem: how the names of its clips start; no other asset of the list has it.
        clips: that are asked for; empty means all animations.
        caption: of all its clips that have none of their own; may be empty.
        source: where it comes from; may be empty.
        licence: its licence; may be empty.
    """

    path: str
    name: str
    stem: str
    clips: tuple[Clip, ...] = ()
    caption: str = ""
    source: str = ""
    licence: str = ""


def find_assets(
    assets: str | os.PathLike,
    *,
    root: str | os.PathLike | None = None,
    licence: str = "",
    captions: Mapping[str, str] | None = None,
) -> list[Asset]:
    """The assets of a folder, or of a list of them, in the order of their names or of the list.

    A `manifest.tsv` in the folder of assets, with the columns `file`, `source` and `licence`, says
    where they come from.

    Args:
        assets: a folder, of which all .glb and .gltf files are taken however deep; or a
            tab-separated file with the column `asset` (a path) and, as wanted, `action`, `clip`
            (folder name), `caption`, `source`, `licence`. Several rows may name the same asset.
        root: folder that the paths of a list are relative to; by default the list's own.
        licence: regular expression; only assets whose licence it is found in are taken.
        captions: by the file name without suffix, for assets without one in the list.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the list or the manifest has not the columns or is inconsistent, the expression
            is none, or no asset is left.
    """
    source = Path(assets)
    if source.is_dir():
        root = source
        rows = [{"asset": name} for name in _files(source)]
    elif source.is_file():
        root = Path(root) if root else source.parent
        rows = _read_rows(source, {"asset"})
    else:
        raise FileNotFoundError(f"There is neither a folder nor a list {os.fspath(assets)!r}.")
    manifest = Path(root) / "manifest.tsv"
    known = {}
    if manifest.is_file():
        known = {row["file"]: row for row in _read_rows(manifest, {"file", "source", "licence"})}
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(Path(row["asset"]).as_posix(), []).append(row)
    found = []
    for name, group in groups.items():
        facts = known.get(name, {}) | {key: value for key, value in group[0].items() if value}
        caption = facts.get("caption") or (captions or {}).get(Path(name).stem, "")
        found.append(
            Asset(
                path=str((Path(root) / name).absolute()),
                name=name,
                stem=safe_name(Path(name).stem),
                clips=_clips(source, name, group),
                caption="" if any(row.get("action") for row in group) and not captions else caption,
                source=facts.get("source", ""),
                licence=facts.get("licence", ""),
            )
        )
    try:
        found = [asset for asset in found if re.search(licence, asset.licence)]
    except re.error as error:
        raise ValueError(f"--licence={licence!r} is no regular expression: {error}.") from error
    if not found:
        what = f" whose licence has {licence!r}" if licence else ""
        raise ValueError(f"{os.fspath(assets)!r} has no .glb or .gltf asset{what}.")
    return _with_own_stems(found)


def _files(folder: Path) -> list[str]:
    """Paths of the assets below `folder`, relative to it, sorted; hidden ones are left out."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    return sorted(
        path.as_posix()
        for path in paths
        if path.suffix.lower() in blender_gltf.SUFFIXES
        and not any(part.startswith(".") for part in path.parts)
    )


def _read_rows(path: Path, needed: set[str]) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
            columns, rows = set(reader.fieldnames or ()), list(reader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is no text in UTF-8: {error}.") from error
    if not needed <= columns:
        raise ValueError(
            f"{str(path)!r} needs the tab-separated columns {', '.join(sorted(needed))}; it has"
            f" {', '.join(sorted(columns)) or 'none'}."
        )
    for number, row in enumerate(rows, 2):
        if None in row:
            raise ValueError(f"Line {number} of {str(path)!r} has more columns than its heading.")
        if not row[min(needed)]:
            raise ValueError(f"Line {number} of {str(path)!r} has no {min(needed)}.")
    return rows


def _clips(source: Path, name: str, rows: Sequence[Mapping[str, str]]) -> tuple[Clip, ...]:
    """The animations that the rows of one asset ask for."""
    clips = []
    for row in rows:
        clip = row.get("clip", "")
        if clip and not _SAFE.fullmatch(clip):
            raise ValueError(
                f"{str(source)!r} names a clip {clip!r}; only letters, digits, _ and - can be used."
            )
        if not row.get("action") and (clip or len(rows) > 1):
            raise ValueError(f"{str(source)!r} has a row of {name!r} that needs an action.")
        if row.get("action"):
            clips.append(Clip(row["action"], clip, row.get("caption", "")))
    return tuple(clips)


def _with_own_stems(assets: list[Asset]) -> list[Asset]:
    """Tells assets of the same file name apart by a hash of their paths."""
    count = collections.Counter(asset.stem.casefold() for asset in assets)
    return [
        asset
        if count[asset.stem.casefold()] == 1
        else dataclasses.replace(asset, stem=f"{asset.stem}-{short_hash(asset.name)}")
        for asset in assets
    ]


def safe_name(text: str) -> str:
    """Letters, digits, _ and - for `text`: accents are dropped, the rest becomes -.

    Of a text without any such character it is a hash.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return "-".join(_SAFE.findall(plain))[:80].strip("-") or short_hash(text)


def short_hash(text: str) -> str:
    """Six hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:6]


def clip_names(stem: str, actions: Iterable[str]) -> dict[str, str]:
    """A folder name for each animation of an asset: by its last part after `|` where that is its.

    Where it is not, the whole name is taken, and a hash where even that is not enough.
    """
    actions = list(actions)
    ends = [safe_name(action.rsplit("|", 1)[-1]) for action in actions]
    wholes = [safe_name(action) for action in actions]
    names = {}
    for action, end, whole in zip(actions, ends, wholes, strict=True):
        if _once(end, ends):
            names[action] = f"{stem}-{end}"
        elif _once(whole, wholes):
            names[action] = f"{stem}-{whole}"
        else:
            names[action] = f"{stem}-{whole}-{short_hash(action)}"
    return names


def _once(name: str, names: Sequence[str]) -> bool:
    return [other.casefold() for other in names].count(name.casefold()) == 1
