"""Methods for language models: their mathematics on numbers, and what they do to invented people.

The official code of FLAT is held to by `tests/fixtures/flat.json`: outputs of two functions for fixed
inputs. Its reverse KL and squared Hellinger are ours at negated probabilities, its Neyman in the template's
term: that is its error of sign, which the paper does not have.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from germane.core.errors import SettingError
from germane.core.evidence import Step
from germane.core.models import load_model
from germane.core.objective import Task
from germane.core.records import Data, read_rows
from germane.method import build
from germane.recipe import run_task
from germane.tasks.unlearn._templates import prompt_and_answer
from germane.tasks.unlearn._unlearner import Work
from germane.tasks.unlearn.flat import DIVERGENCES, adjusted_loss, answer_probability
from germane.tasks.unlearn.npo import preference_loss, sequence_log_probabilities
from germane.tasks.unlearn.task_vector import negated
from germane.tasks.unlearn.whp import combined

FIXTURES = json.loads((Path(__file__).parent.parent / "fixtures" / "flat.json").read_text())
UNKNOWN = " i do not know"  # the refusal that the tiny model's tokenizer has the words of

OFFICIAL = {
    "total-variation": "Total-Variation",
    "kl": "KL",
    "jensen-shannon": "Jenson-Shannon",
    "pearson": "Pearson",
    "jeffrey": "Jeffrey",
}


def work_on(facts, folder: Path, records: str = "forget", seed: int = 0) -> Work:
    """The tiny model and some of its records, as the task hands them to a method."""

    def read(file: Path) -> Task:
        data = Data(name="records", path=str(file))
        return Task(data, read_rows(data), loaded.model, loaded.processor, split=True)

    loaded = load_model(str(facts.model))
    folder.mkdir(parents=True)
    return Work(
        loaded, read(facts.files[records]), read(facts.files["retain"]),
        lambda: load_model(str(facts.model)), "", seed,
        Step(task="unlearn", method="none"), folder,
    )  # fmt: skip


def unlearn(facts, name: str, folder: Path, records: str = "", **settings) -> dict[tuple[str, str], float]:
    """Scores by subject and metric of one trial with a budget of a tenth."""
    asked = {
        "model": str(facts.model), "retrained": str(facts.retrained), "trials": 1, "budget": 0.1,
        "forget": str(facts.files["forget" + records]), "retain": str(facts.files["retain" + records]),
    }  # fmt: skip
    result = run_task("unlearn", name, asked, settings, folder / "out", seed=7)
    return {(score.subject, score.metric): score.value for score in result.scores}


def share_of_the_way(scores: dict[tuple[str, str], float]) -> float:
    """How far memory went from the untouched model's to the retrained model's: 0 to 1."""
    before, after = scores["base", "memory"], scores["result", "memory"]
    return (before - after) / (before - scores["retrained", "memory"])


class TestPreference:
    def test_loss_by_hand(self):
        now, before = np.array([-3.0, -12.5, -0.25]), np.array([-2.0, -4.5, -6.0])
        sigmoids = 1 / (1 + np.exp(0.1 * (now - before)))
        ours = preference_loss(torch.tensor(now), torch.tensor(before), 0.1)
        assert float(ours) == pytest.approx(-2 / 0.1 * np.log(sigmoids).mean(), rel=1e-12)

    @pytest.mark.parametrize(("beta", "distance"), [(1e-1, 0.4), (1e-3, 4e-3), (1e-6, 4e-6)])
    def test_gradient_tends_to_that_of_gradient_ascent(self, beta, distance):
        now = torch.tensor([-3.0, -12.5, -0.25], dtype=torch.float64, requires_grad=True)
        before = torch.tensor([-2.0, -4.5, -6.0], dtype=torch.float64)
        (gradient,) = torch.autograd.grad(preference_loss(now, before, beta), now)
        assert (gradient - 1 / 3).abs().max() < distance

    def test_a_forgotten_record_no_longer_pushes(self):
        now = torch.tensor([-1.0, -200.0], requires_grad=True)
        (gradient,) = torch.autograd.grad(preference_loss(now, torch.tensor([-1.0, -1.0]), 0.1), now)
        assert gradient[0] == pytest.approx(0.5)
        assert gradient[1] < 1e-6

    def test_log_probabilities_are_of_whole_sequences(self, facts, tmp_path):
        task = work_on(facts, tmp_path / "work").forget
        batch = next(task.batches(3))
        with torch.no_grad():
            ours = sequence_log_probabilities(task, batch)
            logits = task.logits(batch).double().numpy()
        labels = batch["labels"].numpy()
        for row in range(3):
            total = 0.0
            for place in range(1, labels.shape[1]):
                if labels[row, place] != -100:
                    scores = logits[row, place - 1]
                    total += scores[labels[row, place]] - np.log(np.exp(scores).sum())
            assert float(ours[row]) == pytest.approx(total, rel=1e-5)

    def test_the_reference_is_the_untouched_model_record_by_record(self, facts, tmp_path):
        work, method = work_on(facts, tmp_path / "work"), build("unlearn/npo", {"batch_size": 3})
        method.begin(work)
        pair = next(method.pairs(work, 0))
        assert float(method.forgetting(work, pair).detach()) == pytest.approx(2 / 0.1 * np.log(2), rel=1e-5)

    def test_it_forgets_like_a_retrained_model_and_keeps_the_rest(self, facts, tmp_path):
        scores = unlearn(facts, "npo", tmp_path, learning_rate=3e-4, regulariser="gdr")
        assert share_of_the_way(scores) > 0.4
        assert scores["result", "utility"] > 0.9 * scores["base", "utility"]


class TestFlat:
    # g*(1/2) and f*(g*(1/2)), worked out by hand
    AT_A_HALF = {
        "total-variation": (0.2310586, 0.2310586),
        "kl": (0.5, 0.6065307),
        "jensen-shannon": (0.2190702, 0.2809298),
        "pearson": (0.5, 0.5625),
        "jeffrey": (0.5, 0.5703125),
        "reverse-kl": (-0.6065307, -0.5),
        "squared-hellinger": (0.3934693, 0.6487213),
        "neyman": (0.3934693, 0.4423984),
    }
    # the convex functions that define the divergences
    GENERATORS = {
        "total-variation": lambda u: np.abs(u - 1) / 2,
        "kl": lambda u: u * np.log(u),
        "jensen-shannon": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
        "pearson": lambda u: (u - 1) ** 2,
        "jeffrey": lambda u: (u - 1) * np.log(u),
        "reverse-kl": lambda u: -np.log(u),
        "squared-hellinger": lambda u: (np.sqrt(u) - 1) ** 2,
        "neyman": lambda u: (1 - u) ** 2 / u,
    }

    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_functions_on_numbers(self, name):
        half = torch.tensor(0.5)
        values = [float(function(half)) for function in DIVERGENCES[name]]
        assert values == pytest.approx(self.AT_A_HALF[name], abs=1e-6)

    @pytest.mark.parametrize("name", DIVERGENCES)
    @pytest.mark.parametrize("value", [0.05, 0.4, 0.95])
    def test_the_second_is_the_convex_conjugate_of_the_first(self, name, value):
        best, composed = (float(f(torch.tensor(value, dtype=torch.float64))) for f in DIVERGENCES[name])
        ratios = np.geomspace(1e-4, 1e4, 400_001)
        conjugate = (ratios * best - self.GENERATORS[name](ratios)).max()
        # of Jeffrey there is only a series of three terms
        assert composed == pytest.approx(conjugate, abs=0.02 * value**3 if name == "jeffrey" else 1e-6)

    @pytest.mark.parametrize("name", DIVERGENCES)
    def test_templates_become_likelier_and_forget_answers_unlikelier(self, name):
        template, forget = (torch.tensor(value, requires_grad=True) for value in (0.3, 0.6))
        raise_it, lower_it = torch.autograd.grad(adjusted_loss(template, forget, name), (template, forget))
        assert raise_it < 0 < lower_it

    @pytest.mark.parametrize("name", OFFICIAL)
    def test_equals_the_official_loss(self, name):
        item = FIXTURES["get_contrastive_loss"]
        for (template, forget), theirs in zip(
            item["inputs"]["points"], item["outputs"][OFFICIAL[name]], strict=True
        ):
            ours = adjusted_loss(torch.tensor(template), torch.tensor(forget), name)
            assert float(ours) == pytest.approx(theirs, abs=1e-5)

    def test_differs_from_the_official_loss_by_its_error_of_sign(self):
        item = FIXTURES["get_contrastive_loss"]
        outputs = item["outputs"]
        for index, point in enumerate(item["inputs"]["points"]):
            template, forget = torch.tensor(point)
            for ours, theirs in (("reverse-kl", "Reverse-KL"), ("squared-hellinger", "Squared-Hellinger")):
                negative = adjusted_loss(-template, -forget, ours)
                assert float(negative) == pytest.approx(outputs[theirs][index], abs=1e-5)
            best, _ = DIVERGENCES["neyman"]
            neyman = 2 - 2 * (1 - forget).sqrt() - best(-template)
            assert float(neyman) == pytest.approx(outputs["Neyman"][index], abs=1e-5)

    def test_probabilities_equal_the_official_ones_where_something_is_predicted(self):
        inputs = FIXTURES["ProbLossStable"]["inputs"]
        theirs = [-v for v in FIXTURES["ProbLossStable"]["outputs"]["losses"]]
        logits, targets = torch.tensor(inputs["logits"]), torch.tensor(inputs["labels"])
        labels = torch.cat((torch.tensor([-100]), targets))  # a position predicts the label after it
        ours = answer_probability(torch.cat((logits, torch.zeros(1, 5)))[None], labels[None])
        answered = sum(theirs) / int((targets != -100).sum())
        assert float(ours) == pytest.approx(answered, abs=1e-5)
        assert float(ours) != pytest.approx(sum(theirs) / len(theirs), abs=1e-2)  # their dilution

    def test_prompt_and_padding_do_not_dilute(self):
        sure, even = [0.0, 20.0], [0.0, 0.0]
        logits = torch.tensor([[even, sure, even, even], [sure, sure, even, sure]])
        labels = torch.tensor([[-100, -100, 1, 1], [-100, -100, 1, -100]])
        # of the first record probabilities 1 and 1/2 count, of the second 1
        assert float(answer_probability(logits, labels)) == pytest.approx((0.75 + 1) / 2, abs=1e-6)

    def test_half_precision_logits_get_a_softmax_in_float32(self):
        logits = torch.zeros(1, 2, 40_000, dtype=torch.bfloat16)
        value = answer_probability(logits, torch.tensor([[-100, 7]]))
        assert value.dtype == torch.float32
        assert float(value) == pytest.approx(1 / 40_000, rel=1e-5)

    @pytest.mark.parametrize("records", ["", "-texts"])
    def test_it_forgets_with_forget_records_only(self, facts, tmp_path, records):
        settings = {"learning_rate": 3e-4, "epochs": 10, "accumulate": 1, "warmup": 0}
        scores = unlearn(facts, "flat", tmp_path, records, templates=[UNKNOWN], **settings)
        assert share_of_the_way(scores) > 0.3
        assert scores["result", "utility"] > 0.85 * scores["base", "utility"]


class TestTemplates:
    def batches(self, facts, folder, epoch, records="forget", seed=0):
        work = work_on(facts, folder, records, seed)
        method = build("unlearn/flat", {"templates": [UNKNOWN, " no", " not true"], "batch_size": 3})
        method.begin(work)
        return work, list(method.pairs(work, epoch))

    def drawn(self, facts, folder, epoch, seed=0):
        _, pairs = self.batches(facts, folder, epoch, seed=seed)
        found = {}
        for pair in pairs:
            for row, labels in zip(pair.forget_rows, pair.template["labels"].tolist(), strict=True):
                found[row] = tuple(label for label in labels if label != -100)
        return found

    def test_a_record_gets_its_prompt_and_a_template(self, facts, tmp_path):
        work, pairs = self.batches(facts, tmp_path / "work", 0)
        words = work.forget.tokenizer
        for pair in pairs:
            for row, tokens, labels in zip(
                pair.forget_rows, pair.template["input_ids"], pair.template["labels"], strict=True
            ):
                prompt, _ = prompt_and_answer(work.forget.rows[row])
                assert tokens[: len(prompt)].tolist() == prompt
                answer = words.decode([label for label in labels.tolist() if label != -100])
                assert answer in {"i do not know <eos>", "no <eos>", "not true <eos>"}
                assert (labels[: len(prompt)] == -100).all()

    def test_templates_are_drawn_afresh_for_each_record_and_epoch(self, facts, tmp_path):
        first, again, second, other = (
            self.drawn(facts, tmp_path / str(number), epoch, seed)
            for number, (epoch, seed) in enumerate([(0, 0), (0, 0), (1, 0), (0, 1)])
        )
        assert first == again
        assert len(set(first.values())) == 3
        assert first != second
        assert first != other

    def test_of_a_text_the_second_half_is_the_answer(self, facts, tmp_path):
        work, pairs = self.batches(facts, tmp_path / "work", 0, "forget-texts")
        for pair in pairs:
            for row, labels in zip(pair.forget_rows, pair.forget["labels"], strict=True):
                tokens = work.forget.rows[row]["input_ids"]
                half = len(tokens) // 2
                assert (labels[:half] == -100).all()
                assert labels[half : len(tokens)].tolist() == tokens[half:]

    def test_an_empty_template_is_refused(self, facts, tmp_path):
        method = build("unlearn/refusal", {"templates": [UNKNOWN, "  "]})
        with pytest.raises(SettingError, match="'  ' holds no tokens"):
            method.begin(work_on(facts, tmp_path / "work"))

    def test_refusal_makes_the_refusal_likely_and_the_records_unlikely(self, facts, tmp_path):
        settings = {"learning_rate": 3e-4, "templates": [UNKNOWN]}
        scores = unlearn(facts, "refusal", tmp_path, **settings)
        assert share_of_the_way(scores) > 0.25
        assert scores["result", "utility"] > 0.9 * scores["base", "utility"]
        work = work_on(facts, tmp_path / "work")
        method = build("unlearn/refusal", settings)
        method.begin(work)
        pair = next(method.pairs(work, 0))
        before = float(method.loss(work, pair).detach())
        work.forget.model = load_model(str(tmp_path / "out")).model
        assert float(method.loss(work, pair).detach()) < 0.8 * before


class TestTaskVector:
    SETTINGS = {"learning_rate": 1e-3, "epochs": 2}

    def weights(self, facts, folder, alpha):
        work = work_on(facts, folder)
        build("unlearn/task-vector", {**self.SETTINGS, "alpha": alpha}).unlearn(work)
        return dict(work.model.named_parameters())

    def test_on_numbers(self):
        before, overfit = torch.tensor([1.0, -2.0]), torch.tensor([1.5, -4.0])
        assert negated(before, overfit, 2.0).tolist() == [0.0, 2.0]

    def test_small_differences_of_bfloat16_are_kept(self):
        before = torch.tensor([256.0], dtype=torch.bfloat16)
        overfit = torch.tensor([258.0], dtype=torch.bfloat16)
        assert negated(before, overfit, 0.25).tolist() == [255.5]

    def test_alpha_of_nought_is_the_model_itself(self, facts, tmp_path):
        untouched = dict(load_model(str(facts.model)).model.named_parameters())
        for name, tensor in self.weights(facts, tmp_path / "work", 0.0).items():
            assert torch.equal(tensor, untouched[name]), name

    def test_weights_are_linear_in_alpha(self, facts, tmp_path):
        untouched = dict(load_model(str(facts.model)).model.named_parameters())
        one, three = (self.weights(facts, tmp_path / str(a), a) for a in (1.0, 3.0))
        for name, start in untouched.items():
            torch.testing.assert_close(three[name] - start, 3 * (one[name] - start), atol=1e-5, rtol=0)
        assert any(not torch.equal(one[name], start) for name, start in untouched.items())

    def test_the_copy_is_trained_once_for_all_strengths(self, facts, tmp_path):
        work = work_on(facts, tmp_path / "work")
        method = build("unlearn/task-vector", {**self.SETTINGS, "alpha": 1.0})
        method.unlearn(work)
        fresh = work_on(facts, tmp_path / "fresh")
        fresh.scratch = work.scratch
        method.stronger(3.0).unlearn(fresh)
        assert len(work.step.plots) == 1
        assert not fresh.step.plots
        expected = self.weights(facts, tmp_path / "other", 3.0)
        assert all(torch.equal(p, expected[n]) for n, p in fresh.model.named_parameters())

    def test_it_forgets(self, facts, tmp_path):
        scores = unlearn(facts, "task-vector", tmp_path, learning_rate=1e-4)
        assert share_of_the_way(scores) > 0.1
        assert scores["result", "utility"] > 0.9 * scores["base", "utility"]


class TestWHP:
    def test_what_reinforcement_raised_is_taken_away(self):
        untouched, reinforced = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.5, 5.0])
        assert combined(untouched, reinforced, 2.0).tolist() == [1.0, 1.0, -1.0]

    def test_without_alpha_the_target_is_the_model_itself(self, facts, tmp_path):
        work, method = work_on(facts, tmp_path / "work"), build("unlearn/whp", {"alpha": 0.0})
        method.begin(work)
        assert float(method.loss(work, next(method.pairs(work, 0))).detach()) == pytest.approx(0, abs=1e-6)

    def test_it_forgets_and_is_one_plain_model(self, facts, tmp_path):
        settings = {"learning_rate": 3e-4, "epochs": 10, "reinforcement_rate": 1e-3}
        scores = unlearn(facts, "whp", tmp_path, **settings)
        assert share_of_the_way(scores) > 0.15
        assert scores["result", "utility"] > 0.9 * scores["base", "utility"]
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_every_entry_says_where_it_comes_from():
    for name, item in FIXTURES.items():
        assert {"repository", "commit", "call", "inputs", "outputs"} <= item.keys(), name
