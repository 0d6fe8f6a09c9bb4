"""Generated pages are what the code says now, and every method explains itself."""

from pathlib import Path

import pytest

from germane import method
from germane.documentation import explanation, pages

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("file", sorted(pages(ROOT)), ids=lambda file: str(file.relative_to(ROOT)))
def test_generated_files_are_current(file: Path):
    assert file.read_text(encoding="utf-8") == pages(ROOT)[file], "run: make docs"


def test_no_page_is_left_of_a_method_that_is_gone():
    written = {file for file in pages(ROOT) if file.suffix == ".md"}
    assert set((ROOT / "docs").rglob("*.md")) <= written


@pytest.mark.parametrize("name", method.names())
def test_every_method_says_when_to_use_it_and_when_not(name: str):
    page = explanation(name)
    assert "Use it" in page
    assert "Not " in page or "usually are" in page
    for field in method.load(name).model_fields.values():
        assert field.description
