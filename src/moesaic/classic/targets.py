"""What is predicted: numbers, or classes. Each half of an estimator that differs between the two."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_array, column_or_1d, validate_data

from moesaic.classic.data import Frame
from moesaic.classic.distribution import Prediction
from moesaic.classic.family import BERNOULLI, FAMILIES, MULTINOMIAL, POISSON, Family
from moesaic.classic.mixture import Mixture
from moesaic.classic.settings import need_number, need_one_of
from moesaic.classic.tree import Floats
from moesaic.core.errors import ConfigError


class Numbers(RegressorMixin):  # type: ignore[misc]
    """Targets that are numbers, one for each row or several."""

    mixture_: Mixture
    frame_: Frame
    _link: str

    def predict(self, X: Any) -> Floats:
        """The expected target of each row: experts' means, weighted by their gates."""
        x_TD = self._inputs(X)
        return self._decoded(self.frame_.targets_back(self.mixture_.mean(x_TD)))

    def predict_dist(self, X: Any) -> Prediction:
        """The whole distribution of each row's target: mean, variance, quantiles, density."""
        x_TD = self._inputs(X)
        log_weight_TE, mean_TEO, dispersion_EO = self.mixture_.components(x_TD)
        return Prediction(
            log_weight_TE=log_weight_TE,
            mean_TEO=self.frame_.targets_back(mean_TEO),
            dispersion_EO=dispersion_EO * self.frame_.y_scale_O**2,
            family=self.mixture_.family,
            is_flat=self._is_flat,
        )

    def _check_settings(self) -> None:
        super()._check_settings()
        need_number("min_variance", self.min_variance, above=0)
        if isinstance(self.variance, str):
            need_one_of("variance", self.variance, ("shared", "expert"))
        else:
            need_number("variance", self.variance, above=0)

    def _validated(self, X: Any, y: Any, *, is_first: bool = True) -> tuple[Floats, Floats]:
        X, y = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, reset=is_first, ensure_min_features=1
        )
        y = np.asarray(y, dtype=np.float64)
        self._is_flat = y.ndim == 1
        y_TO = y.reshape(len(y), -1)
        if self._family() is POISSON and (y_TO < 0).any():
            raise ConfigError(f"link='poisson' needs targets of at least 0, got {y_TO.min():g}.")
        return X, y_TO

    def _given(self, y: Any, num_rows: int) -> Floats:
        y_TO: Floats = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y").reshape(num_rows, -1)
        return y_TO

    def _family(self) -> Family:
        return FAMILIES[self._link]

    def _decoded(self, y_TO: Floats) -> Floats:
        return y_TO[:, 0] if self._is_flat else y_TO

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class Classes(ClassifierMixin):  # type: ignore[misc]
    """Targets that are classes, or several labels at once where they come as columns of 0 and 1."""

    mixture_: Mixture
    classes_: NDArray[Any]
    _link: str
    # There is no noise to estimate.
    variance, min_variance = 1.0, 1.0

    def predict(self, X: Any) -> NDArray[Any]:
        """The likeliest class of each row, or its labels."""
        x_TD = self._inputs(X)
        return self._decoded(self.mixture_.mean(x_TD))

    def predict_proba(self, X: Any) -> Floats:
        """Probability of each class (T, C), in the order of ``classes_``; or of each label, where there are several."""
        x_TD = self._inputs(X)
        # Gates sum to 1 but for rounding.
        mean_TO = np.minimum(self.mixture_.mean(x_TD), 1.0)
        if self._is_multilabel:
            tiny = np.finfo(float).eps
            return np.clip(mean_TO, tiny, 1 - tiny)
        if len(self.classes_) == 1:
            return np.ones((len(mean_TO), 1))
        if self.mixture_.family is BERNOULLI:
            return np.concatenate([1 - mean_TO, mean_TO], axis=1)
        return mean_TO

    def predict_log_proba(self, X: Any) -> Floats:
        """Logarithm of :meth:`predict_proba`."""
        with np.errstate(divide="ignore"):
            logs: Floats = np.log(self.predict_proba(X))
        return logs

    def _decoded(self, mean_TO: Floats) -> NDArray[Any]:
        if self._is_multilabel:
            return (mean_TO > 0.5).astype(np.int64)
        if len(self.classes_) == 1:
            return np.repeat(self.classes_, len(mean_TO))
        if self.mixture_.family is BERNOULLI:
            mean_TO = np.concatenate([1 - mean_TO, mean_TO], axis=1)
        likeliest: NDArray[Any] = self.classes_[mean_TO.argmax(axis=1)]
        return likeliest

    def _validated(self, X: Any, y: Any, *, is_first: bool = True, classes: Any = None) -> tuple[Floats, Floats]:
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, reset=is_first)
        check_classification_targets(y)
        if is_first:
            self._is_multilabel = self._allows_labels and type_of_target(y) == "multilabel-indicator"
        if not self._is_multilabel:
            y = column_or_1d(y, warn=True)
        if is_first:
            self.classes_ = (
                np.arange(y.shape[1]) if self._is_multilabel else np.unique(y if classes is None else classes)
            )
            if self._link == "bernoulli" and not self._is_multilabel and len(self.classes_) > 2:
                raise ConfigError(
                    f"link='bernoulli' needs two classes or columns of 0 and 1, got {len(self.classes_)} classes. "
                    "Take link='multinomial', or 'auto'."
                )
        return X, self._given(y, len(X))

    def _given(self, y: Any, num_rows: int) -> Floats:
        if self._is_multilabel:
            labels: Floats = check_array(y, dtype=np.float64, input_name="y")
            return labels
        y = column_or_1d(y)
        index_T = np.searchsorted(self.classes_, y)
        index_T = np.minimum(index_T, len(self.classes_) - 1)
        if not (self.classes_[index_T] == y).all():
            unknown = sorted(set(np.asarray(y).tolist()) - set(self.classes_.tolist()))
            raise ConfigError(f"y needs classes among {self.classes_.tolist()}, got {unknown}.")
        is_binary = self._family() is BERNOULLI
        rows: Floats = index_T[:, None].astype(np.float64) if is_binary else np.eye(len(self.classes_))[index_T]
        return rows

    def _family(self) -> Family:
        if self._link == "auto":
            return BERNOULLI if self._is_multilabel or len(self.classes_) <= 2 else MULTINOMIAL
        return FAMILIES[self._link]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = self._allows_labels
        return tags
