"""What every command in ``tools/`` and ``datasets/`` shares: the guard around it, one form of
message, progress, and quiet libraries."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.progress import track


def guard(
    name: str, run: Callable[[], int | None], *, interrupted: str = "nothing was written."
) -> int:
    """Runs a command; an error of the user becomes one sentence on stderr.

    Args:
        name: of the script, which begins the sentence.
        run: the command; returns the exit code, None for 0.
        interrupted: what Ctrl-C leaves behind, and how to go on.

    Returns:
        The exit code: 2 for a ``ValueError`` or ``OSError``, 130 after Ctrl-C.
    """
    silence_libraries()
    try:
        return run() or 0
    except (ValueError, OSError) as error:
        print(f"{name}: error: {describe(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted: {interrupted}", file=sys.stderr)
        return 130


def describe(error: BaseException) -> str:
    """An error as a sentence; one of the operating system names its file first."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return str(error) or type(error).__name__


def silence_libraries() -> None:
    """Keeps what libraries tell their own developers off a user's terminal."""
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=category)
    for module in (
        "torch",
        "detectron2",
        "fvcore",
        "timm",
        "matplotlib",
        "pydicom",
        "nibabel",
        "highdicom",
    ):
        warnings.filterwarnings("ignore", category=UserWarning, module=module)
    torch = ("torch.fx", "torch.utils.cpp_extension")
    for logger in (*torch, "matplotlib", "nibabel", "pydicom"):
        logging.getLogger(logger).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Keeps libraries quiet while they are imported, which is before :func:`guard` can."""
    with warnings.catch_warnings():
        silence_libraries()
        yield


def keep_freed_memory() -> None:
    """Lets glibc's malloc keep up to 256 MiB that were freed, for arrays of up to 128 MiB.

    Else it gives back the memory of large activations in each step of a training on a CPU, and the
    system fills it with zeros in the next: a tenth of the step. Other C libraries are left alone.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 128 * 2**20)  # M_MMAP_THRESHOLD
        mallopt(-1, 256 * 2**20)  # M_TRIM_THRESHOLD


def warn(message: str) -> None:
    """Says on stderr something that a person should know."""
    print(f"warning: {message}", file=sys.stderr)


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """The items, with a bar on stderr; ``total`` of them where they are made one by one."""
    items = list(items) if total is None else items
    yield from track(items, what, total, console=Console(stderr=True))


@contextlib.contextmanager
def log_to_terminal() -> Iterator[None]:
    """Shows this package's messages before Detectron2's logger is set up, which writes files."""
    package, handler = logging.getLogger("ich_det2"), logging.StreamHandler()
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
