"""Published renders of Diffusion4D (hw-liang/Diffusion4D on Hugging Face) to clip folders.

Two layouts are read, below any leading folders, from .zip and .tar (also compressed) files:

    Objaverse-1.0   Dynamic4D/UID/*, Static3D/UID/*, monocular_front/UID/*
    Objaverse-XL    UID/*, dynamic orbit and front view together, no static orbit

Files are recognised by their own names (`multi_frame0.png`, `static3.json` ...; see
`d4d_jax.clips`); in the trees of Objaverse-1.0 the tree decides which view set frames belong to.
Nothing in an archive decides where something is written: a member's name is only compared with
these patterns.
"""

import dataclasses
import gzip
import itertools
import json
import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from d4d_jax import clips
from d4d_jax.data import records, tables

FAILURE_COLUMNS = ("clip", "reason")

_TREES = {"Dynamic4D": "dynamic", "Static3D": "static", "monocular_front": "front"}
_STEMS = {
    "dynamic": ("multi_frame", "multi"),
    "static": ("multi_static_frame", "static"),
    "front": ("front_frame", "front"),
}
_UID = re.compile(r"[0-9a-f]{32}([0-9a-f]{32})?")
_FILE = re.compile(
    r"(multi_frame|multi_static_frame|front_frame|multi|static|front)(\d*)\.(png|json)"
)
_CHUNK = 2**20

_Stream = Any  # a binary file, as `zipfile`, `tarfile` and `open` return it

#: What the readers raise for damaged archives. Other OSErrors, such as a full disk, end the run.
_DAMAGE = (
    *(EOFError, NotImplementedError, gzip.BadGzipFile, lzma.LZMAError, zlib.error),
    *(tarfile.TarError, zipfile.BadZipFile),
)


def unpack(
    archives: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    captions: Mapping[str, str] | None = None,
    max_file_megabytes: float = 64.0,
    max_gigabytes: float = 1000.0,
) -> tuple[int, list[tuple[str, str]]]:
    """Unpacks archives into clip folders, and writes `failures.tsv`.

    The view sets of a clip may lie in different archives of one call. A rendering of an asset goes
    to `out/UID`; where two archives (or two folders of one) have the same view set of one UID,
    these are two renderings, and the second one is `out/UID-2`. Clips that are there are kept, so
    that the same call goes on after a stop.

    Args:
        archives: files.
        out: folder of the clips; created.
        captions: by UID, such as Cap3D's (`captions.read_table`).
        max_file_megabytes: size of the largest file that is taken out, against files that unpack
            to far more than they are.
        max_gigabytes: of all files that are taken out.

    Returns:
        The number of clips in `out`, and the rows of `failures.tsv`: what was left out, and why.

    Raises:
        FileNotFoundError: an archive is missing.
    """
    paths = [Path(archive) for archive in archives]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"There is no archive {str(path)!r}.")
    out = Path(out).absolute()
    partial = out / ".unpacking"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
    partial.mkdir(parents=True)
    unpacker = _Unpacker(out, partial, round(max_file_megabytes * 1e6), round(max_gigabytes * 1e9))
    for path in paths:
        unpacker.read(path)
    unpacker.finish(captions or {})
    shutil.rmtree(partial)
    failures = unpacker.failures
    tables.write_table(out / "failures.tsv", FAILURE_COLUMNS, failures)
    return sum(1 for _ in out.glob("[!.]*/clip.json")), failures


