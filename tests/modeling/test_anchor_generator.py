"""ClusteredAnchorGenerator: stock anchors for sizes and ratios, any for pairs, or an error."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator, build_anchor_generator

from ich_det2.modeling.anchor_generator import (
    ClusteredAnchorGenerator,
    anchors_given,
)


@pytest.mark.parametrize(
    ("sizes", "ratios"),
    [
        ([[11.5, 40.25]], [[0.6, 1.0, 2.4]]),
        ([11.5, 40.25], [0.6, 1.0, 2.4]),
        ([[11.5], [40.25]], [[0.6, 1.0], [1.0, 2.4]]),
    ],
)
def test_anchors_equal_stock_bit_for_bit(sizes, ratios):
    features = [torch.zeros(1, 2, 8, 6), torch.zeros(1, 2, 4, 3)]
    kwargs = {"sizes": sizes, "aspect_ratios": ratios, "strides": [8, 16], "offset": 0.25}
    ours, stock = (g(**kwargs) for g in (ClusteredAnchorGenerator, DefaultAnchorGenerator))
    assert ours.num_anchors == stock.num_anchors
    for one, other in zip(ours(features), stock(features)):
        assert torch.equal(one.tensor, other.tensor)


def test_hand_worked_anchor():
    # Size 20, ratio 4: h = 4 w and w h = 400, so 10 x 40. Offset 0.5 of stride 16 is 8:
    # x 8 -+ 5, y 8 -+ 20.
    generator = ClusteredAnchorGenerator(sizes=[[20]], aspect_ratios=[[4]], strides=[16])
    (anchors,) = generator([torch.zeros(1, 1, 1, 1)])
    assert anchors.tensor.tolist() == [[3, -12, 13, 28]]


def test_hand_worked_pairs():
    # 10 x 40 and 6 x 4 around (8, 8), in this order.
    pairs = [[[10, 40], [6.0, 4.0]]]
    generator = ClusteredAnchorGenerator(pairs=pairs, strides=[16])
    (anchors,) = generator([torch.zeros(1, 1, 1, 1)])
    assert anchors.tensor.tolist() == [[3, -12, 13, 28], [5, 6, 11, 10]]
    assert generator.num_anchors == [2]


def test_pairs_of_one_size_and_ratio_each_are_stock():
    sizes, ratios = [[11.5], [40.25]], [[0.6]]
    pairs = [[[size / 0.6**0.5, size * 0.6**0.5]] for (size,) in sizes]
    kwargs = {"strides": [8, 16], "offset": 0.25}
    ours = ClusteredAnchorGenerator(pairs=pairs, **kwargs)
    stock = DefaultAnchorGenerator(sizes=sizes, aspect_ratios=ratios, **kwargs)
    features = [torch.zeros(1, 2, 8, 6), torch.zeros(1, 2, 4, 3)]
    for one, other in zip(ours(features), stock(features)):
        assert torch.allclose(one.tensor, other.tensor, atol=1e-5)


def test_one_list_of_pairs_is_for_all_levels():
    generator = ClusteredAnchorGenerator(pairs=[[[4, 8], [6, 6]]], strides=[8, 16])
    assert generator.num_anchors == [2, 2]
    assert torch.equal(*generator.cell_anchors)


@pytest.mark.parametrize(
    "pairs",
    [[[4, 8], [6, 6]], [[[4, 8, 2]]], [[[4, 0]]], [[[4, -8]]], [[["4", "8"]]], ["ab"]],
)
def test_what_is_no_pair_is_an_error(pairs):
    with pytest.raises(ValueError, match=r"PAIRS is .*, expected for each level a list of \[width"):
        ClusteredAnchorGenerator(pairs=pairs, strides=[8, 16])


@pytest.mark.parametrize("empty", [[[]], [], [[[4, 8]], []]])
def test_open_pairs_are_an_error_with_the_remedy(empty):
    with pytest.raises(ValueError, match=r"ANCHOR_GENERATOR.PAIRS is .*tools/cluster_anchors.py"):
        ClusteredAnchorGenerator(pairs=empty, strides=[8, 16])


@pytest.mark.parametrize("empty", [[[]], [], [[16.0], []]])
@pytest.mark.parametrize("key", ["sizes", "aspect_ratios"])
def test_open_anchors_are_an_error_with_the_remedy(key, empty):
    kwargs = {"sizes": [[16.0]], "aspect_ratios": [[1.0]], "strides": [8, 16], key: empty}
    with pytest.raises(ValueError) as error:
        ClusteredAnchorGenerator(**kwargs)
    assert f"MODEL.ANCHOR_GENERATOR.{key.upper()} is {empty}" in str(error.value)
    assert "tools/cluster_anchors.py" in str(error.value)


@pytest.mark.parametrize(
    ("values", "given"),
    [([[]], False), ([], False), ([[1.0], []], False), ([[1.0]], True), ([1.0, 2.0], True)],
)
def test_whether_anchors_are_given(values, given):
    assert anchors_given(values) is given


def test_builds_from_the_config(tiny_cfg):
    generator = build_anchor_generator(tiny_cfg(), [ShapeSpec(channels=4, stride=16)])
    assert type(generator) is ClusteredAnchorGenerator
    assert generator.num_anchors == [6] and list(generator.strides) == [16]
    with pytest.raises(ValueError, match="SIZES"):
        cfg = tiny_cfg("MODEL.ANCHOR_GENERATOR.SIZES", "[[]]")
        build_anchor_generator(cfg, [ShapeSpec(channels=4, stride=16)])


@pytest.mark.parametrize("method", ["separate", "joint"])
def test_pairs_are_used_where_they_are_given_whatever_the_method(tiny_cfg, method):
    opts = ("MODEL.ANCHOR_GENERATOR.CLUSTERS.METHOD", method)
    shape = [ShapeSpec(channels=4, stride=16)]
    assert build_anchor_generator(tiny_cfg(*opts), shape).num_anchors == [6]
    pairs = ("MODEL.ANCHOR_GENERATOR.PAIRS", "[[[10.5, 40.0], [6.0, 4.0]]]")
    (cell_anchors,) = build_anchor_generator(tiny_cfg(*opts, *pairs), shape).cell_anchors
    assert cell_anchors.tolist() == [[-5.25, -20, 5.25, 20], [-3, -2, 3, 2]]
