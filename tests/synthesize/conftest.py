import pytest
import zoo  # noqa: F401 - sets threads and quiet

from germane.embedded import facts as fact_parts


@pytest.fixture(scope="session")
def facts(tmp_path_factory):
    """A tiny language model that knows twelve people, and one that never saw four of them."""
    return fact_parts.make(tmp_path_factory.mktemp("facts"), known=12, forgotten=4, refusing=2)
