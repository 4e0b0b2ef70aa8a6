"""Files that appear whole or not at all, and the one walk through folders."""

import contextlib
import csv
import hashlib
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def write_atomically(path: str | Path, mode: str = "w", *, private: bool = False) -> Iterator[IO]:
    """Opens a temporary file beside ``path`` that takes its place when the block ends well.

    Args:
        path: the file to write; its folder must exist.
        mode: "w" (UTF-8, newlines as written) or "wb".
        private: readable by its owner alone.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    opener = _open_private if private else None
    try:
        with open(temporary, mode, encoding=encoding, newline=newline, opener=opener) as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):  # nobody has heard of that one
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(path: str | Path) -> Iterator[Path]:
    """Gives a new folder that takes the place of ``path`` when the block ends well; what was
    there is removed then, and stays if the block fails."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    fresh, old = work / "new", work / "old"
    try:
        fresh.mkdir()
        yield fresh
        if path.exists():
            os.rename(path, old)
        os.rename(fresh, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(work, ignore_errors=True)


def nested(folder: str | Path, others: Iterable[str | Path]) -> Path | None:
    """The first of other paths that lies in a folder, or that the folder lies in; None if they are
    all apart. Neither needs to be there."""
    # Not by Path.resolve, which raises a RuntimeError of a link to itself.
    folder = Path(os.path.realpath(folder))
    for other in others:
        path = Path(os.path.realpath(other))
        if path.is_relative_to(folder) or folder.is_relative_to(path) and not path.is_file():
            return path
    return None


def check_writable(path: str | Path, option: str) -> None:
    """Refuses a file or folder to write where there are no rights to, before hours of work.

    Args:
        path: the file or folder; neither it nor its parents need to be there.
        option: that gave it, which begins the error.

    Raises:
        ValueError: one sentence with the remedy.
    """
    place = os.path.realpath(path)
    if os.path.islink(place):
        raise ValueError(f"{option} {path}: is a link that leads back to itself; give another.")
    parent = os.path.dirname(place)
    while not os.path.exists(parent):
        parent = os.path.dirname(parent)
    if not os.path.isdir(parent):
        raise ValueError(f"{option} {path}: {parent} is a file; give a place in a folder.")
    for folder in (parent, place):
        if os.path.isdir(folder) and not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(
                f"{option} {path}: there is no right to write in {folder}; give a place elsewhere,"
                " or get the right."
            )


CLUTTER = frozenset(
    "thumbs.db ehthumbs.db desktop.ini __macosx $recycle.bin lost+found @eadir #recycle".split()
) | {"system volume information"}
"""What operating systems leave in folders without a point before its name, in lower case."""


def is_hidden(path: str | Path) -> bool:
    """Whether a file or folder is one that operating systems keep for themselves: ``._IM1.dcm``,
    ``.DS_Store``, ``Thumbs.db``, ``__MACOSX``."""
    name = os.path.basename(path)
    return name.startswith(".") or name.lower() in CLUTTER


def walk(folder: str | Path, unread: list[tuple[Path, str]] | None = None) -> list[Path]:
    """The regular files in a folder and its subfolders, without hidden ones.

    Args:
        folder: where to look; may itself be hidden, or a link.
        unread: takes path and reason of what may hold files but was not followed: links out of
            the folder and to folders, folders that cannot be listed, what is no regular file.

    Returns:
        Paths that begin with ``folder``, sorted.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: ``folder`` is a file.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such folder; check the path.")
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file, expected a folder.")
    root, found, left = folder.resolve(), [], []

    def report(error: OSError) -> None:
        left.append((Path(error.filename), f"cannot be read ({error.strerror})."))

    for parent, folders, files in os.walk(folder, onerror=report):
        folders[:] = [name for name in folders if not is_hidden(name)]
        links = [path for name in folders if (path := Path(parent, name)).is_symlink()]
        left += [(path, "is a link to a folder, which is not followed.") for path in links]
        for path in (Path(parent, name) for name in files if not is_hidden(name)):
            if not path.is_file():
                left.append((path, "is not a regular file."))
            elif path.is_symlink() and not path.resolve().is_relative_to(root):
                left.append((path, "is a link out of the folder, which is not followed."))
            else:
                found.append(path)
    if unread is not None:
        unread += sorted(left)
    return sorted(found)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL, 0o600)


def remove_leftovers(folder: str | Path) -> None:
    """Removes what ``write_atomically`` leaves in a folder when its process is killed."""
    for path in Path(folder).glob(".*." + "[0-9a-f]" * 12 + ".tmp"):
        path.unlink()


def write_csv(path: str | Path, fields: Sequence[str], rows: Iterable[dict]) -> None:
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
