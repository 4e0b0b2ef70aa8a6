"""Random draws without memory, so that a resumed run equals one that was never interrupted.

What a training draws depends on its seed and on the place of the draw alone, never on what the
process drew before:

- the order of the images on the seed;
- an image's augmentation on the image's position in that order, whichever worker reads it;
- what the model draws on the iteration and the rank.

So a checkpoint's seed, iteration and number of images are the whole state, whatever the number of
workers and, from then on, the size of the batch. Two
options of Detectron2, off in this project's configs, continue less exactly:
``DATALOADER.ASPECT_RATIO_GROUPING`` keeps images back between batches, and ``TEST.PRECISE_BN``
starts its own loader anew.
"""

import itertools
import random
from collections.abc import Generator, Iterator

import numpy as np
import torch
from detectron2.data.common import ToIterableDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from .signals import held_back, shield_workers


def seed_generators(*key: int | str) -> None:
    """Seeds Python's, NumPy's and PyTorch's generators from a key, in some 20 microseconds."""
    # Not seed_all_rng: neighbouring keys must not give neighbouring seeds, and its change of the
    # environment is not safe beside other threads.
    random.seed(repr(key))  # hashed with SHA-512
    np.random.seed(random.getrandbits(32))
    # torch.manual_seed takes 300 microseconds to queue seeds for devices that are not in use.
    torch.default_generator.manual_seed(random.getrandbits(63))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(random.getrandbits(63))


class ResumableLoader:
    """A loader of ``build_detection_train_loader`` that starts at any iteration and image.

    It also seeds the generators for the model, between an iteration's data and its forward pass.
    """

    def __init__(self, loader, *, seed: int, start_iter: int, start_image: int):
        """
        Args:
            loader: not iterated yet. Its sampler must draw the same at each start.
            seed: of the run, the same on all ranks.
            start_iter: the iteration of the first batch.
            start_image: images, of all ranks, that are skipped, without reading them.
        """
        stream = loader
        while not isinstance(stream, ToIterableDataset):
            if isinstance(stream, DataLoader):
                shield_workers(stream)
            stream = stream.dataset
        stream.sampler = _Positions(stream.sampler, start_image)
        stream.dataset = _SeededItems(stream.dataset, seed)
        self.dataset = loader.dataset
        self._loader, self._seed, self._start_iter = loader, seed, start_iter
        self._running: Generator | None = None

    def __iter__(self) -> Iterator[list[dict]]:
        self._running = self._batches()
        return self._running

    def close(self) -> None:
        """Ends the workers of the last iterator, whoever still refers to it."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _batches(self) -> Generator[list[dict], None, None]:
        with held_back():  # until its workers know what to do with signals
            batches = iter(self._loader)
        for iteration, batch in enumerate(batches, self._start_iter):
            seed_generators(self._seed, "model", comm.get_rank(), iteration)
            yield batch


class _Positions(Sampler):
    """Pairs of the position in the order of all ranks, from one on, and the image's index there."""

    def __init__(self, sampler: Sampler, start: int):
        self._sampler, self._start = sampler, start
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Of the common order, a rank's sampler gives every world_size-th image.
        positions = itertools.count(self._rank, self._world_size)
        skip = -(-(self._start - self._rank) // self._world_size)
        return itertools.islice(zip(positions, self._sampler), max(skip, 0), None)


class _SeededItems(Dataset):
    """A mapped dataset, taken by :class:`_Positions`, whose draws depend on the position."""

    def __init__(self, dataset: Dataset, seed: int):
        self._dataset, self._seed = dataset, seed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        seed_generators(self._seed, "image", position)
        return self._dataset[index]
