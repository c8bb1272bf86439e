"""scikit-learn's own checks, all of them, with no failure expected."""

from sklearn.utils.estimator_checks import parametrize_with_checks

from moesaic.classic import (
    AdaptiveMixtureClassifier,
    AdaptiveMixtureRegressor,
    HierarchicalMixtureClassifier,
    HierarchicalMixtureRegressor,
)


@parametrize_with_checks(
    [
        AdaptiveMixtureRegressor(),
        AdaptiveMixtureClassifier(),
        HierarchicalMixtureRegressor(),
        HierarchicalMixtureClassifier(),
    ]
)
def test_scikit_learn_s_check_passes(estimator, check):
    check(estimator)
