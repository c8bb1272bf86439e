import pytest

from moesaic import BackendError, CheckpointError, ConfigError, DataError, MoesaicError, ShapeError


@pytest.mark.parametrize("error", [BackendError, CheckpointError, ConfigError, DataError, ShapeError])
def test_every_error_can_be_caught_as_a_moesaic_error(error):
    with pytest.raises(MoesaicError):
        raise error("what was needed, what came, what to try")


@pytest.mark.parametrize(
    ("error", "builtin"), [(ConfigError, ValueError), (ShapeError, ValueError), (BackendError, RuntimeError)]
)
def test_wrong_values_are_also_python_s_own_errors(error, builtin):
    assert issubclass(error, builtin)
