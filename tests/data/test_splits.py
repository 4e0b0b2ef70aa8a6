"""Splits: a partition, no group in two of them, shares and positives as asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ich_det2.data.splits import (
    make_folds,
    positive_groups,
    split_by_group,
    split_by_image,
    split_stratified,
)

quick = settings(max_examples=80, deadline=None)
RATIOS = [0.5, 0.2, 0.3]


def ratios_of(weights):
    return [weight / sum(weights) for weight in weights]


cases = st.tuples(
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=60),
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any).map(ratios_of),
    st.integers(0, 5),
)


@quick
@given(cases)
def test_every_split_is_a_partition_by_group(case):
    rows, ratios, seed = case
    groups, labels = [g for g, _ in rows], [p for _, p in rows]
    splits_wanted = sum(ratio > 0 for ratio in ratios)
    if len(set(groups)) < splits_wanted:
        with pytest.raises(ValueError, match="groups for"):
            split_by_group(groups, ratios, stratify=labels, seed=seed)
        return
    parts = split_by_group(groups, ratios, stratify=labels, seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))
    owners = [{groups[i] for i in part} for part in parts]
    assert sum(len(owner) for owner in owners) == len(set(groups))
    assert [bool(owner) for owner in owners] == [ratio > 0 for ratio in ratios]
    assert all((np.diff(part) > 0).all() for part in parts)


@quick
@given(cases, st.randoms(use_true_random=False))
def test_order_of_the_images_does_not_matter(case, random):
    rows, _, seed = case
    shuffled = random.sample(rows, len(rows))

    def assignment(some):
        parts = split_by_group(
            [g for g, _ in some], [1.0], stratify=[p for _, p in some], seed=seed
        )
        if len({g for g, _ in some}) > 1:
            parts = split_by_group(
                [g for g, _ in some], [0.6, 0.4], stratify=[p for _, p in some], seed=seed
            )
        return {some[i][0]: k for k, part in enumerate(parts) for i in part}

    assert assignment(rows) == assignment(shuffled)


def count(groups, parts):
    return [len({groups[i] for i in part}) for part in parts]


def test_counts_by_hand():
    # 10 positive patients: 5, 2, 3. 7 negative: 3.5, 1.4, 2.1 -> 3, 1, 2 and the one left over goes
    # to the largest remainder, 0.5: 4, 1, 2. Each patient has two images, one positive at most.
    groups = [f"p{k}" for k in range(17) for _ in range(2)]
    labels = [k < 10 and image == 0 for k in range(17) for image in range(2)]
    parts = split_by_group(groups, RATIOS, stratify=labels)
    assert count(groups, parts) == [9, 3, 5]
    positives = [[i for i in part if int(groups[i][1:]) < 10] for part in parts]
    assert count(groups, positives) == [5, 2, 3]


def test_each_split_gets_positives_if_there_are_enough():
    # 5 positive patients at 0.8, 0.1, 0.1 are 4, 0.5, 0.5: without the minimum one split has none.
    labels = [k < 5 for k in range(50)]
    parts = split_by_group(range(50), [0.8, 0.1, 0.1], stratify=labels)
    assert [sum(labels[i] for i in part) for part in parts] == [3, 1, 1]


def test_two_kinds_too_few_alone_fill_all_splits_together():
    parts = split_by_group(range(4), [0.4, 0.3, 0.3], stratify=[True, True, False, False])
    assert sorted(len(part) for part in parts) == [1, 1, 2]


def test_without_labels_and_with_a_share_of_zero():
    parts = split_by_group(range(10), [0.7, 0.0, 0.3])
    assert [len(part) for part in parts] == [7, 0, 3]


def test_seeds():
    first, again, other = (split_by_group(range(40), RATIOS, seed=s) for s in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_one_split_takes_all():
    assert split_by_group(["a", "b"], [1])[0].tolist() == [0, 1]


@pytest.mark.parametrize("ratios", [[], [0.5, 0.4], [1.5, -0.5], [np.nan, 1], [[1.0]], [0.0]])
def test_wrong_ratios(ratios):
    with pytest.raises(ValueError, match="expected shares from 0 to 1 of sum 1"):
        split_by_group(range(5), ratios)


def test_wrong_lengths_and_too_few_groups():
    with pytest.raises(ValueError, match="stratify has 2 labels, expected 3"):
        split_by_group("abc", [1], stratify=[True, False])
    with pytest.raises(ValueError, match="There are 2 groups for 3 splits"):
        split_by_group("aabb", RATIOS)
    with pytest.raises(ValueError, match="0 groups for 1 splits"):
        split_by_group([], [1])


def test_by_image_divides_images():
    images = [f"i{k}" for k in range(20)]
    labels = [k % 2 == 0 for k in range(20)]
    parts = split_by_image(images, RATIOS, stratify=labels, seed=4)
    assert [len(part) for part in parts] == [10, 4, 6]
    assert [sum(labels[i] for i in part) for part in parts] == [5, 2, 3]
    with pytest.raises(ValueError, match="ids that repeat"):
        split_by_image(["a", "a"], [1])


# ---- split_stratified ----------------------------------------------------------------------------


def patients_of_types(seed=0, patients=60):
    """Groups of 3 to 12 images; a third bleeds, with types of different frequency."""
    rng = np.random.default_rng(seed)
    groups, types = [], []
    for patient in range(patients):
        bleeds = patient % 3 == 0
        kind = rng.choice(["SDH", "IPH", "SAH", "EDH"], p=[0.4, 0.3, 0.2, 0.1])
        for _ in range(rng.integers(3, 13)):
            groups.append(f"p{patient}")
            types.append({kind} if bleeds and rng.random() < 0.7 else set())
    return groups, types


@pytest.mark.parametrize("ratios", [[0.5, 0.2, 0.3], [0.2] * 5])
def test_stratified_splits_have_like_shares(ratios):
    groups, types = patients_of_types()
    parts = split_stratified(groups, types, ratios)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(groups)))
    owners = [{groups[i] for i in part} for part in parts]
    assert all(not a & b for k, a in enumerate(owners) for b in owners[k + 1 :])
    positive = np.array([bool(t) for t in types])
    for part, ratio in zip(parts, ratios, strict=True):
        assert len(part) / len(groups) == pytest.approx(ratio, abs=0.04)
        assert positive[part].sum() / positive.sum() == pytest.approx(ratio, abs=0.08)
        for name in ("SDH", "IPH"):
            of_type = np.array([name in t for t in types])
            assert of_type[part].sum() / of_type.sum() == pytest.approx(ratio, abs=0.2)


def test_stratified_split_is_the_same_for_any_order_of_images_and_differs_by_seed():
    groups, types = patients_of_types()
    order = np.random.default_rng(1).permutation(len(groups))
    shuffled = split_stratified([groups[i] for i in order], [types[i] for i in order], [0.5, 0.5])
    parts = split_stratified(groups, types, [0.5, 0.5])
    assert [sorted(order[p].tolist()) for p in shuffled] == [p.tolist() for p in parts]
    other = split_stratified(groups, types, [0.5, 0.5], seed=1)
    assert [p.tolist() for p in other] != [p.tolist() for p in parts]


@pytest.mark.parametrize("seed", range(6))
def test_no_stratified_split_is_without_positives_where_patients_are_enough(seed):
    # Each of three bleeding patients has a type of its own, of which no share can be kept.
    groups = [f"p{k}" for k in range(6) for _ in range(10)]
    types = [{"abc"[int(g[1])]} if g[1] in "012" else set() for g in groups]
    parts = split_stratified(groups, types, [0.5, 0.2, 0.3], seed=seed)
    assert all(any(types[i] for i in part) for part in parts)


def test_stratified_split_fills_every_wanted_split():
    parts = split_stratified(
        ["a"] * 50 + ["b", "c"], [{"x"}] * 50 + [set()] * 2, [0.5, 0, 0.2, 0.3]
    )
    assert [len(p) > 0 for p in parts] == [True, False, True, True]
    with pytest.raises(ValueError, match="2 groups for 3 splits"):
        split_stratified(["a", "b"], [set(), set()], [0.4, 0.3, 0.3])
    with pytest.raises(ValueError, match="types has 1 entries, expected 2"):
        split_stratified(["a", "b"], [set()], [0.5, 0.5])


def test_folds_hold_each_image_once_and_keep_patients_whole():
    groups, types = patients_of_types()
    lists = make_folds(groups, types, 5)
    assert list(lists) == [f"fold{i}_{part}" for i in range(5) for part in ("train", "val")]
    held = [lists[f"fold{i}_val"] for i in range(5)]
    assert sorted(np.concatenate(held).tolist()) == list(range(len(groups)))
    for i, part in enumerate(held):
        train = lists[f"fold{i}_train"]
        assert sorted([*part, *train]) == list(range(len(groups)))
        assert not {groups[j] for j in part} & {groups[j] for j in train}
    with pytest.raises(ValueError, match="1 folds, expected at least 2"):
        make_folds(groups, types, 1)


@quick
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=40),
    st.floats(0, 5),
    st.integers(0, 3),
)
def test_positive_groups_keep_all_positives_and_so_many_negatives(case, share, seed):
    groups, positive = [g for g, _ in case], [p for _, p in case]
    kept = positive_groups(groups, positive, negatives_per_positive=share, seed=seed).tolist()
    everything = positive_groups(groups, positive).tolist()
    bleeding = {g for g, p in case if p}
    assert everything == [i for i, g in enumerate(groups) if g in bleeding]
    assert set(kept) <= set(everything) and kept == sorted(kept)
    positives = [i for i, p in enumerate(positive) if p]
    assert [i for i in kept if positive[i]] == positives
    wanted = min(round(share * len(positives)), len(everything) - len(positives))
    assert len(kept) - len(positives) == wanted


def test_positive_groups_draw_by_seed():
    groups, positive = ["a"] * 30 + ["b"] * 30, [True] * 5 + [False] * 55
    draws = [positive_groups(groups, positive, negatives_per_positive=1, seed=s) for s in (0, 0, 1)]
    assert draws[0].tolist() == draws[1].tolist() != draws[2].tolist()
    assert len(draws[0]) == 10 and max(draws[0]) < 30
