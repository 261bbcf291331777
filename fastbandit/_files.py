"""Files on disk: written whole or not at all, read within limits, with errors that name the file.

What a run stores as JSON is sealed: it carries a checksum of all that it says. What is read may
come from a stranger, so each kind of file has a size beyond which it is not read, JSON is refused
where it is nested deeper than ours or names a key twice, and a link or a pipe in place of a file
is refused before it is opened.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "MEGABYTE",
    "FileError",
    "canonical_json",
    "check_seal",
    "checksum",
    "csv_text",
    "json_value",
    "naming",
    "parse_json",
    "plain_file",
    "read_bytes",
    "read_json",
    "read_sealed",
    "read_text",
    "seal",
    "write_atomic",
    "write_sealed",
]

MEGABYTE = 2**20
#: Levels of objects and lists in a JSON file; ours have eight.
_DEEPEST = 64
#: Bytes of a JSON file. The largest of ours names every image of a set, with 13 bytes for each.
_LARGEST_JSON = 64 * MEGABYTE

# Half of a character that UTF-16 writes as two. U+DC80 to U+DCFF stand for the bytes of a file
# name that is not UTF-8, so a configuration may hold them.
_HALF = re.compile("[\ud800-\udc7f\udd00-\udfff]")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")

_CHECKSUM, _CHECKSUM_OF, _ALL_ELSE = "checksum", "checksum_of", "all other entries"

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


class FileError(ValueError):
    """A file that cannot be read as what it should be; the message starts with its name."""


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the system (a full disk, a quota) leaves this context with the file's name."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old content or the new, never a part.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed over
    ``path``; a crash at any moment leaves at most a stray hidden ``.tmp`` file. Text is written
    as UTF-8 with its line ends as they are; a byte of a file name that is not UTF-8 becomes an
    escape such as ``\\udcff``. The folder must exist.

    Raises:
        OSError: the folder does not exist or cannot be written to, or the disk is full; it names
            ``path``, which is untouched then.
    """
    target = Path(path)
    payload = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # Opened by hand and not by tempfile, which would make the result readable by its owner only.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with naming(target):
        descriptor = os.open(temporary, flags, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(payload)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the rename itself durable where the system can (POSIX); elsewhere do nothing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header; a column that a row lacks is empty, other entries are left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, "", "ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- reading --------------------------------------------------------------------------------


def plain_file(path: Path, *, folder: bool = False) -> Path:
    """``path``, where a file of a run or nothing at all is there.

    A run folder may come from somebody else: through a link it would have us read or cut a file
    elsewhere, and a pipe never ends.

    Args:
        folder: a folder is expected there.

    Raises:
        FileError: a link, a pipe, a device, a folder in place of a file or the other way round.
    """
    try:
        mode = os.lstat(path).st_mode
    except (OSError, ValueError):
        return path  # who opens it says why it cannot be
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        got = "a file" if stat.S_ISREG(mode) else "a device"
        got = next((name for test, name in _KINDS if test(mode)), got)
        raise FileError(f"{path}: expected a {'folder' if folder else 'plain file'}, got {got}")
    return path


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a file of at most ``limit`` bytes.

    Raises:
        FileError: it is longer.
        OSError: it cannot be read; the error names it.
    """
    with naming(path), open(path, "rb") as stream:
        # A device or a pipe has no size, so that what is read counts too.
        size = os.fstat(stream.fileno()).st_size
        data = b"" if size > limit else stream.read(limit + 1)
    if max(size, len(data)) > limit:
        raise FileError(f"{path}: expected at most {limit:,} bytes, got more")
    return data


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """The UTF-8 text of a file of at most ``limit`` bytes.

    Raises:
        FileError: it is missing, cannot be read, is longer or is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 text (byte {error.start} is not)") from None
    except FileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL byte inside the name
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{path}: cannot be read: {reason}") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, a number that JSON lacks (NaN), a key given twice in one object,
            nested deeper than 64 levels, or text with half a character.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # Every level takes a bracket, and half a character an escape: most texts have few, or none.
    if text.count("[") + text.count("{") > _DEEPEST or _ESCAPED_HALF.search(text):
        _check_values(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r:.80} is given twice")
    return mapping


def _check_values(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if _HALF.search(item):
                    raise ValueError("its text holds half a character (a lone surrogate)")
            elif isinstance(item, dict):
                deeper += item.keys()
                deeper += item.values()
            elif isinstance(item, list):
                deeper += item
        if not deeper:
            return
        level = deeper
    if any(isinstance(item, (dict, list)) for item in level):
        raise ValueError("nested too deeply")


def read_json(path: str | os.PathLike[str], limit: int = _LARGEST_JSON) -> Any:
    """The value of the JSON file ``path``.

    Raises:
        FileError: the file is missing, unreadable, longer than ``limit`` bytes, not UTF-8 or not
            JSON as :func:`parse_json` has it. The message holds the file name and the reason.
    """
    text = read_text(path, limit)
    try:
        return parse_json(text)
    except ValueError as error:  # includes json.JSONDecodeError and integers beyond Python's limit
        raise FileError(f"{path}: not valid JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


# --- seals ----------------------------------------------------------------------------------


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: one text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def json_value(value: Any) -> Any:
    """``value`` as a file will give it back: lists where there are tuples, keys that are text."""
    return json.loads(json.dumps(value))


def checksum(value: Any) -> str:
    """CRC-32 of the canonical JSON of a value that JSON gave, 8 hexadecimal digits.

    It notices damage, not intent: who changes a file on purpose can compute it again.
    """
    return f"{zlib.crc32(canonical_json(value).encode()):08x}"


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` with a checksum of all that it says, as :func:`check_seal` wants it."""
    # As it will be read: keys are text, tuples are lists.
    content = json.loads(canonical_json(dict(value)))
    return {**value, _CHECKSUM_OF: _ALL_ELSE, _CHECKSUM: checksum(content)}


def check_seal(value: Any, where: str | os.PathLike[str]) -> Any:
    """``value`` without its seal; as it is where it has none, as in files of older versions.

    Raises:
        FileError: it does not say what it said when it was written. One damaged byte cannot make
            a sealed value look like one without a seal, since a seal is two entries.
    """
    if not isinstance(value, dict) or not {_CHECKSUM, _CHECKSUM_OF} & value.keys():
        return value
    rest = dict(value)
    stated, of = rest.pop(_CHECKSUM, None), rest.pop(_CHECKSUM_OF, None)
    try:
        matches = of == _ALL_ELSE and stated == checksum(rest)
    except ValueError:  # 1e999, which is read as infinite, and which no file of ours has
        matches = False
    if not matches:
        raise FileError(f"{where}: damaged or edited: its checksum does not match what it says")
    return rest


def write_sealed(
    path: str | os.PathLike[str], value: Mapping[str, Any], *, indent: int = 1
) -> None:
    """Write ``value`` with its :func:`seal`, as :func:`read_sealed` wants it."""
    write_atomic(path, json.dumps(seal(value), indent=indent, allow_nan=False) + "\n")


def read_sealed(path: str | os.PathLike[str], limit: int = _LARGEST_JSON) -> Any:
    """:func:`read_json` and :func:`check_seal`: what a run stored, as it stored it.

    Raises:
        FileError: see there.
    """
    return check_seal(read_json(path, limit), path)
