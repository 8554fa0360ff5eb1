from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from gan.files import file_hash, write_bytes, write_json, write_text


def test_what_was_written_is_read(tmp_path):
    assert write_bytes(tmp_path / "a.bin", b"\0\1").read_bytes() == b"\0\1"
    assert write_text(tmp_path / "a.txt", "σ ×").read_bytes() == "σ ×".encode()
    assert json.loads(write_json(tmp_path / "a.json", {"x": [1, 2.5]}).read_text()) == {"x": [1, 2.5]}


def test_a_second_write_replaces_the_first(tmp_path):
    path = write_text(tmp_path / "a.txt", "a long first text")
    write_text(path, "short")
    assert path.read_text() == "short"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", "old")

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_refuses_what_other_readers_refuse(tmp_path, value):
    path = write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": value})
    assert path.read_text() == "1\n"


def test_files_get_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    written = write_text(tmp_path / "ours", "")
    assert written.stat().st_mode == (tmp_path / "plain").stat().st_mode
    before = os.umask(0o027)
    try:
        assert write_text(tmp_path / "private", "").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_the_hash_is_the_start_of_sha_256(tmp_path):
    assert file_hash(write_bytes(tmp_path / "abc", b"abc")) == "ba7816bf8f01cfea"  # FIPS 180-2, appendix B.1
