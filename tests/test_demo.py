"""What the demo says of its own result, on numbers made up for and against it."""

from __future__ import annotations

from pathlib import Path

import pytest

from germane.core.evidence import Evidence, Row, Score
from germane.core.report import headline
from germane.core.report.pages import render
from germane.demo import MadePool, _together
from germane.recipe import Result

POOL = MadePool(Path("pool"), ("a", "b", "c", "d"), tuple(f"bad{n}" for n in range(8)))
START = "With 8 irrelevant checkpoints added to 4 wanted ones (one seed), "


def row(label: str, value: float, status: str = "done") -> Row:
    score = Score(subject="result", task="a", metric="accuracy", value=value, n=100, low=value, high=value)
    return Row(label=label, method=f"merge/{label}", status=status, scores=[score])


def combined(before: dict[str, float], after: dict[str, float]) -> Evidence:
    base = row("base", 0.4, "reference")
    results = {
        name: Result(
            Path(name), Evidence(kind="compare", rows=[base, *(row(*pair) for pair in of.items())])
        )
        for name, of in (("4 wanted", before), ("all 12", after))
    }
    return _together(results, POOL)


def test_the_headline_is_the_finding_and_not_the_best_row():
    evidence = combined(
        {"average": 0.6, "ties": 0.634, "frank-wolfe": 0.65},
        {"average": 0.371, "ties": 0.352, "frank-wolfe": 0.644},
    )
    said = (
        "mean accuracy fell by 28.2 points for ties and 22.9 points for average; for frank-wolfe it fell "
        "by 0.6 points, better than for any other, and ends at 0.644, the highest"
    )
    assert headline(evidence) == START + said
    assert f"<h1>{START}{said}</h1>" in render(evidence)
    assert evidence.tables[0].rows[0] == ["average", 0.6, 0.371, -22.9]
    assert [r.label for r in evidence.rows].count("base") == 1
    assert Evidence.model_validate_json(evidence.model_dump_json()).headline == START + said


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            {"average": 0.6, "ties": 0.5, "frank-wolfe": 0.65},
            {"average": 0.503, "ties": 0.503, "frank-wolfe": 0.45},
            "mean accuracy fell by 9.7 points for average; mean accuracy did not fall for ties (+0.3); for "
            "frank-wolfe it fell by 20.0 points, no better than for average and ties, and ends at 0.450, "
            "not above average and ties",
        ),
        (
            {"average": 0.6, "ties": 0.5, "frank-wolfe": 0.3},
            {"average": 0.4, "ties": 0.4, "frank-wolfe": 0.31},
            "mean accuracy fell by 20.0 points for average and 10.0 points for ties; for frank-wolfe it "
            "rose by 1.0 points, better than for any other, and ends at 0.310, not above average and ties",
        ),
        (
            {"average": 0.6, "frank-wolfe": 0.65},
            {"average": 0.4},
            "mean accuracy fell by 20.0 points for average; frank-wolfe has no score on both pools",
        ),
    ],
    ids=["against it", "steady but low", "failed"],
)
def test_the_headline_is_honest(before: dict[str, float], after: dict[str, float], said: str):
    assert headline(combined(before, after)) == START + said
