"""The command line of every program: options from a dataclass, errors as one sentence, known exit codes."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tyro
from filelock import FileLock, Timeout

from experiments.runs import GIVEN, flag
from gan.errors import UserError

Options = TypeVar("Options")

LOCK = ".lock"
"""File that a process holds while it writes to a folder of results; it stays, and means nothing then."""


def usage(description: str, examples: Sequence[tuple[str, str]]) -> str:
    """The text above the options: examples first, then what the program does.

    Args:
        description: what the program does; the first lines of its module docstring.
        examples: (command, what it is for) pairs.
    """
    width = max((len(command) for command, _ in examples), default=0)
    lines = [f"  {command:<{width}}  {purpose}" for command, purpose in examples]
    return "\n".join(["examples:", *lines, "", description.strip()])


def parse(
    options: Callable[..., Options],
    description: str,
    examples: Sequence[tuple[str, str]] = (),
    arguments: Sequence[str] | None = None,
) -> Options:
    """Read a dataclass of options from the command line; its fields' docstrings are the help.

    Exits with code 2 and a message on stderr for an unknown option or a value of the wrong type.
    """
    return tyro.cli(
        options,
        prog=f"python experiments/{Path(sys.argv[0]).name}",
        description=usage(description, examples),
        args=arguments,
        # One line per option: no --no-x beside --x, and no {None} beside the type. An option with
        # the default None is left out, not set to None.
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )


def command(program: str, options: Any, usual: Any) -> str:
    """The command line that gives some options; without paths, which are a machine's own.

    Args:
        program: the file's name without ending.
        options: a dataclass.
        usual: the same at its defaults, which are left out.
    """
    return " ".join([f"python experiments/{program}.py", *_flags(options, usual)])


def _flags(options: Any, usual: Any, path: str = "") -> Iterator[str]:
    for field in dataclasses.fields(options):
        value, without = getattr(options, field.name), getattr(usual, field.name)
        name = f"{path}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from _flags(value, without, f"{name}.")
        elif value != without and not isinstance(value, Path):
            yield from [flag(name)] if value is True else [flag(name), str(value)]


def check_new_file(path: Path, kind: str = "file") -> None:
    """Refuse an ``--output`` file, or folder, that exists or has no folder, before any work is done.

    Raises:
        UserError: with what to do.
    """
    if path.exists():
        raise UserError(f"--output {path} exists; name a new {kind}")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} of --output does not exist; make it first")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name when all is written, and not at all otherwise.

    Raises:
        UserError: it exists, or its parent does not.
    """
    check_new_file(path, "folder")
    beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield beside
        beside.chmod(0o755)  # mkdtemp makes private ones
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within it, no other process works in the folder.

    Raises:
        UserError: another process is within its own: two would write every line of the logs twice.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is at work in {folder}; wait until it has ended, or stop it, and try again"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def resumable(program: str, folder: Path, kept: str = "what is done stays") -> Iterator[None]:
    """As :func:`alone`; and Ctrl-C becomes the sentence of how to go on.

    Args:
        program: the file's name without ending.
        folder: what ``--resume`` takes.
        kept: what an interruption leaves.

    Raises:
        UserError: as there.
    """
    with alone(folder):
        try:
            yield
        except KeyboardInterrupt:
            command = f"python experiments/{program}.py --resume {folder}"
            raise KeyboardInterrupt(f"stopped; {kept}; go on with: {command}") from None


def run(
    main: Callable[[Options], None],
    options: Callable[..., Options],
    description: str,
    examples: Sequence[tuple[str, str]] = (),
    arguments: Sequence[str] | None = None,
) -> None:
    """Parse, run ``main`` and leave with an exit code.

    0 when ``main`` returns, 2 and one sentence on stderr for a :class:`UserError`, 130 and one
    sentence for Ctrl-C (the message of the ``KeyboardInterrupt``, if ``main`` raised one of its
    own). Anything else is a defect and keeps its traceback.

    Args:
        main: the program.
        options: the frozen dataclass that it takes.
        description: what it does, a line or two.
        examples: (command, what it is for) pairs, shown first.
        arguments: instead of ``sys.argv[1:]``.
    """
    words = sys.argv[1:] if arguments is None else arguments
    # --weights.density 1 gives weights; tyro takes underscores for dashes
    flags = {re.split(r"[=.]", word)[0].replace("_", "-") for word in words if word.startswith("--")}
    given = GIVEN.set(GIVEN.get())
    try:
        parsed = parse(options, description, examples, arguments)
        GIVEN.set((type(parsed), frozenset(flags)))
        main(parsed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'stopped by Ctrl-C; what is written so far stays'}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, head or a pager, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it flushes
        sys.exit(1)
    finally:
        GIVEN.reset(given)
