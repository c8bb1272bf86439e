import pytest

from moesaic.core.errors import ConfigError
from moesaic.serve import Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", ""])
def test_listening_beyond_this_machine_needs_a_key(host):
    with pytest.raises(ConfigError, match="lets other machines ask, which needs an API key, got none"):
        Settings(host=host)
    assert Settings(host=host, api_key="secret").host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.3", "::1", "localhost"])
def test_listening_on_this_machine_needs_none(host):
    assert Settings(host=host).api_key is None


def test_the_error_names_the_address_and_a_way_out():
    with pytest.raises(ConfigError) as error:
        Settings(host="10.1.2.3")
    assert str(error.value) == (
        "Listening on 10.1.2.3 lets other machines ask, which needs an API key, got none. "
        "Give --api-key or set MOESAIC_API_KEY, or listen on 127.0.0.1."
    )


def test_the_key_is_not_printed_with_the_settings():
    assert "secret" not in repr(Settings(api_key="secret"))


@pytest.mark.parametrize("key", ["", "  ", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_refused(key):
    with pytest.raises(ConfigError, match="must be plain ASCII and not empty"):
        Settings(api_key=key)


@pytest.mark.parametrize(
    ("name", "value", "low"),
    [("port", -1, 0), ("max_tokens", 0, 1), ("max_active", 0, 1), ("max_waiting", -2, 0), ("grace_s", -1, 0)],
)
def test_a_number_out_of_range_is_refused_by_name(name, value, low):
    with pytest.raises(ConfigError) as error:
        Settings(**{name: value})
    assert str(error.value) == f"{name} must be at least {low}, got {value}. Give a larger number."


def test_only_known_names_and_addresses_are_taken_for_this_service():
    settings = Settings(host="127.0.0.1", allow_hosts=("Box.local",))
    assert all(map(settings.may_be_called, ("localhost", "127.0.0.1", "::1", "192.168.0.9", "box.local", "LOCALHOST.")))
    assert not any(map(settings.may_be_called, ("evil.example", "localhost.evil.example", "", "127.0.0.1.nip.io")))
