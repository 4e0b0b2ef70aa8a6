"""The cost-sensitive loss: stock at alpha 1, hand-worked elsewhere."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ich_det2.modeling.cost import cost_sensitive_bce, positive_weight


def random_batch(seed=0, size=200, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(size, generator=generator, dtype=dtype)
    labels = torch.rand(size, generator=generator) < 0.3
    return logits.requires_grad_(), labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_alpha_one_equals_binary_cross_entropy_bit_for_bit(reduction, dtype):
    logits, labels = random_batch(dtype=dtype)
    ours = cost_sensitive_bce(logits, labels, 1.0, reduction)
    stock = F.binary_cross_entropy_with_logits(logits, labels.to(dtype), reduction=reduction)
    assert torch.equal(ours, stock)
    (ours_grad,) = torch.autograd.grad(ours.sum(), logits)
    (stock_grad,) = torch.autograd.grad(stock.sum(), logits)
    assert torch.equal(ours_grad, stock_grad)


@pytest.mark.parametrize("label_dtype", [torch.bool, torch.int8, torch.int64, torch.float32])
def test_dtype_of_labels_does_not_matter(label_dtype):
    logits, labels = random_batch()
    expected = cost_sensitive_bce(logits, labels.float(), 10)
    assert torch.equal(cost_sensitive_bce(logits, labels.to(label_dtype), 10), expected)


@pytest.mark.parametrize("alpha", [1, 10, 100])
def test_hand_worked_loss_and_gradient(alpha):
    # p = 3/4 at a logit of ln 3. Positive: -alpha ln(3/4), slope alpha (p - 1) = -alpha/4.
    # Negative: -ln(1 - 3/4) = ln 4, slope p = 3/4, whatever alpha is.
    logits = torch.full((2,), math.log(3), dtype=torch.float64, requires_grad=True)
    loss = cost_sensitive_bce(logits, torch.tensor([1, 0]), alpha)
    assert loss.tolist() == pytest.approx([alpha * math.log(4 / 3), math.log(4)], rel=1e-12)
    loss.sum().backward()
    assert logits.grad.tolist() == pytest.approx([-alpha / 4, 3 / 4], rel=1e-12)


def test_reductions_are_over_elements_not_weights():
    # At logit 0 each is ln 2: positive 3 ln 2, negatives ln 2 each. Sum 5 ln 2, mean 5/3 ln 2.
    logits, labels = torch.zeros(3), torch.tensor([1, 0, 0])
    values = [cost_sensitive_bce(logits, labels, 3, r) for r in ("none", "sum", "mean")]
    assert values[0].tolist() == pytest.approx([3 * math.log(2), math.log(2), math.log(2)])
    assert values[1].item() == pytest.approx(5 * math.log(2))
    assert values[2].item() == pytest.approx(5 / 3 * math.log(2))
    assert torch.equal(cost_sensitive_bce(logits, labels, 3), values[0])  # "none" by default


def test_further_weight_multiplies_alpha():
    # Positive 3 * 2, negative 1 * 0.5, both of ln 2.
    loss = cost_sensitive_bce(
        torch.zeros(2), torch.tensor([1, 0]), 3, weight=torch.tensor([2.0, 0.5])
    )
    assert loss.tolist() == pytest.approx([6 * math.log(2), 0.5 * math.log(2)])


def test_positive_weight_is_alpha_on_positives_only():
    assert positive_weight(torch.tensor([1, 0, -1], dtype=torch.int8), 7).tolist() == [7, 1, 1]


@given(
    logit=st.floats(-20, 20),
    alphas=st.lists(st.floats(0.01, 1000), min_size=2, max_size=2, unique=True),
)
def test_loss_grows_with_alpha_for_positives_and_stays_for_negatives(logit, alphas):
    logits = torch.tensor([logit, logit])
    low, high = (cost_sensitive_bce(logits, torch.tensor([1, 0]), a) for a in sorted(alphas))
    assert high[0] >= low[0] > 0
    assert high[1] == low[1]


@pytest.mark.parametrize("alpha", [1, 100])
def test_extreme_logits_stay_finite(alpha):
    # -log sigmoid(-1e4) = 1e4 (softplus is linear there); -log sigmoid(1e4) = 0.
    logits = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    loss = cost_sensitive_bce(logits, torch.tensor([1, 1, 0, 0]), alpha)
    assert loss.tolist() == [alpha * 1e4, 0, 0, 1e4]
    loss.sum().backward()
    assert logits.grad.tolist() == [-alpha, 0, 0, 1]


def test_no_anchor_is_a_sum_of_zero():
    assert cost_sensitive_bce(torch.zeros(0), torch.zeros(0), 2, "sum").item() == 0


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf])
def test_bad_alpha_is_an_error(alpha):
    with pytest.raises(ValueError, match=f"alpha must be a positive finite number, got {alpha}"):
        cost_sensitive_bce(torch.zeros(1), torch.ones(1), alpha)
