"""What holds on to the rest while a model forgets."""

import math

import pytest
import torch
from safetensors.torch import load_file

from germane.core.errors import SettingError
from germane.core.training import Diverged
from germane.recipe import run_task
from germane.tasks.unlearn._regulariser import divergence
from germane.tasks.unlearn.gradient_ascent import GradientAscent


def test_divergence_by_hand():
    # before (1/2, 1/2), after (1/4, 3/4): 1/2 log 2 + 1/2 log(2/3)
    before, after = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, math.log(3)]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert divergence(before, after, None).item() == pytest.approx(expected)


def test_divergence_counts_only_what_is_predicted():
    before, after = torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)
    after[0, 0] = torch.tensor([0.0, 9.0])  # a position of the prompt
    after[0, 1] = torch.tensor([0.0, math.log(3)])
    batch = {"labels": torch.tensor([[-100, -100, 1]])}
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert divergence(before, after, batch).item() == pytest.approx(expected)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("regulariser", ["gdr", "klr"])
def test_with_a_hold_more_of_the_rest_is_kept(regulariser, rank, facts, tmp_path):
    def utility(name: str, out: str) -> float:
        settings = {
            "regulariser": name, "learning_rate": 1e-3 if rank == 0 else 1e-2, "epochs": 4,
            "lora_rank": rank,
        }  # fmt: skip
        arguments = {
            "model": str(facts.model), "forget": str(facts.files["forget"]),
            "retain": str(facts.files["retain"]), "trials": 0,
        }  # fmt: skip
        result = run_task("unlearn", "gradient-ascent", arguments, settings, tmp_path / out)
        return next(s.value for s in result.scores if (s.subject, s.metric) == ("result", "utility"))

    assert utility(regulariser, "held") > utility("none", "free") + (0 if rank else 0.02)


def test_a_hold_without_records_to_keep_is_refused(facts, tmp_path):
    arguments = {"model": str(facts.model), "forget": str(facts.files["forget"]), "trials": 0}
    with pytest.raises(SettingError, match="--retain"):
        run_task("unlearn", "gradient-ascent", arguments, {"regulariser": "klr"}, tmp_path / "out")


class TestDivergence:
    """A loss that becomes NaN."""

    @staticmethod
    def run(facts, tmp_path, monkeypatch, bad_epoch):
        loss = GradientAscent.forgetting
        calls = []

        def failing(self, work, pair):
            calls.append(1)
            value = loss(self, work, pair)
            return value * float("nan") if len(calls) > (bad_epoch - 1) * 2 else value

        monkeypatch.setattr(GradientAscent, "forgetting", failing)
        asked = {
            "model": str(facts.model), "forget": str(facts.files["forget"]),
            "retain": str(facts.files["retain"]), "trials": 1, "budget": 0.5,
        }  # fmt: skip
        settings = {"epochs": 5, "batch_size": 4, "learning_rate": 1e-4}
        return run_task("unlearn", "gradient-ascent", asked, settings, tmp_path / "out")

    def test_the_best_epoch_before_it_is_kept_and_the_step_is_said(self, facts, tmp_path, monkeypatch):
        result = self.run(facts, tmp_path, monkeypatch, bad_epoch=3)
        (finding,) = [f for f in result.findings if f.code == "diverged"]
        assert "epoch 3, batch 1" in finding.message
        scores = {(s.subject, s.metric): s.value for s in result.scores}
        assert scores["result", "memory"] < scores["base", "memory"]
        weights = load_file(result.folder / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values())

    def test_without_a_good_epoch_there_is_an_error_and_no_result(self, facts, tmp_path, monkeypatch):
        with pytest.raises(Diverged, match="epoch 1, batch 1"):
            self.run(facts, tmp_path, monkeypatch, bad_epoch=1)
        assert not (tmp_path / "out").exists()
