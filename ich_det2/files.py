"""Files that appear whole or not at all."""

import contextlib
import csv
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def write_atomically(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file beside ``path`` that takes its place when the block ends well.

    Args:
        path: the file to write; its folder must exist.
        mode: "w" (UTF-8, newlines as written) or "wb".
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode, **text) as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path) -> None:
    """Removes what ``write_atomically`` leaves in a folder when its process is killed."""
    for path in Path(folder).glob(".*." + "[0-9a-f]" * 12 + ".tmp"):
        path.unlink()


def write_csv(path: str | Path, fields: Sequence[str], rows: Sequence[dict]) -> None:
    """Writes rows to a CSV file, whole or not at all."""
    with write_atomically(path) as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: str | Path, content) -> None:
    """Writes plain values as JSON, whole or not at all; JSON has no NaN or infinity: null."""
    with write_atomically(path) as file:
        json.dump(_finite(content), file, indent=2)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256(path: str | Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
