"""fastbandit._files: whole files or none, and readable errors."""

from __future__ import annotations

import os
import stat

import pytest

from fastbandit import _files
from fastbandit._files import FileError, read_json, write_atomic


def test_write_and_read(tmp_path):
    path = tmp_path / "a.json"
    write_atomic(path, '{"a": [1, 2.5, "é"]}\r\n')
    assert path.read_bytes() == '{"a": [1, 2.5, "é"]}\r\n'.encode()
    assert read_json(path) == {"a": [1, 2.5, "é"]}
    write_atomic(str(path), b"[]")
    assert read_json(str(path)) == []
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_a_result_is_as_readable_as_any_new_file(tmp_path):
    mask = os.umask(0o027)
    try:
        write_atomic(tmp_path / "a", b"")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = tmp_path / "a"
    write_atomic(path, "old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(_files.os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_the_folder_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "a", "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not valid JSON: Expecting value"),
        (b'{"a": 1', "not valid JSON: Expecting ',' delimiter"),
        (b"\xff\xfe", "not UTF-8 text .byte 0"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[" * 200_000, "nested too deeply"),
        (b"9" * 5_000, "not valid JSON"),
    ],
)
def test_errors_name_the_file(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(FileError, match=reason) as error:
        read_json(path)
    assert str(error.value).startswith(str(path))


def test_missing_files(tmp_path):
    with pytest.raises(FileError, match="cannot be read: No such file"):
        read_json(tmp_path / "none.json")
    with pytest.raises(FileError, match="cannot be read"):
        read_json(tmp_path)
    with pytest.raises(FileError, match="cannot be read: embedded null"):
        read_json("a\0b")
