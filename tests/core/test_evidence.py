"""The evidence on disk."""

from __future__ import annotations

import math
from pathlib import Path

from germane.core.evidence import Evidence, Plot, Score, Series, Step


def test_numbers_that_are_not_finite_survive_writing_and_reading(tmp_path: Path) -> None:
    score = Score(
        subject="result", task="a", metric="perplexity", value=math.nan, n=3, low=-math.inf, high=math.inf
    )
    series = Series(name="loss", steps=[0, 1], values=[math.nan, 1.5])
    plot = Plot(title="Loss", x="step", y="loss", series=[series])
    step = Step(task="merge", method="merge/ties", scores=[score], plots=[plot], facts={"norm": math.nan})
    Evidence(steps=[step]).write(tmp_path)
    (read,) = Evidence.read(tmp_path).steps
    (again,) = read.scores
    assert math.isnan(again.value)
    assert (again.low, again.high) == (-math.inf, math.inf)
    first, second = read.plots[0].series[0].values
    assert math.isnan(first)
    assert second == 1.5
    assert math.isnan(read.facts["norm"])
