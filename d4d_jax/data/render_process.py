"""Blender's processes: the environment they need, and one of them under limits."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

BPY = "bpy==4.5.4"
SCRIPT = Path(__file__).with_name("blender.py")
_POLL = 0.1  # seconds


def setup(folder: str | os.PathLike, python: str | None = None) -> str:
    """Makes a virtual environment with Blender as a Python module (`bpy`, GPL, 400 MB).

    Args:
        folder: of the environment; where it has bpy already, nothing is done.
        python: the interpreter to make it with; by default this one if it is Python 3.11, else
            `python3.11`.

    Returns:
        The path of its interpreter.

    Raises:
        ValueError: there is no Python 3.11, or the folder holds something else.
        OSError: pip failed.
    """
    folder = Path(folder).absolute()
    interpreter = folder / "bin" / "python"
    if interpreter.exists() and _has_bpy(interpreter):
        return str(interpreter)
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise ValueError(f"--setup={folder} already holds files; name a new folder.")
    if python is None:
        python = sys.executable if sys.version_info[:2] == (3, 11) else "python3.11"
    if shutil.which(python) is None:
        raise ValueError(
            f"{BPY} needs Python 3.11, which is not here ({python}); install it, or give"
            " --blender_python a Blender executable instead of making an environment."
        )
    commands: list[list[str]] = [
        [python, "-m", "venv", str(folder)],
        [str(interpreter), "-m", "pip", "install", "--quiet", BPY],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise OSError(f"{' '.join(command)} failed: {lines[-1]}")
    if not _has_bpy(interpreter):
        raise OSError(f"{interpreter} has no bpy although pip installed it; it may miss libraries.")
    return str(interpreter)


def _has_bpy(interpreter: Path) -> bool:
    command = [str(interpreter), "-c", "import bpy"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def blender_command(blender_python: str | os.PathLike) -> list[str]:
    """The words before the options of `blender.py`: of a Python with bpy, or of Blender itself.

    Raises:
        FileNotFoundError: there is no such executable.
    """
    found = shutil.which(blender_python)
    if found is None:
        raise FileNotFoundError(
            f"There is no executable --blender_python={os.fspath(blender_python)!r}; make one with"
            " --setup=FOLDER."
        )
    found = os.path.abspath(found)
    if Path(found).stem.lower().startswith("blender"):
        script = ["-b", "--factory-startup", "--python-exit-code", "1", "-P", str(SCRIPT), "--"]
        return [found, *script]
    return [found, str(SCRIPT)]


def run_limited(
    command: Sequence[str],
    *,
    folder: Path,
    seconds: float,
    gigabytes: float,
    alive: Callable[[], bool],
) -> str | None:
    """Runs a command to its end or to its limits, which end it and all that it started.

    Args:
        command: the words.
        folder: for what it prints (`log.txt`), and for its temporary files.
        seconds: without a sign of life after which it is ended; 0 allows any number.
        gigabytes: of memory (GiB, resident, with all that it started) beyond which it is ended; 0
            allows any. Needs /proc, as Linux has it; elsewhere there is no limit.
        alive: called several times a second; True is a sign of life.

    Returns:
        None when it succeeded, else one sentence.
    """
    environment = os.environ | {"TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        reason = _watch(process, seconds, gigabytes, alive)
    finally:
        _kill_group(process)
    alive()
    if reason is None and process.returncode != 0:
        reason = _last_words(folder / "log.txt", process.returncode)
    return reason


def _watch(
    process: subprocess.Popen, seconds: float, gigabytes: float, alive: Callable[[], bool]
) -> str | None:
    last = time.monotonic()
    while True:
        try:
            process.wait(_POLL)
            return None
        except subprocess.TimeoutExpired:
            pass
        if alive():
            last = time.monotonic()
        if 0 < seconds < time.monotonic() - last:
            return f"It was stopped after --time_limit={seconds:g} seconds."
        if 0 < gigabytes < _group_gigabytes(process.pid):
            return f"It was stopped for using more than --memory_limit={gigabytes:g} GiB."


def _kill_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # All of it had ended.
    process.wait()


def _group_gigabytes(group: int) -> float:
    """Resident memory of the processes of a group."""
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                total += int(fields[21])
        except (OSError, ValueError, IndexError):
            continue  # It has just ended.
    return total * os.sysconf("SC_PAGE_SIZE") / 2**30


def _last_words(log: Path, code: int) -> str:
    """Why a process failed: its signal, or what it printed last."""
    if code < 0:
        return f"Blender was ended by {signal.Signals(-code).name}."
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else f"Blender ended with exit code {code}."
