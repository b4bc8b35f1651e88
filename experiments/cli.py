"""What the binaries share: flags, and a user's mistake as one sentence instead of a traceback.

With --verbosity=1 the traceback is shown as well.
"""

import contextlib
import logging as stdlib_logging
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags


class _ProfileParser(flags.ArgumentParser):
    """true, false, or FIRST:LAST."""

    def parse(self, argument: Any) -> bool | tuple[int, int]:
        if isinstance(argument, bool):
            return argument
        if argument in ("true", "false"):
            return argument == "true"
        if match := re.fullmatch(r"(\d+):(\d+)", argument):
            return int(match[1]), int(match[2])
        raise ValueError("it is given alone, or as two steps, FIRST:LAST")


_CACHE = flags.DEFINE_string(
    "compilation_cache_dir", None, "Folder in which compiled programs are kept between runs."
)
_PROFILE = flags.DEFINE_flag(
    flags.Flag(
        _ProfileParser(),
        None,
        "profile",
        False,
        "Record a profiler trace in WORKDIR/profile; --profile=10:13 (train) of these steps only.",
        boolean=True,
    )
)

_MISTAKES = (ValueError, OSError, FloatingPointError)
_BINARIES = pathlib.Path(__file__).parent
_default_config: list[str] = []


def define_config(default: str) -> flags.FlagHolder:
    """Defines --config: a file with `get_config(arg="")`, given as FILE.py or FILE.py:ARG.

    Its values are changed by --config.KEY=VALUE; a key that it does not have is an error.

    Args:
        default: file name in experiments/configs that is used when the flag is absent.
    """
    _default_config[:] = [os.path.join(os.path.dirname(__file__), "configs", default)]
    # Not given to the flag as its default: overrides would then be parsed where it is defined.
    return config_flags.DEFINE_config_file(
        "config", None, f"Configuration file; default: experiments/configs/{default}."
    )


def define_preset(names: Sequence[str]) -> flags.FlagHolder:
    """Defines --preset=NAME, a short way to write --config=FILE.py:NAME.

    The name joins the words that --config has; without --config the file is the default one.
    """
    return flags.DEFINE_enum("preset", None, names, "Size of the run: a word of --config.")


def run(main: Callable[[], None]) -> NoReturn:
    """Parses the flags, calls `main()` and ends the process.

    Exit code 0: `main` returned. 2: a flag or configuration key does not exist or has a value of
    the wrong kind. 1: `main` raised ValueError, OSError (missing, unreadable or existing files)
    or FloatingPointError; its message is printed as the one sentence that it is, after its
    traceback when --verbosity=1 is given. Anything else is a bug of ours and shows its traceback.
    """
    app.run(lambda _: _checked(main), flags_parser=_parse)
    sys.exit(0)


def claim_workdir(
    path: str | os.PathLike[str], outputs: Sequence[str], *, overwrite: bool
) -> pathlib.Path:
    """The folder for results, made if needed.

    Args:
        path: the folder.
        outputs: names of what the binary is going to write there.
        overwrite: whether it may replace what is there already.

    Raises:
        FileExistsError: one of the outputs is there and `overwrite` is not set.
    """
    workdir = pathlib.Path(path)
    for name in outputs:
        if (workdir / name).exists() and not overwrite:
            raise FileExistsError(
                f"{path} already holds {name}: choose another --workdir or add --overwrite."
            )
    workdir.mkdir(parents=True, exist_ok=True)
    return workdir


def log_devices(mesh: Any = None) -> None:
    """Logs the devices, and the mesh when there is one."""
    devices = jax.devices()
    logging.info("Devices: %d x %s.", len(devices), devices[0].device_kind)
    if mesh is not None:
        logging.info("Mesh: %s.", ", ".join(f"{k}={v}" for k, v in mesh.shape.items()))


