from __future__ import annotations

from pathlib import Path

import pytest

from gan.append_log import AppendLog, LogMismatch, read_header


def test_the_header_is_read_back_without_the_log(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_header(path) == {}
    log = AppendLog(path, {"weights": "a"}, lambda _: None)
    assert read_header(path) == {"weights": "a"}
    log.append({"plan": 1})
    assert read_header(path) == {"weights": "a"}
    path.write_text('{"format": 1, "wei')  # its writer died
    assert read_header(path) == {}
    path.write_text("")
    assert read_header(path) == {}


@pytest.mark.parametrize("content", [b"text\n", b"[1]\n", b"\xff\xfe\n", b"\n", b"text", b"{}{\n"])
def test_another_file_is_no_log(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(LogMismatch, match=r"x\.jsonl is no log: its first line is no header"):
        read_header(tmp_path / "x.jsonl")
