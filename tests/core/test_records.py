"""Records of the hub are asked for as their data set has them."""

import pytest

from germane.core.errors import RecordsError
from germane.core.records import Data, read_rows


@pytest.fixture
def asked(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return [{"query": "Where?", "answer": "here"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_subset_and_a_split_are_passed_on_and_fields_are_named(asked):
    data = Data(name="level1", path="owner/set", subset="forget_level1", split="test", prompt="query")
    assert read_rows(data) == [{"query": "Where?", "answer": "here"}]
    assert asked == [(("owner/set", "forget_level1"), {"split": "test"})]


def test_without_a_subset_the_set_has_its_own(asked):
    read_rows(Data(name="x", path="owner/set", prompt="query"))
    assert asked == [(("owner/set", None), {"split": "train"})]


def test_fields_that_are_not_there_are_named(asked):
    with pytest.raises(RecordsError, match="has no text in field 'text'"):
        read_rows(Data(name="x", path="owner/set"))