def profile(workdir: str | os.PathLike[str]) -> contextlib.AbstractContextManager[Any]:
    """Returns a context that records into `WORKDIR/profile` when --profile was given."""
    if _PROFILE.value is True:
        return jax.profiler.trace(os.path.join(workdir, "profile"))
    return contextlib.nullcontext()


def profile_steps() -> tuple[int, int] | None:
    """Returns the first and the last step of --profile=FIRST:LAST."""
    return _PROFILE.value if isinstance(_PROFILE.value, tuple) else None


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop at the next good moment.

    Yields a function that returns the number of the signal, 0 as long as none came. A second
    signal acts as if the first one had not been held back.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: Any) -> None:
        received.append(number)
        for held, handler in before.items():
            signal.signal(held, handler)
        logging.warning("Stopping after this step; a second signal stops at once.")

    try:
        for number in before:
            signal.signal(number, note)
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _checked(main: Callable[[], None]) -> None:
    _start_logging()
    if _CACHE.value:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(_CACHE.value))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        main()
    except _MISTAKES as error:
        logging.debug("Where it happened:", exc_info=error)
        _stop(_sentence(error), 1)


def _start_logging() -> None:
    """Shows our messages from --verbosity (INFO) on with the time, others from WARNING on."""
    logging.use_absl_handler()
    chosen = not flags.FLAGS["verbosity"].using_default_value
    logging.set_verbosity(flags.FLAGS.verbosity if chosen else logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(stdlib_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    # Libraries report every detail of what they do, some of them through absl as well.
    handler.addFilter(lambda record: record.levelno >= stdlib_logging.WARNING or _is_ours(record))


def _is_ours(record: stdlib_logging.LogRecord) -> bool:
    package = record.name.split(".")[0]
    return package in ("d4d_jax", "gaussians") or pathlib.Path(record.pathname).parent == _BINARIES


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; unknown ones, and unknown configuration keys, end the process."""
    argv = list(argv)
    given, rest = _take(argv, "config")
    if given is not None and not os.path.isfile(given.split(":")[0]):
        _stop(f"There is no configuration file {given.split(':')[0]}.", 2)
    if _default_config:
        config = given or _default_config[0]
        preset, _ = _take(argv, "preset")
        if preset is not None and "preset" in flags.FLAGS:
            file, _, words = (given or _default_config[0].split(":")[0]).partition(":")
            config = f"{file}:{','.join(filter(None, [words, preset]))}"
        argv = [rest[0], f"--config={config}", *rest[1:]]
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        wrapped = error.__context__ and error.__context__.__context__
        if isinstance(wrapped, (TypeError, ValueError)):  # ml_collections quotes its traceback.
            _stop(f"The configuration cannot be read: {_sentence(wrapped)}", 2)
        _stop(f"{str(error).rstrip('.')}.", 2)
    except (AttributeError, KeyError) as error:  # what ml_collections raises for a key
        _stop(_unknown_key(str(error)), 2)
    except (TypeError, ValueError, OSError) as error:
        _stop(f"The configuration cannot be read: {_sentence(error)}", 2)
    if len(rest) > 1:
        _stop(f"Unexpected argument {rest[1]!r}: options are written --name=value.", 2)
    return rest


def _take(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """The last value of a flag, --name=VALUE or --name VALUE, and the arguments without it."""
    value, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        flag, equals, text = argument.partition("=")
        if flag in (f"--{name}", f"-{name}"):
            value = text if equals else next(arguments, "")
        else:
            rest.append(argument)
    return value, rest


def _unknown_key(message: str) -> str:
    """Makes a sentence of ml_collections' nested messages about a missing key."""
    message = message.replace("\\", "").split("Attempting to lookup: ")[-1]
    name = re.search(r"[\w.]+", message)
    hint = re.search(r'Did you mean "([\w.]+)"', message)
    sentence = f"The configuration has no key {name.group() if name else message!r}"
    return f"{sentence}; did you mean {hint.group(1)}?" if hint else f"{sentence}."


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}."
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split())


def _stop(sentence: str, code: int) -> NoReturn:
    print(f"Error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(code)
