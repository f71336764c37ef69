"""Damage to bytes, JSON content, and the formats of tensors, images and studies, all determined by a seed."""

from __future__ import annotations

import json
import random
import sqlite3
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Chance = random.Random
WORDS = (
    *("", "0", "-1", "1", "2", "nan", "inf", "-inf", "1e308", "1e-320", "9" * 30, "1.5", "0x10", "1_000"),
    *("None", "null", "true", "false", "[]", "{}", "[1, 2]", '{"a": 1}', "a,b", ",", "-", "--", "*", "%s", "'", "\n"),
    *("\u202e\u00e9", "x" * 5000, "linear", "none", "photos", "[[", "a=b", "!!python/object:x"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "x", "nan", "\u202e"),
    *([], {}, [1, 2], ["a"], {"a": 1}, [[[]]], {"": None}, "x" * 5000),
)


def damaged_bytes(content: bytes, chance: Chance) -> bytes:
    """Damage a file in one of the ways in which a disk, a copy or an editor does."""
    size = len(content)
    start = chance.randrange(size + 1)
    end = min(size, start + chance.choice((1, 4, 64, 1024)))
    block = content[start:end]
    return chance.choice(
        (
            lambda: b"",
            lambda: content[:start],
            lambda: content[start:],
            lambda: bytes(size),
            lambda: content[:start] + bytes(len(block)) + content[end:],
            lambda: content[:start] + chance.randbytes(len(block)) + content[end:],
            lambda: content[:start] + content[end:],
            lambda: content[:end] + content[start:],
            lambda: content + chance.randbytes(64),
            lambda: chance.randbytes(max(1, min(size, 4096))),
            lambda: b"\xef\xbb\xbf" + content,
            lambda: content.decode("latin-1").encode("utf-16"),
            lambda: _flipped(content, chance),
            lambda: _flipped(content, chance),
        )
    )()


def _flipped(content: bytes, chance: Chance) -> bytes:
    found = bytearray(content or b"\0")
    for _ in range(chance.choice((1, 1, 8))):
        found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
    return bytes(found)


def damaged_json(content: bytes, chance: Chance) -> bytes:
    """JSON with another structure, or damaged bytes."""
    if chance.random() < 0.25:
        return damaged_bytes(content, chance)
    return json.dumps(reshaped(json.loads(content), chance)).encode()


def reshaped(content: Any, chance: Chance) -> Any:
    """Content for JSON or YAML in which one or two values are changed, renamed or missing."""
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_places(content))
        if not places or chance.random() < 0.05:
            return chance.choice((*VALUES, _nested(chance.choice((200, 5000)))))
        inside, key = chance.choice(places)
        if chance.random() < 0.7:
            inside[key] = chance.choice(VALUES)
        elif isinstance(inside, dict) and chance.random() < 0.5:
            inside[f"{key}s"] = inside.pop(key)
        else:
            del inside[key]
    return content


def _nested(depth: int) -> Any:
    content: Any = []
    for _ in range(min(depth, 900)):  # what json can serialise
        content = [content]
    return content


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield content, key
        yield from _places(content[key])


def damaged_tensors(content: bytes, chance: Chance) -> bytes:
    """A safetensors file with a changed header, or damaged bytes."""
    if chance.random() < 0.4:
        return damaged_bytes(content, chance)
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if chance.random() < 0.2:
        return struct.pack("<Q", chance.choice((0, 2**63, 2**40, size + 1, size - 1))) + content[8:]
    if "__metadata__" in header and chance.random() < 0.4:
        metadata = header["__metadata__"]
        name = chance.choice(sorted(metadata))
        text = metadata.pop(name)
        if chance.random() < 0.8:
            metadata[name] = damaged_json(text.encode(), chance).decode(errors="replace") if text[:1] == "{" else "x"
    else:
        header = reshaped(header, chance)
    written = json.dumps(header).encode()
    return struct.pack("<Q", len(written)) + written + data


def damaged_image(content: bytes, chance: Chance) -> bytes:
    """An image whose type or size is not what it claims, or damaged bytes."""
    kind = chance.randrange(6)
    if kind == 0:
        return chance.choice((b"no image", b"GIF89a", b"\xff\xd8\xff\xe0", b"<svg/>", b"RIFF\0\0\0\0WEBP", b"%PDF-1.4"))
    if kind == 1:
        return _png(*chance.choice(((60_000, 60_000), (2**31 - 1, 1), (0, 0), (1, 1), (1, 100_000), (20_000, 20_000))))
    return damaged_bytes(content, chance)


def _png(width: int, height: int) -> bytes:
    """A PNG with a valid header but no content."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (header, b"IDAT" + zlib.compress(b""), b"IEND")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


class Planted:
    """Leaves a file named ``executed`` when it is unpickled: nothing may unpickle it."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("executed", "w")


def damaged_pickle(file: Path, chance: Chance) -> None:
    """A file of ``torch.save`` with damaged bytes, with other content, or with code."""
    kind = chance.randrange(4)
    if kind == 0:
        torch.save(Planted(), file)
    elif kind == 1:
        torch.save(chance.choice(VALUES), file)
    elif kind == 2:
        torch.save(reshaped(torch.load(file, weights_only=False), chance), file)
    else:
        file.write_bytes(damaged_bytes(file.read_bytes(), chance))


def damaged_database(file: Path, chance: Chance) -> None:
    """An Optuna study in SQLite with damaged bytes, rows or tables."""
    if chance.random() < 0.4:
        file.write_bytes(damaged_bytes(file.read_bytes(), chance))
        return
    with sqlite3.connect(file) as database:
        names = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        name = chance.choice([n for n in names if database.execute(f"SELECT count(*) FROM {n}").fetchone()[0]])
        column = chance.choice([row[1] for row in database.execute(f"PRAGMA table_info({name})")])
        what = chance.randrange(4)
        if what == 0:
            database.execute(f"DROP TABLE {name}")
        elif what == 1:
            database.execute(f"DELETE FROM {name} WHERE rowid = (SELECT rowid FROM {name} ORDER BY random() LIMIT 1)")
        else:
            value = json.dumps(chance.choice(VALUES)) if what == 2 else chance.choice((None, "x", -1, 1e308, b"\0"))
            rows = f" WHERE rowid = (SELECT max(rowid) FROM {name})" if chance.random() < 0.5 else ""
            try:
                database.execute(f"UPDATE {name} SET {column} = ?{rows}", (value,))
            except sqlite3.IntegrityError:
                database.execute(f"DELETE FROM {name}")
    database.close()


def damaged_lines(content: bytes, chance: Chance) -> bytes:
    """A file of lines, such as an Optuna journal or a table: lines missing, repeated, reordered or damaged."""
    lines = content.splitlines(keepends=True)
    place = chance.randrange(len(lines))
    kind = chance.randrange(6)
    if kind == 0:
        del lines[place]
    elif kind == 1:
        lines.insert(place, lines[place])
    elif kind == 2:
        chance.shuffle(lines)
    elif kind == 3 and lines[place].startswith(b"{"):
        lines[place] = damaged_json(lines[place], chance) + b"\n"
    elif kind == 4:
        lines[place] = damaged_bytes(lines[place].rstrip(b"\n"), chance) + b"\n"
    else:
        return damaged_bytes(content, chance)
    return b"".join(lines)
