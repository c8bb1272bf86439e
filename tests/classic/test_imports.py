"""The classic mixtures need neither torch nor transformers, and say so where scikit-learn is missing."""

import subprocess
import sys

SCRIPT = """
import sys
import moesaic as mz
from moesaic.classic import HierarchicalMixtureRegressor
assert mz.classic.HierarchicalMixtureRegressor is HierarchicalMixtureRegressor
model = HierarchicalMixtureRegressor(max_iter=2, tol=100.0).fit([[0.0], [1.0], [2.0]], [0.0, 1.0, 2.0])
model.predict_dist([[1.0]]).quantile(0.5)
print(*sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "matplotlib", "tokenizers"}))
"""


def test_a_fresh_process_fits_one_without_torch_or_transformers():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_without_scikit_learn_the_way_to_get_it_is_named():
    script = "import sys; sys.modules['sklearn'] = None; import moesaic.classic"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith(
        "BackendError: The classic mixtures are scikit-learn estimators, and scikit-learn is not installed. "
        "Try: pip install 'moesaic[classic]'"
    )
