"""The worklist by hand, and what queues are known to do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ich_det2.evaluation.worklist import Worklist, reading_ends, simulate


def test_hand_worked_order():
    arrivals, durations = [0, 1, 2, 3, 30], [10, 5, 5, 5, 5]
    # The first is being read when the others come; then they follow one another.
    assert reading_ends(arrivals, durations, [0] * 5).tolist() == [10, 15, 20, 25, 35]
    # The last of the waiting goes first, but interrupts nobody, and the reader waits for the last.
    assert reading_ends(arrivals, durations, [0, 0, 0, 1, 0]).tolist() == [10, 20, 25, 15, 35]
    assert reading_ends(arrivals, durations, [0, 1, 2, 3, 0]).tolist() == [10, 25, 20, 15, 35]
    # Two readers: the second takes 1 at 1, 3 at 6; the first 2 at 10.
    assert reading_ends(arrivals, durations, [0, 0, 0, 1, 0], 2).tolist() == [10, 6, 15, 11, 35]


def test_exams_in_any_order_and_none():
    assert reading_ends([5, 0], [1, 1], [0, 0]).tolist() == [6, 1]
    assert reading_ends([], [], []).tolist() == []


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 3))
def test_no_order_changes_how_long_a_single_reader_works(seed, n, readers):
    rng = np.random.default_rng(seed)
    arrivals, durations = rng.uniform(0, 60, n), rng.exponential(5, n)
    first, other = (
        reading_ends(arrivals, durations, p, readers) for p in (np.zeros(n), rng.random(n))
    )
    for ends in (first, other):
        assert (ends >= arrivals + durations - 1e-9).all()
    if readers == 1:
        assert first.max() == pytest.approx(other.max())
        begins = np.sort(first - durations)
        assert (begins[1:] >= np.sort(first)[:-1] - 1e-9).all()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (([0.0], [-1.0], [0]), "-1 minutes"),
        (([np.nan], [1.0], [0]), "finite"),
        (([0.0], [1.0], [0], 0), "readers is 0"),
    ],
)
def test_what_cannot_be_read(args, words):
    with pytest.raises(ValueError, match=words):
        reading_ends(*args)


def test_a_queue_of_one_reader_waits_as_long_as_theory_says():
    """Mean time in an M/M/1 queue: minutes / (1 - load)."""
    worklist = Worklist(exams=4000, per_hour=6, minutes=5)
    times = simulate([0, 1], [0, 0], worklist, n_worklists=60)
    assert times["bleeding, arrival"].mean() == pytest.approx(5 / (1 - 0.5), rel=0.05)


def test_a_right_model_brings_bleeding_exams_forward_and_a_useless_one_does_not():
    labels, worklist = np.array([1] * 2 + [0] * 18), Worklist(per_hour=10, minutes=5)
    right = simulate(labels, labels, worklist, n_worklists=200)
    assert right["bleeding, model"].mean() < 0.5 * right["bleeding, arrival"].mean()
    assert right["others, model"].mean() > right["others, arrival"].mean()
    useless = simulate(labels, np.zeros(20), worklist, n_worklists=50)
    assert np.array_equal(useless["bleeding, model"], useless["bleeding, arrival"])
    wrong = simulate(labels, 1 - labels, worklist, n_worklists=200)
    assert wrong["bleeding, model"].mean() > wrong["bleeding, arrival"].mean()


def test_the_prevalence_is_what_is_asked_for():
    worklist = Worklist(exams=5, per_hour=1, minutes=1)
    times = simulate([1, 0], [1, 0], worklist, n_worklists=400, prevalence=0.01)
    assert 0.8 < np.isnan(times["bleeding, model"]).mean() < 1  # 0.99^5 = 0.95


def test_worklists_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="would grow for ever"):
        Worklist(per_hour=12, minutes=5)
    with pytest.raises(ValueError, match="expected numbers above 0"):
        Worklist(exams=0)
    with pytest.raises(ValueError, match="0 of 2 patients bleed"):
        simulate([0, 0], [0, 1], Worklist())
    with pytest.raises(ValueError, match="0 worklists, expected at least one"):
        simulate([0, 1], [0, 1], Worklist(), n_worklists=0)
    with pytest.raises(ValueError, match="prevalence is 1"):
        simulate([0, 1], [0, 1], Worklist(), prevalence=1)
