"""Published archives: both layouts, several renderings of an asset, damage, attacks."""

import dataclasses
import errno
import io
import json
import os
import stat
import tarfile
import zipfile

import numpy as np
import pytest

from d4d_jax import clips
from d4d_jax.data import archives, synthetic

V1 = "2a7f866be31e43b89074f304a31ff82d"
OTHER = "900cafbf2ee3444d823026bd417010f0"
XL = "ab" * 32
TREES = {"dynamic": "Dynamic4D", "static": "Static3D", "front": "monocular_front"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a clip with all view sets, by view set and name."""
    clip = synthetic.make_clip(1, num_frames=3, size=16, samples=1)
    folder = tmp_path_factory.mktemp("clip") / "clip"
    views = dict(front=clip.dynamic, front_alpha=clip.dynamic_alpha)
    clips.write_clip(dataclasses.replace(clip, **views), folder)
    prefixes = {"dynamic": ("multi_frame", "multi"), "static": ("multi_static", "static")}
    found = {view: {} for view in TREES}
    for path in folder.iterdir():
        if path.name != "caption.txt":
            stem = path.stem.rstrip("0123456789")
            view = next((v for v, stems in prefixes.items() if stem in stems), None)
            view = view or ("static" if "static" in stem else "front")
            found[view][path.name] = path.read_bytes()
    return found


def v1(files, uid=V1, views=TREES):
    """The members of the layout of Objaverse-1.0."""
    return {
        f"objaverse1.0/{TREES[view]}/{uid}/{name}": data
        for view in views
        for name, data in files[view].items()
    }


def xl(files, uid=XL):
    return {f"{uid}/{n}": d for view in ("dynamic", "front") for n, d in files[view].items()}


def write_zip(path, members, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_tar(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def assert_holds(folder, files, views):
    assert {p.name: p.read_bytes() for p in folder.iterdir() if "clip.json" != p.name} == {
        name: data for view in views for name, data in files[view].items()
    }


def test_objaverse_1_is_put_together_from_its_trees(files, tmp_path):
    archive = write_zip(tmp_path / "part.zip", v1(files) | {"readme.txt": b"hello"})
    count, failures = archives.unpack([archive], tmp_path / "out", captions={V1: "a girl"})
    assert (count, failures) == (1, [])
    clip = clips.read_clip(tmp_path / "out" / V1)
    assert clip.caption == "a girl" and clip.front is not None and clip.static is not None
    (tmp_path / "out" / V1 / "caption.txt").unlink()
    assert_holds(tmp_path / "out" / V1, files, TREES)
    facts = json.loads((tmp_path / "out" / V1 / "clip.json").read_text())
    assert facts["asset"] == V1 and "part.zip/objaverse1.0/Static3D" in facts["source"]


def test_the_trees_may_lie_in_archives_of_their_own_with_plain_names(files, tmp_path):
    def renamed(view):
        stem = "multi_static_frame" if view == "static" else "front_frame"
        return {
            f"{TREES[view]}/{V1}/{name.replace(stem, 'multi_frame')}": data
            for name, data in files[view].items()
        }

    parts = [
        write_tar(tmp_path / "dynamic.tar", v1(files, views=["dynamic"]), "w"),
        write_tar(tmp_path / "static.tar.xz", renamed("static"), "w:xz"),
        write_zip(tmp_path / "front.zip", renamed("front")),
    ]
    assert archives.unpack(parts, tmp_path / "out") == (1, [])
    assert_holds(tmp_path / "out" / V1, files, TREES)


def test_objaverse_xl_has_no_static_orbit(files, tmp_path):
    archive = write_tar(tmp_path / "xl.tar.gz", xl(files))
    assert archives.unpack([archive], tmp_path / "out") == (1, [])
    assert_holds(tmp_path / "out" / XL, files, ("dynamic", "front"))


def test_every_rendering_of_an_asset_is_a_clip(files, tmp_path):
    parts = [write_zip(tmp_path / f"{i}.zip", v1(files)) for i in range(3)]
    assert archives.unpack(parts, tmp_path / "out") == (3, [])
    for i, name in enumerate((V1, f"{V1}-2", f"{V1}-3")):
        assert_holds(tmp_path / "out" / name, files, TREES)
        facts = json.loads((tmp_path / "out" / name / "clip.json").read_text())
        assert facts["asset"] == V1 and facts["source"].startswith(f"{i}.zip/")


def test_scattered_members_are_gathered(files, tmp_path):
    both = [*v1(files).items(), *v1(files, OTHER).items()]
    mixed = dict(both[i] for i in np.random.default_rng(0).permutation(len(both)))
    archive = write_tar(tmp_path / "mixed.tar.gz", mixed)
    assert archives.unpack([archive], tmp_path / "out") == (2, [])
    assert_holds(tmp_path / "out" / OTHER, files, TREES)


def test_the_same_again_changes_nothing_and_another_source_is_told(files, tmp_path):
    archive = write_zip(tmp_path / "part.zip", v1(files))
    archives.unpack([archive], tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / V1).iterdir()}
    assert archives.unpack([archive], tmp_path / "out") == (1, [])
    other = write_zip(tmp_path / "other.zip", v1(files))
    count, ((name, reason),) = archives.unpack([other], tmp_path / "out")
    assert (count, name) == (1, V1) and "there already, from part.zip" in reason
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / V1).iterdir()} == before
    assert not (tmp_path / "out" / ".unpacking").exists()


def test_an_incomplete_clip_costs_itself(files, tmp_path):
    members = v1(files) | v1(files, OTHER)
    del members[f"objaverse1.0/Dynamic4D/{OTHER}/multi_frame1.png"]
    archive = write_zip(tmp_path / "part.zip", members)
    count, ((name, reason),) = archives.unpack([archive], tmp_path / "out")
    assert (count, name) == (1, OTHER)
    assert "multi_frame1.png' is missing" in reason and str(tmp_path) not in reason
    table = (tmp_path / "out" / "failures.tsv").read_text().splitlines()
    assert table[0] == "clip\treason" and len(table) == 2


def bomb(path, files):
    members = v1(files) | {f"{OTHER}/multi_frame0.png": bytes(30_000_000)}
    return write_zip(path, members)


def lying(path, files):
    """A bomb that claims to be small: its central directory says 100 bytes."""
    data = bytearray(bomb(path, files).read_bytes())
    size = (30_000_000).to_bytes(4, "little")
    assert data.count(size) >= 1
    path.write_bytes(bytes(data).replace(size, (100).to_bytes(4, "little")))
    return path


def traversal(path, files):
    evil = {f"../../{V1}/multi_frame0.png": b"evil", f"/{V1}/front.json": b"evil"}
    return write_zip(path, v1(files) | evil | {f"..\\{V1}\\multi0.json": b"evil"})


def traversing_tar(path, files):
    return write_tar(path, v1(files) | {f"a/../../../{OTHER}/multi_frame0.png": b"evil"})


def links(path, files):
    write_tar(path, v1(files), "w")
    with tarfile.open(path, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"{OTHER}/multi_frame0.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    return path


def zip_link(path, files):
    with zipfile.ZipFile(write_zip(path, v1(files)), "a") as archive:
        info = zipfile.ZipInfo(f"{OTHER}/multi_frame0.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return path


@pytest.mark.parametrize(
    "make, words",
    [
        (bomb, ["unpacks to more than 1,000,000 bytes"]),
        (lying, ["multi_frame0.png"]),
        (traversal, ["'../../", "'/2a7f", "leads out of the archive"]),
        (traversing_tar, ["leads out of the archive"]),
        (links, []),
        (zip_link, [OTHER]),
    ],
)
def test_attacks_cost_themselves(files, tmp_path, make, words):
    home = tmp_path / "home" / "deep"
    home.mkdir(parents=True)
    archive = make(home / ("x.tar" if "tar" in make.__name__ or make is links else "x.zip"), files)
    _, failures = archives.unpack([archive], home / "out", max_file_megabytes=1.0)
    told = " ".join(" ".join(row) for row in failures)
    assert all(word in told for word in words) and bool(failures) == bool(words)
    assert_holds(home / "out" / V1, files, TREES)
    outside = {p for p in tmp_path.rglob("*") if home / "out" not in p.parents}
    assert outside == {home.parent, home, archive, home / "out"}
    assert {p.name for p in (home / "out").iterdir()} == {V1, "failures.tsv"}
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_all_files_together_have_a_limit(files, tmp_path):
    archive = write_zip(tmp_path / "part.zip", v1(files))
    count, failures = archives.unpack([archive], tmp_path / "out", max_gigabytes=1e-7)
    assert count == 0 and "more than max_gigabytes" in " ".join(row[1] for row in failures)


def test_archives_that_cannot_be_read_are_told_and_the_others_go_on(files, tmp_path):
    good = write_zip(tmp_path / "good.zip", v1(files))
    (tmp_path / "empty.zip").touch()
    (tmp_path / "text.tar.gz").write_text("no archive")
    (tmp_path / "text.zip").write_text("no archive")
    write_zip(tmp_path / "split.zip", xl(files))
    (tmp_path / "split.z01").touch()
    whole = write_tar(tmp_path / "whole.tar", v1(files, OTHER), "w").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"IDAT", len(whole) // 2) + 2])
    names = ("empty.zip", "text.tar.gz", "text.zip", "split.zip", "cut.tar", good.name)
    count, failures = archives.unpack([tmp_path / name for name in names], tmp_path / "out")
    assert count == 1
    reasons = dict(failures)
    assert reasons["empty.zip"] == "It is empty."
    assert "zip -s 0" in reasons["split.zip"]
    for name in ("text.tar.gz", "text.zip", "cut.tar"):
        assert "damaged" in reasons[name]
    assert OTHER in reasons
    with pytest.raises(FileNotFoundError, match=r"no archive .*absent.zip"):
        archives.unpack([tmp_path / "absent.zip"], tmp_path / "out")


def test_a_damaged_member_costs_its_clip(files, tmp_path):
    path = tmp_path / "part.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (v1(files) | v1(files, OTHER)).items():
            archive.writestr(name, data)
    victim = files["dynamic"]["multi_frame1.png"]
    data = path.read_bytes()
    place = data.rindex(victim) + len(victim) // 2
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    count, failures = archives.unpack([path], tmp_path / "out")
    assert count == 1 and (tmp_path / "out" / V1).is_dir()
    assert any("frame1.png' is damaged" in reason for _, reason in failures)


def test_a_password_is_told(files, tmp_path):
    path = write_zip(tmp_path / "locked.zip", v1(files))
    data = bytearray(path.read_bytes())
    for mark, flag in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.find(mark)
        while place >= 0:
            data[place + flag] |= 1
            place = data.find(mark, place + 4)
    path.write_bytes(bytes(data))
    count, failures = archives.unpack([path], tmp_path / "out")
    assert count == 0 and "password" in failures[0][1]


def test_a_full_disk_ends_the_run_and_spoils_nothing(files, tmp_path, monkeypatch):
    archive = write_zip(tmp_path / "part.zip", v1(files))
    archives.unpack([archive], tmp_path / "out")
    other = write_zip(tmp_path / "other.zip", v1(files, OTHER))

    def full(self, stream, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(archives._Unpacker, "_copy", full)
        with pytest.raises(OSError, match="No space left"):
            archives.unpack([archive, other], tmp_path / "out")
    assert_holds(tmp_path / "out" / V1, files, TREES)
    assert archives.unpack([archive, other], tmp_path / "out") == (2, [])
