"""Which slices are trained on, and how often."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from detectron2.data.samplers import TrainingSampler


def image_labels(dataset: Iterable[dict]) -> list[int]:
    """1 for each slice that bleeds, as "image_label" of its dataset dict, or else a box, says."""
    return [int(d.get("image_label", len(d.get("annotations", ())) > 0)) for d in dataset]


class PositiveShareSampler(TrainingSampler):
    """A stream of slices with a fixed share of slices with hemorrhage in each batch.

    Positives and negatives are shuffled and passed through apart, each without repeats until all
    of them were drawn. Of P positives in n batches of B slices, P is n * B * share to within one;
    so is the number in each single batch. The order within a batch is random.

    As Detectron2's, all ranks walk through the same stream, each taking every world-size-th index,
    and the same seed gives the same stream.
    """

    def __init__(self, labels: Sequence[int], share: float, batch_size: int, seed: int):
        """
        Args:
            labels: of M slices, 1 hemorrhage, 0 none; both must be there.
            share: of positives, in (0, 1).
            batch_size: B, slices of a batch over all ranks.
            seed: the same on all ranks.

        Raises:
            ValueError: if the share is out of its range, or slices of one kind are missing.
        """
        super().__init__(len(labels), seed=seed)
        if not 0 < share < 1:
            raise ValueError(f"DATALOADER.POSITIVE_SHARE is {share}, expected above 0, below 1.")
        values = torch.as_tensor(labels)
        self._members = [(values == kind).nonzero().squeeze(1) for kind in (0, 1)]
        if not all(map(len, self._members)):
            raise ValueError(
                "DATALOADER.SAMPLER_TRAIN is 'PositiveShareSampler', but of the training slices"
                f" {len(self._members[1])} have hemorrhage and {len(self._members[0])} have none;"
                " expected both kinds, or TrainingSampler."
            )
        self._share, self._batch_size = share, batch_size

    def _infinite_indices(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        streams = [self._passes(members, kind) for kind, members in enumerate(self._members)]
        for batch in itertools.count():
            # Floors of the running sum: the rounding of one batch is made up for in the next.
            ends = [int(self._share * self._batch_size * b + 0.5) for b in (batch, batch + 1)]
            positives = ends[1] - ends[0]
            kinds = torch.arange(self._batch_size) < positives
            for kind in kinds[torch.randperm(self._batch_size, generator=generator)].tolist():
                yield next(streams[kind])

    def _passes(self, members: torch.Tensor, kind: int) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self._seed + 1 + kind)
        while True:
            yield from members[torch.randperm(len(members), generator=generator)].tolist()
