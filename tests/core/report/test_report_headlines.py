"""What the headline says."""

from __future__ import annotations

import math

from report_evidence import compare_evidence, perplexity, row, run_evidence, score

from germane.core.evidence import Evidence, Finding, Row, Step
from germane.core.report import headline
from germane.core.report.pages import render


def test_headline_of_a_run() -> None:
    assert headline(run_evidence()) == (
        "frank-wolfe: mean accuracy 0.810 over 4 tasks, base 0.620; took 4 of 12 checkpoints"
    )


def test_headline_counts_serious_findings() -> None:
    evidence = run_evidence()
    finding = Finding(code="no-effect", severity="serious", about="result", message="No effect.")
    evidence.steps[0].findings.append(finding)
    assert headline(evidence).endswith("; 1 serious finding")


def test_a_headline_of_its_own_comes_first_and_hides_no_serious_finding() -> None:
    evidence = compare_evidence()
    evidence.headline = "What irrelevant checkpoints do."
    assert headline(evidence) == "What irrelevant checkpoints do"
    finding = Finding(code="destroyed", severity="serious", about="result", message="Gone.")
    evidence.steps = [Step(task="merge", method="merge/ties", findings=[finding])]
    assert headline(evidence) == "What irrelevant checkpoints do; 1 serious finding"
    assert "<h1>What irrelevant checkpoints do; 1 serious finding</h1>" in render(evidence)


def test_headline_compares_with_the_base_on_shared_tasks_only() -> None:
    scores = [score("base", "a", 0.5), score("result", "a", 0.7), score("result", "b", 0.1)]
    evidence = Evidence(steps=[Step(task="merge", method="merge/ties", scores=scores)])
    assert headline(evidence) == "ties: accuracy 0.700 on a, base 0.500"


def test_headline_of_one_task_without_base() -> None:
    step = Step(task="unlearn", method="unlearn/npo", scores=[score("result", "forget", 0.25)])
    assert headline(Evidence(steps=[step])) == "npo: accuracy 0.250 on forget"


def test_headline_of_two_steps_names_both_and_takes_the_last_scores() -> None:
    first = Step(task="merge", method="merge/ties", scores=[score("result", "a", 0.4)])
    second = Step(task="prune", method="prune/wanda", scores=[score("result", "a", 0.3)])
    evidence = Evidence(steps=[first, second])
    assert headline(evidence) == "ties then wanda: accuracy 0.300 on a"


def test_headline_without_scores_or_steps() -> None:
    step = Step(task="merge", method="merge/mean", summary="Averaged 3 checkpoints.")
    assert headline(Evidence(steps=[step])) == "mean: Averaged 3 checkpoints"
    assert headline(Evidence()) == "This run: no step was recorded"


def test_headline_says_when_scores_are_not_finite() -> None:
    scores = [score("result", "a", math.nan), score("result", "b", 0.5)]
    evidence = Evidence(steps=[Step(task="merge", method="merge/ties", scores=scores)])
    assert headline(evidence) == "ties: accuracy 0.500 on b; no finite accuracy on 1 task"
    evidence.steps[0].scores = scores[:1]
    assert headline(evidence) == "ties: no finite accuracy on any of 1 task"


def test_headline_of_a_comparison() -> None:
    # Seeds' means of frank-wolfe: 0.84, 0.85, 0.86; half = 4.3027 * 0.01 / sqrt(3) = 0.02484.
    # dare has two seeds, 0.80 and 0.81: half = 12.7062 * 0.00707107 / sqrt(2) = 0.0635.
    assert headline(compare_evidence()) == (
        "frank-wolfe is best: mean accuracy 0.850 (95 % interval 0.825 to 0.875) over 4 tasks, "
        "0.045 better than the next, dare, whose interval overlaps; the base scores 0.600; "
        "1 of 15 runs failed"
    )


def test_headline_of_a_comparison_where_lower_is_better() -> None:
    rows = [
        Row(label=name, method=f"prune/{name}", scores=[perplexity("result", "wiki", value)])
        for name, value in (("wanda", 14.0), ("magnitude", 19.5))
    ]
    rows.append(Row(label="base", status="reference", scores=[perplexity("base", "wiki", 12.0)]))
    assert headline(Evidence(kind="compare", rows=rows)) == (
        "wanda is best: perplexity 14.00 (95 % interval 13.00 to 15.00) on wiki, "
        "5.500 better than the next, magnitude; no method beats the base (12.00)"
    )


def test_headline_of_level_methods_and_of_nothing_but_failures() -> None:
    rows = [row("ties", 0, {"a": 0.5}), row("dare", 0, {"a": 0.5001})]
    assert headline(Evidence(kind="compare", rows=rows)).startswith("dare and ties are level:")
    failed = [row("ties", 0, {}, status="failed"), row("dare", 0, {}, status="failed")]
    assert headline(Evidence(kind="compare", rows=failed)) == "All 2 runs failed"


def test_scores_read_in_opposite_directions_are_never_averaged() -> None:
    scores = [
        score("result", "forget", 0.1, higher_is_better=False),
        score("result", "retain", 0.8),
        score("base", "forget", 0.9, higher_is_better=False),
        score("base", "retain", 0.9),
    ]
    step = Step(task="unlearn", method="unlearn/npo", scores=scores)
    assert headline(Evidence(steps=[step])) == (
        "npo: accuracy (lower is better) 0.100 on forget, base 0.900; accuracy 0.800 on retain, base 0.900"
    )
    rows = [
        Row(label=name, method=f"unlearn/{name}", scores=[
            score("result", "forget", forget, higher_is_better=False, low=forget, high=forget),
            score("result", "retain", retain),
        ])
        for name, forget, retain in (("npo", 0.1, 0.8), ("ascent", 0.0, 0.2))
    ]  # fmt: skip
    assert headline(Evidence(kind="compare", rows=rows)) == (
        "ascent is best: accuracy (lower is better) 0.000 (95 % interval 0.000 to 0.000) on "
        "forget, 0.100 better than the next, npo; where higher is better it scores 0.200"
    )
    assert 'data-metric="accuracy (lower is better)"' in render(Evidence(steps=[step]))


def test_headline_when_only_the_base_was_scored() -> None:
    step = Step(task="merge", method="merge/ties", scores=[score("base", "a", 0.5)])
    assert headline(Evidence(steps=[step])) == "ties: only base was scored: accuracy 0.500 on a"


def test_a_method_without_every_task_is_not_ranked() -> None:
    rows = [row("ties", 0, {"a": 0.9}), row("dare", 0, {"a": 0.5, "b": 0.5})]
    evidence = Evidence(kind="compare", rows=rows)
    assert headline(evidence).startswith("dare: mean accuracy 0.500")
    page = render(evidence)
    assert "for want of a finite score on every task: ties." in page
    assert "1 of 2 tasks" in page


def test_methods_that_differ_by_very_little_are_told_apart() -> None:
    rows = [
        Row(label=name, method=f"prune/{name}", scores=[perplexity("result", "wiki", value)])
        for name, value in (("wanda", 2.0), ("magnitude", 2.0 + 2**-13))
    ]
    assert "wanda is best" in headline(Evidence(kind="compare", rows=rows))
    assert "1.22e−04 better than the next" in headline(Evidence(kind="compare", rows=rows))
