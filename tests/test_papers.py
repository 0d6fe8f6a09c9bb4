"""`papers.toml` says only what is true."""

from pathlib import Path

import pytest

from germane import method
from germane.papers import Paper, papers

ROOT = Path(__file__).parent.parent
DONE = [paper for paper in papers() if paper.method]


def test_every_paper_is_listed_once():
    found = papers()
    assert len(found) == 108
    assert len({paper.slug for paper in found}) == 108
    assert len({paper.arxiv for paper in found}) == 108


@pytest.mark.parametrize("paper", papers(), ids=lambda paper: paper.slug)
def test_method_and_claim_come_together(paper: Paper):
    assert bool(paper.method) == bool(paper.claim)


@pytest.mark.parametrize("paper", DONE, ids=lambda paper: paper.slug)
def test_a_paper_that_is_done_has_method_test_and_claim(paper: Paper):
    kind = method.load(paper.method)
    assert kind.information.paper == paper.arxiv
    name = paper.method.split("/")[1].replace("-", "_")
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    assert paper.method in tests or name in tests
    assert (ROOT / paper.claim).exists()
    claims = (ROOT / "CLAIMS.md").read_text(encoding="utf-8")
    assert f"<!-- {Path(paper.claim).stem} -->" in claims
