"""A support vector machine as a module, and AlexNet with one in the place of its last layer.

Shape glossary: N slices, C channels, S the side of the network's input in pixels, D features of a
slice, V support vectors.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from .classifier_networks import CLASSIFIER_REGISTRY, AlexNet

logger = logging.getLogger(__name__)

FOLDS = 5
"""Of the decisions that the logits are fitted to, at most."""


class SVM(nn.Module):
    """scikit-learn's ``SVC`` with a Gaussian kernel on standardized features, as buffers.

    So it is in a checkpoint as tensors, runs on a GPU, and needs no scikit-learn but to be fitted.
    Which side a slice is on says the sign of the decision; how likely it bleeds, a logistic
    function of the decision, as Platt's.
    """

    def __init__(self, num_features: int):
        """
        Args:
            num_features: D.
        """
        super().__init__()
        for name, shape in (
            *(("mean", (num_features,)), ("scale", (num_features,))),
            *(("vectors", (0, num_features)), ("coefficients", (0,)), ("intercept", ())),
            *(("gamma", ()), ("slope", ()), ("offset", ())),
        ):
            self.register_buffer(name, torch.zeros(shape))

    def take_sizes(self, state_dict: dict, prefix: str = "") -> None:
        """Makes room for as many support vectors as a state dict has, whose names begin so."""
        for name in ("vectors", "coefficients"):
            own, stored = getattr(self, name), state_dict.get(prefix + name)
            if stored is not None and stored.shape[1:] == own.shape[1:]:
                setattr(self, name, own.new_zeros(tuple(stored.shape)))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.take_sizes(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def standardize(self, features: torch.Tensor) -> torch.Tensor:
        return (features.float() - self.mean) / self.scale

    def fit(
        self, features: torch.Tensor, labels: torch.Tensor, groups: Sequence | None = None
    ) -> None:
        """Fits all buffers.

        Where two groups or more have slices of each label, the logits are a logistic regression on
        decisions about groups that were left out, see :func:`left_out`; else, and where those
        decisions rise as slices are the less likely to bleed, the decisions themselves: a fit on so
        few patients must not turn the machine's answer around. The time grows with the square of
        N.

        Args:
            features: (N, D), on any device.
            labels: (N,), 0 or 1, of which both have to be there. Slices weigh alike.
            groups: (N,), the patient of each slice; None if each is of another.

        Raises:
            ValueError: if there is but one label, or a feature is not finite.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_predict
        from sklearn.svm import SVC

        if len(labels.unique()) < 2:
            raise ValueError(
                f"the {len(labels)} slices that a support vector machine is fitted to are all of"
                f" label {int(labels[0])}, expected slices with and without hemorrhage."
            )
        if not features.isfinite().all():
            raise ValueError(
                "the features that a support vector machine is fitted to hold NaN or infinity: the"
                " training diverged; train again with a lower SOLVER.BASE_LR."
            )
        features = features.to(self.mean.device).double()
        mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
        scale = torch.where(scale > 1e-6 * mean.abs(), scale, 1)  # what varies by rounding alone
        self._set(mean=mean, scale=scale)
        x, y = self.standardize(features).double().cpu().numpy(), labels.long().cpu().numpy()
        gamma = 1 / max(x.shape[1] * x.var(), 1e-12)  # as SVC's own "scale"
        machine = SVC(gamma=gamma).fit(x, y)
        self._set(
            vectors=machine.support_vectors_,
            coefficients=machine.dual_coef_[0],
            intercept=machine.intercept_[0],
            gamma=gamma,
        )
        slope, offset = 1.0, 0.0
        if folds := left_out(y, range(len(y)) if groups is None else groups):
            decisions = cross_val_predict(machine, x, y, cv=folds, method="decision_function")
            line = LogisticRegression().fit(decisions[:, None], y)
            if line.coef_[0, 0] > 0:
                slope, offset = line.coef_[0, 0], line.intercept_[0]
            else:
                logger.warning(
                    "The support vector machine ranks patients that it was not fitted to no better"
                    " than chance: its decisions stand for logits as they are."
                )
        self._set(slope=slope, offset=offset)

    def _set(self, **values) -> None:
        for name, value in values.items():
            own = getattr(self, name)
            setattr(self, name, torch.as_tensor(value).to(own))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The decision, as ``SVC.decision_function``.

        Args:
            features: (N, D).

        Returns:
            (N,), above 0 for hemorrhage.

        Raises:
            ValueError: if it was never fitted.
        """
        if not len(self.coefficients):
            raise ValueError(
                "the model's support vector machine is not fitted; tools/train_net.py fits it"
                " before each validation and checkpoint: use one of its checkpoints."
            )
        distances = torch.cdist(self.standardize(features), self.vectors)
        return (-self.gamma * distances.square()).exp() @ self.coefficients + self.intercept

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """As :meth:`forward`, the logit of hemorrhage."""
        return self.slope * self(features) + self.offset


def left_out(labels: np.ndarray, groups: Sequence) -> list[tuple[np.ndarray, np.ndarray]]:
    """Parts of which each is left out once: no group is in two of them, and what is fitted to the
    others sees both labels.

    Args:
        labels: (N,), 0 or 1.
        groups: (N,).

    Returns:
        Indices of what is fitted to and of what is left out, ``FOLDS`` times, or as often as groups
        have slices of a label; none where that is once.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    groups = np.asarray(groups)
    most = min(FOLDS, *(len({*groups[labels == label]}) for label in (0, 1)))
    for n in range(most, 1, -1):
        folds = list(StratifiedGroupKFold(n).split(labels, labels, groups))
        if all(len({*labels[kept]}) == 2 for kept, _ in folds):
            return folds
    return []


@CLASSIFIER_REGISTRY.register()
class AlexNetSVM(AlexNet):
    """AlexNet, whose last layer a support vector machine replaces once the others are trained.

    Dawud, Yurtkan and Oztoprak ("Application of Deep Learning in Neuroradiology: Brain Haemorrhage
    Classification Using Transfer Learning", 2019) took ImageNet's AlexNet and compared it with one
    whose features an SVM classified. Their settings were not at hand, so these are chosen here: the
    4096 features before the last layer, which learn by that layer's cross-entropy, from random
    weights unless ``MODEL.WEIGHTS`` gives a checkpoint; and :class:`SVM` with ``SVC``'s own C of 1.
    """

    def __init__(self, input_size: int = 224):
        super().__init__(input_size)
        self.svm = SVM(self.classifier[-1].in_features)

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: images, (N, C, S, S).

        Returns:
            Features that the SVM is fitted to, (N, D).
        """
        return self._features_of(self.features(x))

    def _features_of(self, maps: torch.Tensor) -> torch.Tensor:
        return self.classifier[:-1](self.avgpool(maps).flatten(1))

    def fit(
        self, features: torch.Tensor, labels: torch.Tensor, groups: Sequence | None = None
    ) -> None:
        """Fits the SVM, see :meth:`SVM.fit`."""
        self.svm.fit(features, labels, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.embed(x)
        if self.training:
            return self.classifier[-1](features)
        return self.svm.logits(features)[:, None]
