"""PositiveShareSampler: exact shares, no slice forgotten, the same on any number of ranks."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_det2.data.samplers import PositiveShareSampler

LABELS = [1, 0, 0, 1, 0, 0, 0, 0, 1, 0]


def stream(sampler, number, start=0):
    return list(itertools.islice(sampler, start, start + number))


@given(
    st.integers(1, 30), st.integers(1, 30), st.floats(0.02, 0.98), st.integers(1, 12),
    st.integers(0, 5),
)  # fmt: skip
def test_shares_are_exact(positives, negatives, share, batch, seed):
    labels = [1] * positives + [0] * negatives
    drawn = stream(PositiveShareSampler(labels, share, batch, seed), 40 * batch)
    counts = [sum(labels[i] for i in drawn[b : b + batch]) for b in range(0, len(drawn), batch)]
    assert all(abs(count - share * batch) < 1 + 1e-9 for count in counts)
    for batches, total in enumerate(itertools.accumulate(counts), 1):
        assert abs(total - share * batch * batches) <= 0.5 + 1e-6
    for kind, members in ((1, positives), (0, negatives)):
        times = Counter(i for i in drawn if labels[i] == kind)
        of_kind = sum(times.values())
        assert all(of_kind // members <= times[i] <= -(-of_kind // members)
                   for i, label in enumerate(labels) if label == kind)  # fmt: skip


def test_the_seed_gives_the_stream():
    first, same, other = (PositiveShareSampler(LABELS, 0.5, 4, seed) for seed in (3, 3, 4))
    assert stream(first, 60) == stream(first, 60) == stream(same, 60) != stream(other, 60)
    batches = [stream(first, 4, start) for start in range(0, 60, 4)]
    # Positives stand anywhere in a batch, so that two ranks get both kinds.
    assert len({tuple(LABELS[i] for i in batch) for batch in batches}) > 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_one_stream(monkeypatch, world_size):
    whole = stream(PositiveShareSampler(LABELS, 0.3, 6, 0), 60)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: world_size)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        parts.append(stream(PositiveShareSampler(LABELS, 0.3, 6, 0), 60 // world_size))
    assert [i for row in zip(*parts) for i in row] == whole


@pytest.mark.parametrize("share", [0.0, 1.0, -1, 2])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="POSITIVE_SHARE"):
        PositiveShareSampler(LABELS, share, 4, 0)


@pytest.mark.parametrize("labels", [[0, 0], [1]])
def test_both_kinds_are_asked_for(labels):
    with pytest.raises(ValueError, match="expected both kinds, or TrainingSampler"):
        PositiveShareSampler(labels, 0.5, 4, 0)
