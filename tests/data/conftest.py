import pytest

from moesaic.data import Corpus, load_corpus


@pytest.fixture(scope="session")
def builtin() -> Corpus:
    return load_corpus("builtin")
