"""The model card is one the hub's own classes read."""

from pathlib import Path

from huggingface_hub import ModelCard

from germane.core.card import write_card
from germane.core.evidence import Evidence, Score, Share, Step


def evidence() -> Evidence:
    made = Evidence.begin("mine", {"steps": [{"task": "merge"}]})
    scores = [
        Score(subject=subject, task=task, metric="accuracy", value=value, n=100, low=value - 0.1, high=value + 0.1)
        for subject, task, value in (("result", "news", 0.8), ("base", "news", 0.5), ("result", "mail", 0.75))
    ]  # fmt: skip
    shares = [Share(member="a|b", share=1.0, taken=True, reason="chosen in round 1")]
    made.steps.append(
        Step(task="merge", method="merge/ties", paper="2306.01708", scores=scores, shares=shares)
    )
    return made


def test_card_is_read_by_the_hub_with_its_results(tmp_path: Path):
    write_card(evidence(), tmp_path, {"license": "apache-2.0", "tags": ["mine"]})
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.license == "apache-2.0"
    assert {"germane", "merge", "mine"} <= set(data.tags)
    found = {result.dataset_name: result.metric_value for result in data.eval_results}
    assert found == {"news": 0.8, "mail": 0.75}


def test_card_names_only_bases_the_hub_knows(tmp_path: Path):
    made = evidence()
    made.steps[0].job = {"base": str(tmp_path), "pool": ["owner/model"]}
    write_card(made, tmp_path, {})
    assert ModelCard.load(tmp_path / "README.md").data.base_model == ["owner/model"]