@dataclasses.dataclass
class _Unpacker:
    """What is known while archives are read.

    Attributes:
        out: folder of the clips.
        partial: folder of clips that may be incomplete.
        most: bytes of a file.
        left: bytes that may still be written.
        origins: by clip and view set, the folder in an archive that it is from.
        failures: rows of `failures.tsv`.
    """

    out: Path
    partial: Path
    most: int
    left: int
    origins: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def read(self, path: Path) -> None:
        """Takes all parts of clips out of an archive."""
        try:
            for name, stream in _members(path):
                if name.startswith("/") or ".." in name.split("/"):
                    self.failures.append((path.name, f"{name!r} leads out of the archive."))
                elif place := _place(name):
                    self._take(path, name, place, stream)
        except _DAMAGE as error:
            reason = f"It is damaged, or no archive that can be read ({error or 'cut short'})."
            self.failures.append((path.name, reason))
        except (ValueError, RuntimeError) as error:  # zipfile asks for passwords by the latter
            self.failures.append((path.name, str(error)))

    def _take(self, path: Path, name: str, place: "_Place", stream: _Stream) -> None:
        """Writes a file to the folder of its clip, the first that lacks this view set."""
        origin = f"{path.name}/{name.rpartition('/')[0]}"
        clip = place.uid
        for number in itertools.count(2):
            owners = self.origins.setdefault(clip, {})
            if owners.setdefault(place.view, origin) == origin:
                break
            clip = f"{place.uid}-{number}"
        if (self.out / clip).exists():
            return
        target = self.partial / clip / place.file
        target.parent.mkdir(exist_ok=True)
        try:
            with target.open("wb") as file:
                self._copy(stream, file)
        except _TooLarge as error:
            target.unlink()
            self.failures.append((path.name, f"{name!r} {error}"))
        except _DAMAGE as error:
            target.unlink()
            self.failures.append((path.name, f"{name!r} is damaged ({error})."))
        if self.left < 0:
            raise ValueError("The rest was left out: more than max_gigabytes would be unpacked.")

    def _copy(self, stream: _Stream, file: _Stream) -> None:
        """Copies what a stream really holds, whatever the archive says of its length."""
        written = 0
        while chunk := stream.read(_CHUNK):
            written += len(chunk)
            self.left -= len(chunk)
            if written > self.most or self.left < 0:
                raise _TooLarge(f"was left out: it unpacks to more than {self.most:,} bytes.")
            file.write(chunk)

    def finish(self, captions: Mapping[str, str]) -> None:
        """Moves the clips that are complete to their place."""
        for clip, owners in sorted(self.origins.items()):
            source = ", ".join(sorted(set(owners.values())))
            if (self.out / clip).exists():
                there = records.facts_of(self.out / clip).get("source", "elsewhere")
                if there != source:
                    reason = f"It is there already, from {there}; name all archives of an asset in"
                    self.failures.append((clip, f"{reason} one call."))
                continue
            folder = self.partial / clip
            try:
                clips.read_clip(folder)
            except (ValueError, FileNotFoundError) as error:
                self.failures.append((clip, str(error).replace(f"{self.partial}{os.sep}", "")))
                continue
            uid = clip.partition("-")[0]
            if captions.get(uid):
                (folder / "caption.txt").write_text(captions[uid] + "\n", encoding="utf-8")
            facts = {"asset": uid, "action": "", "source": source, "licence": ""}
            (folder / "clip.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
            folder.rename(self.out / clip)


class _TooLarge(Exception):
    """A file is larger than allowed."""


class _Place(NamedTuple):
    """Where a file of an archive belongs: the asset, the view set, and the name in our layout."""

    uid: str
    view: str
    file: str


def _place(name: str) -> _Place | None:
    """The place of a member, or None for one that is no part of a clip."""
    *folders, file = name.split("/")
    match = _FILE.fullmatch(file)
    uids = [folder for folder in folders if _UID.fullmatch(folder)]
    if match is None or not uids:
        return None
    stem, number, suffix = match.groups()
    view = next(view for view, stems in _STEMS.items() if stem in stems)
    view = next((_TREES[folder] for folder in folders if folder in _TREES), view)
    stem = _STEMS[view][suffix == "json"]
    return _Place(uids[-1], view, f"{stem}{'' if stem == 'front' else number}.{suffix}")


def _members(path: Path) -> Iterator[tuple[str, _Stream]]:
    """The files of an archive, opened one after the other; links and devices are left out.

    Raises:
        ValueError: it is empty, or a part of a split one.
        And what the readers of archives raise.
    """
    if path.stat().st_size == 0:
        raise ValueError("It is empty.")
    if path.suffix == ".zip" or zipfile.is_zipfile(path):
        if path.with_suffix(".z01").exists():
            raise ValueError(
                "It is split; join the parts with `zip -s 0 SPLIT.zip --out WHOLE.zip` first."
            )
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = info.filename.replace("\\", "/")
                if not info.is_dir():
                    with archive.open(info) as stream:
                        yield name, stream
    else:
        with tarfile.open(path, "r|*") as archive:  # in one pass, without an index
            for member in archive:
                if member.isfile() and (stream := archive.extractfile(member)):
                    yield member.name.replace("\\", "/"), stream
