"""Ctrl-C and SIGTERM in training: the iteration is ended, its checkpoint saved, on all ranks."""

import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .checkpoint import IchCheckpointer

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher and a terminal may both pass a signal on; what comes later was meant.
_AGAIN_SECONDS = 1.0
_OUTLIVE_SECONDS = 60

logger = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """Ends a training by a signal, which is ``number``."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class StopOnSignal(HookBase):
    """Saves a checkpoint behind the iteration in which SIGINT or SIGTERM came, and raises
    :class:`Interrupted`; a second one, after a second, ends the process at once.

    Signals are taken while :meth:`listening`, in which the whole training has to lie.

    Has to be the last hook, so that whatever the others do in an iteration is in the checkpoint.
    """

    def __init__(self, checkpointer: IchCheckpointer):
        """
        Args:
            checkpointer: of the training; writes on the main process alone.
        """
        self._checkpointer = checkpointer
        self._received = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes signals, from when every rank does: one that only some took would end the others'
        processes, and with them the training, with nothing saved."""
        with on_signals(self._note):
            comm.synchronize()
            yield

    def _note(self, number: int) -> None:
        self._received = number
        logger.warning("%s: stopping behind this iteration.", signal.Signals(number).name)

    def after_step(self):
        iteration = self.trainer.iter
        if iteration + 1 >= self.trainer.max_iter:
            return  # the training ends by itself, with its last checkpoint
        if number := self._gathered():
            name = f"model_{iteration:07d}"
            # The periodic one may have been faster.
            saved = self._checkpointer.get_checkpoint_file().endswith(f"{name}.pth")
            if comm.is_main_process() and not saved:
                self._checkpointer.save(name, iteration=iteration)
            raise Interrupted(number)

    def after_train(self):
        ended = self.trainer.iter >= self.trainer.max_iter
        if ended and (number := self._gathered()):
            raise Interrupted(number)

    def _gathered(self) -> int:
        """The signal that any rank got, 0 for none."""
        if comm.get_world_size() == 1:
            return self._received
        return max(comm.all_gather(self._received))


@contextlib.contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Hands SIGINT and SIGTERM to a function once; a second one does what it did before.

    Does nothing outside of the main thread, where signals cannot be taken.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    first: list[float] = []

    def receive(number, frame):
        if not first:
            first.append(time.monotonic())
            handle(number)
        elif time.monotonic() - first[0] > _AGAIN_SECONDS:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupts() -> Iterator[None]:
    """Raises :class:`Interrupted` where SIGINT or SIGTERM comes, and once more at the end of the
    block, since libraries swallow what they call all errors."""
    received: list[int] = []

    def interrupt(number: int) -> None:
        received.append(number)
        raise Interrupted(number)

    with on_signals(interrupt):
        yield
    if received:
        raise Interrupted(received[0])


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Holds SIGINT and SIGTERM back, in processes that are forked meanwhile too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_workers(loader: DataLoader) -> DataLoader:
    """Lets a loader's workers live on when a signal goes to the whole process group; they end with
    their process, by its SIGTERM, or a minute after another's."""
    init = functools.partial(_outlive_signals, parent=os.getpid(), then=loader.worker_init_fn)
    loader.worker_init_fn = init
    return loader


def _outlive_signals(worker: int, parent: int, then: Callable[[int], None] | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS does not say who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_await_end, args=(parent,), daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_OUTLIVE_SECONDS))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if then is not None:
        then(worker)


def _await_end(parent: int) -> None:
    # At the end of Python the parent sends SIGTERM, and waits for ever if that is not heeded.
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        signal.alarm(_OUTLIVE_SECONDS)  # signals that come together are one
    os.kill(os.getpid(), signal.SIGKILL)
