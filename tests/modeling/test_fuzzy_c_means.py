"""Fuzzy c-means: one step by hand, degenerate values, and clusters that are found."""

import numpy as np
import pytest

from ich_det2.modeling.fuzzy_c_means import cluster_centers, fuzzy_c_means, memberships


def test_one_step_by_hand():
    values, centers = np.array([0.0, 1.0, 4.0]), np.array([0.0, 3.0])
    # Of 0: at the first centre. Of 1: squared distances 1 and 4, so 1 / (1 + 1/4) = 0.8 and 0.2.
    # Of 4: 16 and 1, so 1/17 and 16/17.
    members = memberships(values, centers)
    np.testing.assert_allclose(members, [[1, 0.8, 1 / 17], [0, 0.2, 16 / 17]])
    # (0 + 0.64 * 1 + 4/289) / (1 + 0.64 + 1/289) and (0.04 * 1 + 4 * 256/289) / (0.04 + 256/289)
    first = (0.64 + 4 / 289) / (1.64 + 1 / 289)
    second = (0.04 + 1024 / 289) / (0.04 + 256 / 289)
    np.testing.assert_allclose(cluster_centers(values, members, centers), [first, second])
    once, _ = fuzzy_c_means(values, centers, max_iter=1)
    np.testing.assert_allclose(once, [first, second])


def test_fuzziness_is_an_exponent():
    # q = 3: distances 1 and 4 to the power of 2 / (3 - 1) = 1, so 1 / (1 + 1/4) = 0.8.
    np.testing.assert_allclose(memberships([1.0], [0.0, 5.0], 3.0), [[0.8], [0.2]])


def test_weights_count_a_value_as_often():
    values, centers = np.array([0.0, 1.0, 5.0, 6.0]), [1.0, 4.0]
    repeated = np.repeat(values, [1, 3, 2, 1])
    weighed, _ = fuzzy_c_means(values, centers, weights=np.array([1, 3, 2, 1]))
    alone, _ = fuzzy_c_means(repeated, centers)
    np.testing.assert_allclose(weighed, alone)


def test_two_groups_are_found():
    rng = np.random.default_rng(0)
    values = np.r_[rng.normal(30, 2, 500), rng.normal(60, 2, 500)]
    centers, members = fuzzy_c_means(values, [40.0, 45.0])
    np.testing.assert_allclose(centers, [30, 60], atol=0.5)
    assert (members[0, :500] > 0.5).all() and (members[1, 500:] > 0.5).all()
    np.testing.assert_allclose(members.sum(axis=0), 1)


def test_values_that_are_all_alike_draw_all_centers_and_are_shared():
    centers, members = fuzzy_c_means(np.full(9, 30.0), [0.0, 60.0, 90.0])
    np.testing.assert_allclose(centers, 30)
    np.testing.assert_allclose(members, 1 / 3)


def test_a_cluster_to_which_nothing_belongs_stays():
    members = np.array([[1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(cluster_centers([2.0, 4.0], members, np.array([0.0, 9.0])), [3, 9])


@pytest.mark.parametrize(("centers", "fuzziness"), [([], 2.0), ([1.0], 1.0)])
def test_what_cannot_be_clustered_is_refused(centers, fuzziness):
    with pytest.raises(ValueError, match="expected above 1, and one or more"):
        fuzzy_c_means(np.ones(3), centers, fuzziness=fuzziness)


def test_equal_centers_share_whatever_rounding_does():
    centers, members = fuzzy_c_means(np.array([5.0]), np.array([0.0, 10.0, 20.0]))
    np.testing.assert_allclose(centers, 5)
    np.testing.assert_allclose(members, 1 / 3)
