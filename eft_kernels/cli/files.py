"""Texts that come from outside: files, standard input and arguments, as Unicode text or one clear line."""

from __future__ import annotations

import codecs
import os
import sys
from pathlib import Path

from .term import Refused

OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # UTF-32's little-endian mark begins with UTF-16's


def expand(path: str) -> Path:
    """``~`` is the home folder; an unknown ``~user`` stays as it is."""
    return Path(os.path.expanduser(path))


def decode_text(data: bytes, where: str) -> str:
    """UTF-8 with or without a byte-order mark; lines end with a newline alone."""
    try:
        for mark, name in OTHER_ENCODINGS.items():
            if data.startswith(mark):
                raise Refused(f"{where}: cannot read it: not UTF-8 text but {name}; save it as UTF-8")
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(
            f"{where}: cannot read it: not UTF-8 text (byte {data[error.start]:#04x} at offset {error.start})"
        ) from None
    if "\0" in text:
        raise Refused(f"{where}: cannot read it: not text (a zero byte at offset {data.index(0)})")
    return text.replace("\r\n", "\n")


def read_text(path: str, option: str) -> str:
    try:
        return decode_text(expand(path).read_bytes(), f"{option} {path}")
    except OSError as error:
        raise Refused(f"{option} {path}: cannot read it: {error.strerror}") from None


def read_stdin() -> str:
    try:
        stream = getattr(sys.stdin, "buffer", None)
        return decode_text(stream.read(), "standard input") if stream else sys.stdin.read()
    except OSError as error:
        raise Refused(f"standard input: cannot read it: {error.strerror}") from None


def check_text(text: str, where: str) -> str:
    """Refuses lone surrogates, such as JSON's "\\ud800"."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"{where}: not valid Unicode text ({text[error.start]!r} at character {error.start}: a byte that "
            "is not UTF-8, or half of a surrogate pair)"
        ) from None
    return text


def argument_text(text: str, where: str) -> str:
    """An argument of the command line; UTF-8 is right also where the locale's encoding is a smaller one."""
    try:
        return os.fsencode(text).decode() if any("\udc80" <= c <= "\udcff" for c in text) else text
    except UnicodeError:
        return check_text(text, where)


def check_writable(path: str, option: str) -> None:
    """Refuses a file that cannot be written, before anything is done for it."""
    file = expand(path)
    if file.is_dir() or not os.access(file.resolve().parent, os.W_OK):
        raise Refused(f"{option} {path}: cannot write it")
