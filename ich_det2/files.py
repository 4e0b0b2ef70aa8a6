"""Files that appear whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
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
