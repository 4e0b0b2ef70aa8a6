"""The ratio k of positives to negatives, and who is drawn."""

import io
import math

import pytest
import torch
from detectron2.modeling.sampling import subsample_labels
from hypothesis import assume, given
from hypothesis import strategies as st

from ich_det2.modeling.sampling import (
    AdaptiveRatioSampler,
    AnchorSampler,
    FixedRatioSampler,
    SampledAnchors,
    build_anchor_sampler,
    next_ratio,
    screen_by_nms,
    split_counts,
)

# ---- split_counts, eq. (1), (2) ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "num_samples", "expected"),
    [
        (1, 256, (128, 128)),  # 1/2 * 256
        (3, 256, (192, 64)),  # 3/4 * 256
        (2, 256, (170, 86)),  # 2/3 * 256 = 170.67, rounded down
        (2, 255, (170, 85)),  # 2/3 * 255 = 170 exactly
        (1, 1, (0, 1)),  # 1/2, rounded down
        (0, 256, (0, 256)),
        (5, 0, (0, 0)),
    ],
)
def test_hand_worked_counts(ratio, num_samples, expected):
    assert split_counts(ratio, num_samples) == expected


@given(ratio=st.floats(0, 1e6), num_samples=st.integers(0, 4096))
def test_counts_are_not_negative_and_sum_to_n(ratio, num_samples):
    num_pos, num_neg = split_counts(ratio, num_samples)
    assert num_pos >= 0 and num_neg >= 0 and num_pos + num_neg == num_samples


@given(ratio=st.integers(0, 50), unit=st.integers(0, 100))
def test_counts_that_divide_evenly_are_exact(ratio, unit):
    assert split_counts(ratio, (1 + ratio) * unit) == (ratio * unit, unit)


@given(ratios=st.lists(st.floats(0, 100), min_size=2, max_size=2), n=st.integers(0, 512))
def test_a_larger_ratio_never_means_fewer_positives(ratios, n):
    low, high = sorted(ratios)
    assert split_counts(low, n)[0] <= split_counts(high, n)[0]


@pytest.mark.parametrize("ratio", [-0.1, math.nan, math.inf])
def test_bad_ratio_is_an_error(ratio):
    with pytest.raises(ValueError, match=f"ratio must be a finite number >= 0, got {ratio}"):
        split_counts(ratio, 256)


def test_negative_number_of_samples_is_an_error():
    with pytest.raises(ValueError, match="num_samples must be >= 0, got -1"):
        split_counts(1, -1)


# ---- next_ratio, eq. (3) -----------------------------------------------------------------------


def ratio_after(probs, labels, **kwargs):
    return next_ratio(torch.tensor(probs), torch.tensor(labels), **kwargs).item()


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        ([1.0, 1.0, 0.3, 0.9], 1.0),  # no positive missed; negatives do not count
        ([0.0, 0.0, 0.0, 0.0], 2.0),  # 1 + (3 - 1) / 4 * (1 + 1)
        ([0.5, 0.75, 0.0, 0.0], 1.375),  # 1 + (3 - 1) / 4 * (1/2 + 1/4)
    ],
)
def test_hand_worked_ratio(probs, expected):
    assert ratio_after(probs, [1, 1, 0, 0], num_samples=4, max_ratio=3) == expected


def test_repeated_positives_count_as_often_as_they_stand_for():
    # One positive for 2 of N = 4: 1 + (3 - 1) / 4 * 2 * (1 - 0.5) = 1.5
    kwargs = {"num_samples": 4, "max_ratio": 3, "pos_weight": 2.0}
    assert ratio_after([0.5, 0.1, 0.1], [1, 0, 0], **kwargs) == 1.5


prob_lists = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=32)


@given(probs=prob_lists, max_ratio=st.floats(1, 100), num_pos=st.integers(0, 32))
def test_ratio_is_between_one_and_r(probs, max_ratio, num_pos):
    labels = [int(i < num_pos) for i in range(len(probs))]
    k = ratio_after(probs, labels, num_samples=len(probs), max_ratio=max_ratio)
    assert 1 <= k <= max_ratio
    if max_ratio == 1 or num_pos == 0:
        assert k == 1


@given(probs=prob_lists)
def test_ratio_is_one_if_r_is_one(probs):
    assert ratio_after(probs, [1] * len(probs), num_samples=len(probs), max_ratio=1) == 1


