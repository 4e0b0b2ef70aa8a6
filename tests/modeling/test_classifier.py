"""ImageClassifier: loss, padding, sequences, and the size of each network."""

import pytest
import timm
import torch
from detectron2.modeling import build_model
from torch.nn import functional as F
from torchvision import models

from ich_det2.modeling import CLASSIFIER_REGISTRY, ImageClassifier
from ich_det2.modeling.classifier_networks import (
    BHCNetGRU,
    DenseNet121,
    InceptionResNetV2,
    InceptionV3,
    LeNet,
)

# A convolution or linear layer has (inputs x kernel + bias) x outputs parameters. A library's
# network of 1000 classes on F features loses 999 (F + 1).
BHCNET = 864 + 18_432 + 73_728 + 147_456 + 2 * (32 + 64 + 128 + 128) + 257 * 128 + 129
# Blocks of 8, 32, 64 and 64 channels on co-occurrence images, 128 pooled features to 64 units.
TEXTURE = 2_304 + 18_432 + 36_864 + 2 * (32 + 64 + 64) + 129 * 64
GATE = 64 * 128 + 64 * 64 + 2 * 64  # one gate of one direction: 128 features, 64 units
ALEXNET = 61_100_840 - 999 * 4097
PARAMETERS = {
    "LeNet": 456 + 2_416 + 48_120 + 10_164 + 85,
    "AlexNet": ALEXNET,
    "GoogLeNet": 6_624_904 - 999 * 1025,
    "DenseNet121": 7_978_856 - 999 * 1025,
    # Without its auxiliary classifier: convolutions 768 x 128 and 128 x 25 x 768 with two norms'
    # weights and biases, and a layer of 768 features and 1000 classes.
    "InceptionV3": 27_161_264 - (98_304 + 2_457_600 + 2 * 896 + 769_000) - 999 * 2049,
    "InceptionResNetV2": 55_843_464 - 999 * 1537,
    "EfficientNetLite0": 4_652_008 - 999 * 1281,
    "BHCNet": BHCNET,
    "BHCNetLSTM": BHCNET + 2 * 4 * GATE,
    "BHCNetGRU": BHCNET + 2 * 3 * GATE,
    # DenseNet-121's features without the third transition and the fourth block, whose 16 layers see
    # 512 + 32 i channels; the map, 2 x 1024 features to 128 units, BHCNetLSTM's recurrent layer.
    "RADNet": 6_953_856
    - (2 * 1024 + 1024 * 512)
    - (130 * 12_032 + 16 * (2 * 128 + 128 * 288))
    + 1025
    + 2049 * 128
    + 2 * 4 * GATE
    + 129,
    "AlexNetSVM": ALEXNET,
    # A convolution of the heat map, and 3 x 3 there, 4 x 4 back, of 16, 32, 32 and 16 filters.
    "AutoencoderAlexNetSVM": ALEXNET
    + 64 * 121
    + 9 * (16 + 512 + 1024 + 512)
    + 96
    + 16 * (512 + 1024 + 512 + 16)
    + 32
    + 32
    + 16
    + 1,
    "GLCMNet": BHCNET + TEXTURE + 64,
    # 27 weights between each two channels of 3, 16, 32, 64, 64 and 64, norms, 128 units, a logit.
    "CNN3D": 27 * (48 + 512 + 2048 + 4096 + 4096) + 2 * 240 + 129 * 128 + 129,
}
SMALL = {
    "LeNet": 32,
    "AlexNet": 96,
    "AlexNetSVM": 96,
    "AutoencoderAlexNetSVM": 96,
    "InceptionV3": 107,
    "InceptionResNetV2": 139,
}


def count(network):
    return sum(p.numel() for p in network.parameters())


@pytest.fixture
def make():
    """Factory of an ImageClassifier by the name of its network."""

    def make(name="LeNet", input_size=32, **kwargs):
        torch.manual_seed(0)
        network = CLASSIFIER_REGISTRY.get(name)(input_size)
        kwargs = {"pixel_mean": [100.0] * 3, "pixel_std": [50.0] * 3} | kwargs
        return ImageClassifier(network=network, input_size=input_size, **kwargs)

    return make


def inputs(*labels, shape=(3, 32, 32), key="image", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {key: 255 * torch.rand(shape, generator=generator), "image_label": label}
        for label in labels
    ]


def test_every_network_is_counted():
    ours = {name for name, n in CLASSIFIER_REGISTRY if n.__module__.startswith("ich_det2")}
    assert ours == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_publication_or_library(name):
    with torch.device("meta"):
        assert count(CLASSIFIER_REGISTRY.get(name)()) == PARAMETERS[name]


def test_lenet_with_ten_outputs_on_one_channel():
    # Convolutions 6 (1 x 25 + 1) = 156 and 16 (6 x 25 + 1) = 2416; units (400 + 1) 120 = 48 120,
    # (120 + 1) 84 = 10 164, (84 + 1) 10 = 850.
    assert count(LeNet(in_channels=1, num_outputs=10)) == 61_706


@pytest.mark.parametrize(
    ("ours", "library"),
    [
        (DenseNet121, lambda: models.densenet121(num_classes=1)),
        (
            InceptionV3,
            lambda: models.inception_v3(num_classes=1, aux_logits=False, init_weights=False),
        ),
        (InceptionResNetV2, lambda: timm.create_model("inception_resnet_v2", num_classes=1)),
    ],
)
def test_checkpoints_of_the_library_fit(ours, library):
    with torch.device("meta"):
        ours, library = ours().state_dict(), library().state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in library.items()}


