"""A file of JSON lines that only grows: a header of what the lines depend on, then one line an entry."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gan.errors import UserError


class LogMismatch(UserError):
    """The log was written with other weights, images or formulas."""


def read_header(path: Path) -> dict[str, Any]:
    """What the entries of a log depend on; nothing where there is no log yet.

    Raises:
        LogMismatch: the file is no log.
    """
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n") and line[:1] in (b"", b"{"):  # its writer died while it wrote the header
        return {}
    header = _header_of(line)
    if header is None:
        raise LogMismatch(f"{path} is no log: its first line is no header; use another path")
    return {key: value for key, value in header.items() if key != "format"}


def _header_of(line: str | bytes) -> dict[str, Any] | None:
    """What a log's first line holds; None where it is no header."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class AppendLog:
    """An append-only ``.jsonl`` file that survives the death of its writer.

    A torn last line (the process died while writing) is dropped on reading and cut off before the next
    append: not earlier, because who only reads may meet a line that another process is writing.

    Args:
        path: the file; made, with its header, when it does not exist.
        header: what the entries depend on; a file with another one is refused.
        read: called with every whole entry of the file.
        kind: what the file is, for the sentences.
        entries: what it holds, for the sentences.

    Raises:
        LogMismatch: if the file has another header, a damaged line, or is no log.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, Any],
        read: Callable[[Mapping[str, Any]], None],
        *,
        kind: str = "log",
        entries: str = "entries",
    ) -> None:
        self.path = path
        self._whole: int | None = None  # bytes before a torn last line that is still there
        header = {"format": 1, **header}
        if not path.exists():
            path.write_text(json.dumps(header) + "\n")
            return
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if not whole and json.dumps(header).encode().startswith(raw):  # died while it wrote the header
            path.write_text(json.dumps(header) + "\n")
            return
        lines = whole.decode(errors="replace").splitlines()
        found = _header_of(lines[0]) if lines else None
        if found is None:
            raise LogMismatch(f"{path} is no {kind}: its first line is no header; use another path")
        wrong = sorted(key for key in {*header, *found} if header.get(key) != found.get(key))
        if wrong:
            raise LogMismatch(
                f"{path} was written with another {', '.join(wrong)}; its {entries} cannot be mixed with new "
                "ones: start a new run instead of resuming this one"
            )
        if len(whole) < len(raw):
            self._whole = len(whole)
        for number, line in enumerate(lines[1:], start=2):
            try:
                read(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise LogMismatch(
                    f"line {number} of {path} is damaged ({error}); cut the file off there, or make a new run"
                ) from error

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one line."""
        if self._whole is not None:
            with self.path.open("r+b") as handle:
                handle.truncate(self._whole)
            self._whole = None
        with self.path.open("a") as handle:
            handle.write(json.dumps(entry) + "\n")