@given(probs=prob_lists, index=st.integers(0, 31), lower=st.floats(0, 1, width=32))
def test_ratio_grows_as_positives_are_missed(probs, index, lower):
    assume(index < len(probs))
    worse = list(probs)
    worse[index] = min(lower, probs[index])
    kwargs = {"num_samples": len(probs), "max_ratio": 5}
    labels = [1] * len(probs)
    assert ratio_after(worse, labels, **kwargs) >= ratio_after(probs, labels, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_samples": 0, "max_ratio": 2}, "num_samples must be > 0, got 0"),
        ({"num_samples": 4, "max_ratio": 0.5}, "max_ratio .* >= 1, got 0.5"),
        ({"num_samples": 4, "max_ratio": math.nan}, "max_ratio .* >= 1, got nan"),
    ],
)
def test_bad_arguments_of_the_ratio_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ratio_after([0.5], [1], **kwargs)


# ---- samplers ----------------------------------------------------------------------------------


def labels_of(num_pos, num_neg, num_ignored=0, dtype=torch.int8):
    labels = torch.tensor([1] * num_pos + [0] * num_neg + [-1] * num_ignored, dtype=dtype)
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))]


@pytest.mark.parametrize(("num_pos", "num_neg"), [(0, 90), (3, 90), (70, 90), (3, 5), (70, 5)])
@pytest.mark.parametrize(
    ("fraction", "num_samples"),
    [(0.5, 64), (0.25, 64), (0.0, 64), (0.6, 10), (0.7, 10), (1 / 3, 48)],
)
def test_fill_draws_what_detectron2_draws(num_pos, num_neg, fraction, num_samples):
    labels = labels_of(num_pos, num_neg, 20)
    torch.manual_seed(11)
    pos_idx, neg_idx = subsample_labels(labels, num_samples, fraction, 0)
    sampler = FixedRatioSampler(num_samples=num_samples, positive_fraction=fraction)
    torch.manual_seed(11)
    sample = sampler.sample(labels, sampler.ratio)
    assert (sample.labels == 1).nonzero()[:, 0].tolist() == sorted(pos_idx.tolist())
    assert (sample.labels == 0).nonzero()[:, 0].tolist() == sorted(neg_idx.tolist())
    assert (sample.num_pos, sample.num_neg) == (len(pos_idx), len(neg_idx))
    assert sample.pos_weight == 1


@pytest.mark.parametrize(
    ("shortfall", "ratio", "available", "expected"),
    [
        # N = 16: k = 1 wants 8 + 8, k = 3 wants 12 + 4. Expected: positives, negatives, weight.
        ("fill", 1, (2, 100), (2, 14, 1)),
        ("shrink", 1, (2, 100), (2, 2, 1)),  # 2 / 1
        ("repeat", 1, (2, 100), (2, 8, 4)),  # 8 wanted, 2 there
        ("fill", 3, (6, 100), (6, 10, 1)),
        ("shrink", 3, (6, 100), (6, 2, 1)),  # 6 / 3
        ("repeat", 3, (6, 100), (6, 4, 2)),  # 12 / 6
        ("shrink", 3, (1, 100), (1, 1, 1)),  # 1 / 3, but one negative at least
        ("repeat", 3, (5, 3), (5, 3, 12 / 5)),  # negatives run short, too
        # As many positives as wanted: all the same.
        ("fill", 3, (50, 100), (12, 4, 1)),
        ("shrink", 3, (50, 100), (12, 4, 1)),
        ("repeat", 3, (50, 100), (12, 4, 1)),
        # Without positives there is no ratio: N negatives, or N_neg.
        ("fill", 3, (0, 100), (0, 16, 1)),
        ("shrink", 3, (0, 100), (0, 4, 1)),
        ("repeat", 3, (0, 100), (0, 4, 1)),
    ],
)
def test_hand_worked_shortfalls(shortfall, ratio, available, expected):
    sampler = AnchorSampler(num_samples=16, ratio=ratio, shortfall=shortfall)
    labels = labels_of(*available, 7)
    sample = sampler.sample(labels, sampler.ratio)
    assert (sample.num_pos, sample.num_neg, sample.pos_weight) == expected
    drawn = sample.labels
    assert ((drawn == 1).sum(), (drawn == 0).sum()) == expected[:2]
    assert (drawn[drawn >= 0] == labels[drawn >= 0]).all()  # no label is changed


@given(
    num_pos=st.integers(0, 40),
    num_neg=st.integers(0, 40),
    ratio=st.floats(1, 8),
    shortfall=st.sampled_from(["fill", "shrink", "repeat"]),
)
def test_weighed_counts_never_exceed_n(num_pos, num_neg, ratio, shortfall):
    sampler = AnchorSampler(num_samples=16, ratio=ratio, shortfall=shortfall)
    sample = sampler.sample(labels_of(num_pos, num_neg), ratio)
    assert sample.num_pos <= num_pos and sample.num_neg <= num_neg
    assert sample.num_pos * sample.pos_weight + sample.num_neg <= 16 + 1e-9
    assert sample.pos_weight >= 1