@pytest.mark.parametrize("pos_weight", [1.0, 3.0])
def test_the_loss_is_binary_cross_entropy(make, pos_weight):
    model, batch = make(pos_weight=pos_weight), inputs(1, 0, 1)
    loss = model(batch)
    x = (torch.stack([d["image"] for d in batch]) - 100) / 50
    probs = model.network(x)[:, 0].sigmoid()
    # -w log p of the two positives, -log (1 - p) of the negative.
    expected = -(pos_weight * probs[[0, 2]].log().sum() + (1 - probs[1]).log()) / 3
    assert set(loss) == {"loss_cls"}
    torch.testing.assert_close(loss["loss_cls"], expected)
    if pos_weight == 1:
        stock = F.binary_cross_entropy(probs, torch.tensor([1.0, 0.0, 1.0]))
        torch.testing.assert_close(loss["loss_cls"], stock)


def test_scores_are_the_probabilities_and_do_not_depend_on_the_batch(make):
    model = make().eval()
    batch = inputs(1, shape=(3, 32, 20)) + inputs(0, shape=(3, 100, 64)) + inputs(0)
    with torch.no_grad():
        together = [y["image_score"] for y in model(batch)]
        alone = [model([x])[0]["image_score"] for x in batch]
        logit = model.network(model.preprocess_image(batch[:1]))[0, 0]
    torch.testing.assert_close(together, alone)
    assert together[0].item() == pytest.approx(1 / (1 + torch.exp(-logit).item()))
    assert together[0] != together[1]


def test_the_longer_side_is_scaled_and_the_rest_is_air(make):
    bright = {"image": torch.full((3, 64, 32), 150.0)}
    (x,) = make().preprocess_image([bright])
    assert x.shape == (3, 32, 32)
    torch.testing.assert_close(x[:, :, :16], torch.full((3, 32, 16), (150 - 100) / 50))
    assert (x[:, :, 16:] == (0 - 100) / 50).all()


def test_normalization_is_not_in_the_checkpoint(make):
    assert not [key for key in make().state_dict() if not key.startswith("network.")]


@pytest.mark.parametrize("name", PARAMETERS)
def test_gradients_reach_all_parameters(make, name):
    size = SMALL.get(name, 64)
    model = make(name, size)
    key, frames = ("sequence", (3,)) if model.takes_sequence else ("image", ())
    key, frames = ("scan", (9,)) if model.takes_scan else (key, frames)
    losses = model(inputs(1, 0, shape=(*frames, 3, size, size), key=key))
    sum(losses.values()).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("name", ["BHCNetLSTM", "BHCNetGRU"])
def test_the_order_of_the_neighbours_matters(make, name):
    model = make(name).eval()
    (x,) = inputs(1, shape=(5, 3, 32, 32), key="sequence")
    moved = x | {"sequence": x["sequence"][[1, 0, 2, 4, 3]]}
    with torch.no_grad():
        scores = [y["image_score"].item() for y in model([x, moved, x])]
    assert scores[0] == pytest.approx(scores[2]) and abs(scores[0] - scores[1]) > 1e-5


def test_a_scan_is_scored_once_for_all_its_slices(make, monkeypatch):
    model = make("CNN3D").eval()
    first, second = inputs(1, 0, shape=(5, 3, 40, 32), key="scan")
    network, seen = model.network.forward, []
    monkeypatch.setattr(model.network, "forward", lambda x: seen.append(x) or network(x))
    with torch.no_grad():
        batch = [first, first | {"scan": first["scan"].clone()}, second, second]
        scores = [y["image_score"].item() for y in model(batch)]
        assert [x.shape for x in seen] == 2 * [(1, 5, 3, 32, 32)]
        assert scores[0] == scores[1] != scores[2] == scores[3]
        assert model([second])[0]["image_score"] == scores[2] and len(seen) == 2
        model.network.output.bias += 1  # as a training does between two evaluations
        moved = model.train().eval()([second])[0]["image_score"]
        before = torch.tensor(scores[2]).logit().item()
        assert moved.logit().item() == pytest.approx(1 + before, abs=1e-4)


@pytest.mark.parametrize("num_slices", [1, 3, 24])
def test_a_scan_may_have_any_number_of_slices_whose_order_matters(make, num_slices):
    network = make("CNN3D").eval().network
    x = torch.randn(2, num_slices, 3, 32, 32)
    with torch.no_grad():
        logits, turned = network(x), network(x.flip(1))
    assert logits.shape == (2, 1)
    assert torch.allclose(logits, turned, atol=1e-6) == (num_slices == 1)


def test_the_output_is_that_of_the_middle_slice():
    network = BHCNetGRU(32).eval()
    x = torch.randn(2, 3, 3, 32, 32)
    with torch.no_grad():
        states, _ = network.recurrent(torch.stack([network.features(x[:, i]) for i in range(3)], 1))
        torch.testing.assert_close(network(x), network.output(states[:, 1]))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.CLASSIFIER.NAME", "LeNet5"), r"'LeNet5'.*registered classifiers are \['AlexNet'"),
        (("MODEL.CLASSIFIER.NAME", "BHCNetGRU"), "INPUT.SEQUENCE_SLICES is 0; expected 1 or more"),
        (("MODEL.CLASSIFIER.NAME", "CNN3D"), "INPUT.SCAN_SLICES is 0; expected 1 or more"),
        (("MODEL.CLASSIFIER.INPUT_SIZE", "62"), "INPUT_SIZE is 62, expected at least 63 pixels"),
    ],
)
def test_a_config_that_cannot_work_is_said_in_a_sentence(tiny_cfg, opts, message):
    cfg = tiny_cfg(*opts, config="classifier_alexnet.yaml")
    with pytest.raises(ValueError, match=message):
        build_model(cfg)
