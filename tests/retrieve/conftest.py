import pytest
import retrievers


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    return retrievers.make(tmp_path_factory.mktemp("retrieve"))