def sample_of(labels, pos_weight=1.0):
    labels = torch.tensor(labels, dtype=torch.int8)
    num_pos, num_neg = (int((labels == x).sum()) for x in (1, 0))
    return SampledAnchors(labels, pos_weight, num_pos, num_neg)


def test_ratio_is_the_mean_over_images_with_positives():
    sampler = AdaptiveRatioSampler(num_samples=4, max_ratio=3)
    assert sampler.ratio == 1
    # First: 1 + 2/4 * (1 - 0.5) = 1.25. Second: 1 + 2/2 * (1 - 0) = 2. Third has no positive.
    # Mean of 1.25 and 2: 1.625.
    probs = [
        torch.tensor([0.5, 0.5, 0.5, 0.5, 0.0]),
        torch.tensor([0.0, 0.5, 0.5, 0.5, 0.0]),
        torch.zeros(5),
    ]
    samples = [
        sample_of([1, 0, 0, 0, -1]),
        sample_of([1, 0, -1, -1, -1]),
        sample_of([0, 0, 0, 0, -1]),
    ]
    sampler.update(probs, samples)
    assert sampler.ratio == 1.625


def test_images_of_all_processes_weigh_the_same(monkeypatch):
    def add_the_other_process(total):
        total += torch.tensor([3 * 2.5, 3.0])  # three images there, of k = 2.5 each

    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", add_the_other_process)
    sampler = AdaptiveRatioSampler(num_samples=2, max_ratio=2)
    # One image here: 1 + 1/2 * 1 = 1.5. (1.5 + 3 * 2.5) / 4 = 2.25.
    sampler.update([torch.zeros(2)], [sample_of([1, 0])])
    assert sampler.ratio == 2.25
    # A batch without positives here still takes part: 7.5 / 3.
    sampler.update([torch.zeros(2)], [sample_of([0, 0])])
    assert sampler.ratio == 2.5


def test_repeated_positives_raise_the_ratio_as_rows_would():
    sampler = AdaptiveRatioSampler(num_samples=8, max_ratio=3, shortfall="repeat")
    # One positive for four, and four negatives, N = 8: 1 + 2/8 * 4 * (1 - 0.5) = 1.5
    sampler.update([torch.full((5,), 0.5)], [sample_of([1, 0, 0, 0, 0], pos_weight=4.0)])
    assert sampler.ratio == 1.5


@pytest.mark.parametrize("samples", [[], [[0, 0, -1]], [[0, -1, -1], [-1, -1, -1]]])
def test_batch_without_positives_leaves_the_ratio(samples):
    sampler = AdaptiveRatioSampler(num_samples=2, max_ratio=3)
    sampler.update([torch.zeros(2)], [sample_of([1, 0])])
    before = sampler.ratio
    assert before == 2  # 1 + 2/2 * 1
    sampler.update([torch.zeros(3)] * len(samples), [sample_of(s) for s in samples])
    assert sampler.ratio == before


def test_fixed_ratio_never_changes():
    sampler = FixedRatioSampler(num_samples=8, positive_fraction=0.25)
    before = sampler.ratio
    sampler.update([torch.zeros(2)], [sample_of([1, 0])])
    assert sampler.ratio == before == pytest.approx(1 / 3)


def test_ratio_is_saved_and_loaded_exactly():
    sampler = AdaptiveRatioSampler(num_samples=3, max_ratio=1.1)
    sampler.update([torch.full((3,), 0.7)], [sample_of([1, 0, 0])])
    # 1 + 0.1 / 3 * 0.3: no number that float32 holds.
    assert sampler.ratio != torch.tensor(sampler.ratio).item()
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    other = AdaptiveRatioSampler(num_samples=3, max_ratio=1.1)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.ratio == sampler.ratio != 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AnchorSampler(num_samples=8, shortfall="pad"),
            r"MODEL.RPN.SAMPLER.SHORTFALL is 'pad', expected one of \('fill', 'shrink', 'repeat'\)",
        ),
        (
            lambda: AdaptiveRatioSampler(num_samples=8, max_ratio=0.9),
            "MODEL.RPN.SAMPLER.MAX_RATIO must be a finite number >= 1, got 0.9",
        ),
        (
            lambda: FixedRatioSampler(num_samples=8, positive_fraction=1.0),
            r"MODEL.RPN.POSITIVE_FRACTION must be in \[0, 1\), got 1.0",
        ),
        (lambda: AnchorSampler(num_samples=-1), "num_samples must be >= 0, got -1"),
    ],
)
def test_bad_arguments_of_samplers_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_samplers_are_built_by_name(tiny_cfg):
    opts = ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 32, "MODEL.RPN.SAMPLER.SHORTFALL", "repeat")
    adaptive = build_anchor_sampler(tiny_cfg("MODEL.RPN.SAMPLER.MAX_RATIO", 2.5, *opts))
    assert type(adaptive) is AdaptiveRatioSampler and adaptive.max_ratio == 2.5
    cfg = tiny_cfg("MODEL.RPN.SAMPLER.NAME", "FixedRatioSampler", *opts)
    fixed = build_anchor_sampler(cfg)
    assert type(fixed) is FixedRatioSampler and fixed.ratio == 1  # POSITIVE_FRACTION is 0.5
    for sampler in (adaptive, fixed):
        assert (sampler.num_samples, sampler.shortfall) == (32, "repeat")


def test_unknown_sampler_names_the_known(tiny_cfg):
    with pytest.raises(ValueError) as error:
        build_anchor_sampler(tiny_cfg("MODEL.RPN.SAMPLER.NAME", "NoSuchSampler"))
    assert str(error.value) == (
        "MODEL.RPN.SAMPLER.NAME is 'NoSuchSampler', but the registered anchor samplers are"
        " ['AdaptiveRatioSampler', 'FixedRatioSampler']."
    )


# ---- screen_by_nms -----------------------------------------------------------------------------


def screen(labels, logits, boxes, thresh, topk=100):
    labels = torch.tensor(labels, dtype=torch.int8)
    before = labels.clone()
    out = screen_by_nms(labels, torch.tensor(logits), torch.tensor(boxes), thresh, topk=topk)
    assert torch.equal(labels, before) and out.dtype == labels.dtype
    return out.tolist()


BOX = [0.0, 0.0, 10.0, 10.0]


def test_of_identical_boxes_the_highest_scored_stays():
    assert screen([0, 0, 0], [0.1, 0.9, 0.5], [BOX] * 3, 0.5) == [-1, 0, -1]
    assert screen([1, 1, 1], [0.1, 0.5, 0.9], [BOX] * 3, 0.5) == [-1, -1, 1]


def test_ignored_anchors_stay_ignored_and_remove_nothing():
    assert screen([-1, 0, 1], [9.0, 1.0, 0.0], [BOX] * 3, 0.5) == [-1, 0, 1]


def test_no_candidate_at_all():
    assert screen([-1, -1], [0.0, 1.0], [BOX] * 2, 0.5) == [-1, -1]


def test_no_negative_removes_a_positive():
    assert screen([1, 0], [-5.0, 5.0], [BOX] * 2, 0.5) == [1, 0]


def test_no_negative_removes_a_positive_outside_the_image():
    # Anchors reach over the border, to negative coordinates. Shifted by the largest coordinate
    # plus 1 (101), which is how a batched NMS keeps labels apart, the positive would come to lie
    # on the negative.
    positive, negative = [-50.0, -50.0, -1.0, -1.0], [51.0, 51.0, 100.0, 100.0]
    assert screen([1, 0], [-5.0, 5.0], [positive, negative], 0.5) == [1, 0]


@pytest.mark.parametrize(("thresh", "expected"), [(0.49, [0, -1]), (0.5, [0, 0]), (1.0, [0, 0])])
def test_threshold_is_the_iou_above_which_one_goes(thresh, expected):
    # 10 x 10 and its upper half: IoU 50 / 100 = 0.5, which is not above 0.5.
    assert screen([0, 0], [1.0, 0.0], [BOX, [0.0, 0.0, 10.0, 5.0]], thresh) == expected


def test_only_the_highest_scored_of_each_label_are_screened():
    boxes = [[20.0 * i, 0.0, 20.0 * i + 10, 10.0] for i in range(6)]  # apart
    logits = [0.1, 0.3, 0.2, 0.9, 0.7, 0.8]
    assert screen([0, 0, 0, 1, 1, 1], logits, boxes, 0.5, topk=2) == [-1, 0, 0, 1, -1, 1]
    assert screen([0, 0, 0, 1, 1, 1], logits, boxes, 0.5, topk=3) == [0, 0, 0, 1, 1, 1]


@given(seed=st.integers(0, 1000), thresh=st.floats(0.05, 0.95))
def test_screening_equals_nms_of_each_label_alone(seed, thresh):
    generator = torch.Generator().manual_seed(seed)
    corners = 60 * torch.rand((30, 2), generator=generator) - 30
    boxes = torch.cat([corners, corners + 5 + 20 * torch.rand((30, 2), generator=generator)], 1)
    labels = torch.randint(-1, 2, (30,), generator=generator)
    logits = torch.randn(30, generator=generator)
    out = screen_by_nms(labels, logits, boxes, thresh, topk=30)
    for value in (0, 1):
        alone = torch.where(labels == value, labels, -1)
        screened = screen_by_nms(alone, logits, boxes, thresh, topk=30)
        assert torch.equal(out == value, screened == value)
        assert (out == value).any() == (labels == value).any()
