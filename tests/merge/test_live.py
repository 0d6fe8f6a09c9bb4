"""The methods that move a model in memory: gradients, oracle, steps and coefficients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers
import zoo
from zoo import merge, weights

from germane.core.evidence import Step
from germane.core.records import Data
from germane.tasks.merge._live import Live, Memory, optimise_coefficients
from germane.tasks.merge._pool import open_pool
from germane.tasks.merge._stream import Stream
from germane.tasks.merge.frank_wolfe import FrankWolfe, _Search


@pytest.fixture
def pool(llama):
    return open_pool(str(llama.base), [str(member) for member in llama.members])


@pytest.fixture
def live(llama, pool):
    return Live(pool, [Data.model_validate(llama.data)])


@pytest.fixture
def heads(bert):
    """A pool whose members have heads, and the model that reads both tasks."""
    pool = open_pool(str(bert.base), [str(member) for member in bert.members])
    return pool, Live(pool, [Data.model_validate(item) for item in bert.data])


def token_rows(llama) -> torch.Tensor:
    return torch.tensor([zoo.tokenizer()(row["text"])["input_ids"] + [3] for row in llama.rows])


def plain_gradient(folder, tokens) -> tuple[dict[str, torch.Tensor], float]:
    """Gradient and loss by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()}, float(loss.detach())


def test_loss_and_gradient_are_those_of_transformers(live, llama):
    losses = live.gradient("cross-entropy")
    gradient, loss = plain_gradient(llama.base, token_rows(llama))
    assert losses == {"count": pytest.approx(loss, rel=1e-5)}
    assert live.loss("cross-entropy") == {"count": pytest.approx(loss, rel=1e-5)}
    assert live.gradients.keys() == gradient.keys()
    for name in gradient:
        torch.testing.assert_close(live.gradients[name], gradient[name], atol=1e-6, rtol=1e-4)


def test_a_second_gradient_does_not_add_to_the_first(live):
    live.gradient("cross-entropy")
    first = {n: g.clone() for n, g in live.gradients.items()}
    live.gradient("cross-entropy")
    assert all(torch.equal(first[n], live.gradients[n]) for n in first)


def test_entropy_is_that_of_the_softmax(live, llama):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.base, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=token_rows(llama)).logits[:, :-1]
    expected = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert live.loss("entropy")["count"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_scores_against_autograd(granularity, live, llama, pool):
    """Away from the base: the way to a member is from where the model is now."""
    here = {n: w + 0.3 * (weights(llama.members[1])[n] - w) for n, w in live.weights.items()}
    for name, values in here.items():
        live.weights[name].copy_(values)
    live.gradient("cross-entropy")
    gradient = {n: g.double() for n, g in live.gradients.items()}
    members = [weights(folder) for folder in [*llama.members, llama.base]]
    names = [info.name for info in live.tensors]
    for score in ("inner", "cosine", "direction"):
        ours = search_on(live, pool, score=score, granularity=granularity).scores().numpy()
        for row, member in enumerate(members):
            w = {n: member[n].double() for n in names}
            way = {n: w[n] - here[n].double() for n in names}
            slope = np.array([float((gradient[n] * way[n]).sum()) for n in names])
            if score == "inner":
                expected = slope
            elif score == "cosine":
                expected = [
                    float((gradient[n] * w[n]).sum() / gradient[n].norm() / w[n].norm()) for n in names
                ]
            elif granularity == "layer":
                expected = [
                    s / float(gradient[n].norm() * way[n].norm()) for s, n in zip(slope, names, strict=True)
                ]
            else:
                norms = [sum(float(m[n].square().sum()) for n in names) ** 0.5 for m in (gradient, way)]
                expected = slope / norms[0] / norms[1]
            np.testing.assert_allclose(ours[row], expected, rtol=1e-3, atol=2e-5)


def test_tasks_share_the_backbone_and_its_gradient(heads):
    _, live = heads
    two, three = (dict(task.model.bert.named_parameters()) for task in live.tasks)
    assert all(two[n].data_ptr() == three[n].data_ptr() for n in two)
    live.gradient("cross-entropy")
    both = {n: g.clone() for n, g in live.gradients.items()}
    parts = []
    for task in live.tasks:
        live.gradient("cross-entropy", [task])
        parts.append({n: g.clone() for n, g in live.gradients.items()})
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, (parts[0][name] + parts[1][name]) / 2, atol=1e-6, rtol=1e-4)
    assert {task.model.config.num_labels for task in live.tasks} == {2, 3}


def test_heads_do_not_move(heads, bert):
    pool, live = heads
    live.update(lambda block: block.base + block.deltas[0], Stream(pool.base, pool.members, live.tensors))
    for task, folder in zip(live.tasks, bert.members, strict=True):
        assert torch.equal(task.model.classifier.weight, weights(folder)["classifier.weight"])
    own = weights(bert.members[0])
    name = "encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(live.weights[name], own[f"bert.{name}"])


# The coefficients of AdaMerging and of the soft variant.


@pytest.mark.parametrize("per_tensor", [True, False])
def test_the_gradient_of_the_coefficients_is_autograds(per_tensor, live, pool, llama):
    """`torch.func.functional_call` differentiates through the whole merge."""
    seen = []
    original = torch.optim.Adam.step

    def spy(self, *arguments):
        seen.append(self.param_groups[0]["params"][0].grad.clone())
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", spy)
        optimise_coefficients(
            live,
            pool.base,
            pool.members,
            0.3,
            per_tensor=per_tensor,
            steps=1,
            learning_rate=1e-3,
            batch_size=100,
            loss="entropy",
            seed=0,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.base, dtype=torch.float64).eval()
    base = {n: t.double() for n, t in weights(llama.base).items()}
    members = [weights(folder) for folder in llama.members]
    names = [info.name for info in live.tensors]
    free = torch.full((3, len(names) if per_tensor else 1), 0.3, dtype=torch.float64, requires_grad=True)
    columns = free.expand(-1, len(names))
    merged = {
        n: base[n] + sum(c * (m[n].double() - base[n]) for c, m in zip(columns[:, k], members, strict=True))
        for k, n in enumerate(names)
    }
    logits = torch.func.functional_call(model, merged, kwargs={"input_ids": token_rows(llama)}).logits[
        :, :-1
    ]
    torch.distributions.Categorical(logits=logits).entropy().mean().backward()
    np.testing.assert_allclose(seen[0].numpy(), free.grad.numpy(), atol=1e-5)
    assert free.grad.abs().max() > 1e-3


def test_coefficients_lower_the_objective_and_leave_the_model_there(live, pool, llama):
    found = []
    coefficients = optimise_coefficients(
        live,
        pool.base,
        pool.members,
        0.0,
        per_tensor=False,
        steps=15,
        learning_rate=0.05,
        batch_size=12,
        loss="cross-entropy",
        seed=0,
        on_step=lambda step, value: found.append(value),
    )
    assert found[-1] < found[0] - 0.5
    base, members = weights(llama.base), [weights(folder) for folder in llama.members]
    for column, info in enumerate(live.tensors):
        parts = zip(coefficients[:, column], members, strict=True)
        expected = base[info.name] + sum(float(c) * (m[info.name] - base[info.name]) for c, m in parts)
        torch.testing.assert_close(live.weights[info.name], expected, atol=1e-5, rtol=1e-4)
    # the first member learned these very texts
    assert coefficients[0, 0] == coefficients[:, 0].max()


def test_adamerging_lowers_the_entropy(llama, tmp_path):
    settings = {"steps": 15, "learning_rate": 0.05, "start": 0.1}
    result = merge(
        "adamerging", llama.base, llama.members, tmp_path / "out", data=[llama.data], settings=settings
    )
    values = result.evidence.steps[-1].plots[0].series[0].values
    assert len(values) == 15
    assert values[-1] < values[0]


# Frank-Wolfe.


def search_on(live, pool, **settings) -> _Search:
    search = _Search(FrankWolfe(**settings), live, pool, 0)
    search.begin()
    return search


def test_the_oracle_is_the_smallest_inner_product(live, pool, llama):
    search = search_on(live, pool)
    live.gradient("cross-entropy")
    scores = search.scores()
    gradient, _ = plain_gradient(llama.base, token_rows(llama))
    base, members = weights(llama.base), [weights(folder) for folder in llama.members]
    expected = np.array(
        [
            [float((gradient[i.name] * (m[i.name] - base[i.name])).sum()) for i in live.tensors]
            for m in members
        ]
    )
    np.testing.assert_allclose(scores[:3].numpy(), expected, atol=1e-5)
    assert not scores[3].any(), "the starting point lies where the model is"
    layer = np.vstack([expected, np.zeros(len(live.tensors))])
    assert search.choose(scores).tolist() == layer.argmin(axis=0).tolist()
    task = search_on(live, pool, granularity="task")
    assert set(task.choose(scores).tolist()) == {int(layer.sum(axis=1).argmin())} == {0}


def test_tensors_without_descent_stay(live, pool):
    search = search_on(live, pool)
    scores = torch.zeros(4, len(live.tensors), dtype=torch.float64)
    scores[:3] = 1.0
    scores[1, 2] = -1.0
    chosen = search.choose(scores)
    assert search._promising(scores, chosen).tolist() == [k == 2 for k in range(len(live.tensors))]


def test_one_round_of_the_schedule_by_hand(live, pool, llama):
    """Task-wise, the second round: gamma = 2 / (1 + 2), towards member 0 as the oracle says."""
    search = search_on(live, pool, step="schedule", granularity="task", step_size=0.5)
    assert search.round(1)
    step = 0.5 * 2 / 3
    base, first = weights(llama.base), weights(llama.members[0])
    for name, values in live.weights.items():
        torch.testing.assert_close(
            values, base[name] + step * (first[name] - base[name]), atol=1e-6, rtol=1e-5
        )
    assert search.log[0].step == pytest.approx(step)
    assert search.log[0].chosen == {"m0": pytest.approx(1.0)}
    assert search.given[:, 0].tolist() == pytest.approx([step, 0, 0, 1 - step])


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_line_search_never_raises_the_loss(granularity, live, pool):
    search = search_on(live, pool, granularity=granularity)
    for number in range(4):
        if not search.round(number):
            break
    afters = [entry.after for entry in search.log]
    assert search.log[0].after < search.log[0].before - 0.5
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(afters))
    assert live.loss("cross-entropy")["count"] == pytest.approx(afters[-1], abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_shares_and_start_sum_to_one_and_rebuild_the_weights(scale, live, pool, llama):
    """With task arithmetic as the local rule the result is the convex combination the shares name."""
    search = search_on(live, pool, rounds=5, local_settings={"scale": scale})
    for number in range(5):
        search.round(number)
    given = search.given
    assert (given >= -1e-12).all()
    np.testing.assert_allclose(given.sum(dim=0).numpy(), 1)
    base, members = weights(llama.base), [weights(folder) for folder in llama.members]
    for column, info in enumerate(live.tensors):
        parts = zip(given[:, column], [*members, base], strict=True)
        expected = sum(float(share) * m[info.name] for share, m in parts)
        torch.testing.assert_close(live.weights[info.name], expected, atol=1e-5, rtol=1e-4)
    step = Step(task="merge", method="merge/frank-wolfe")
    search.report(step)
    sizes = torch.tensor([i.count for i in live.tensors], dtype=torch.float64)
    start = float((given[-1] * sizes).sum() / sizes.sum())
    assert sum(s.share for s in step.shares) + start == pytest.approx(1)
    assert [s.taken for s in step.shares] == [s.share > 0 for s in step.shares]


def test_it_stops_when_no_step_helps(live, pool):
    """A pool of the base moved uphill only: nothing is taken, and the weights stay."""
    live.gradient("cross-entropy")
    uphill = {n: (live.weights[n] + 0.05 * g / g.norm()) for n, g in live.gradients.items()}
    before = {n: w.clone() for n, w in live.weights.items()}
    search = search_on(live, pool)
    search.candidates = [Memory("up", uphill), Memory("start", before)]
    search.labels = ["up", "start"]
    search.given = torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat(1, len(live.tensors))
    assert not search.round(0)
    assert all(torch.equal(before[n], live.weights[n]) for n in before)
    assert search.given[0].sum() == 0


def test_the_start_brings_back_what_was_ruined(llama, tmp_path):
    """Start from the sum of a pool scaled far too much: the merge of all is a candidate, so is no harm."""
    settings = {"start": "merge", "local_settings": {"scale": 1.0}, "rounds": 4}
    merge("frank-wolfe", llama.base, llama.members, tmp_path / "out", data=[llama.data], settings=settings)
    ruined = merge("task-arithmetic", llama.base, llama.members, tmp_path / "sum", settings={"scale": 1.0})
    assert zoo.language_loss(tmp_path / "out", llama.rows) < zoo.language_loss(ruined.folder, llama.rows)


def test_soft_coefficients_stay_on_the_simplex(heads):
    pool, live = heads
    search = search_on(live, pool, variant="soft", inner_steps=4, learning_rate=0.2)
    for number in range(2):
        search.soft_round(number)
        assert (search.given >= -1e-9).all()
        np.testing.assert_allclose(search.given.sum(dim=0).numpy(), 1)


def test_soft_takes_another_vertex_for_each_task(heads):
    pool, live = heads
    search = search_on(live, pool, variant="soft", inner_steps=0, granularity="task", constraint="free")
    search.soft_round(0)
    assert set(search.log[0].chosen) == {"two", "three"}
    assert search.given[:, 0].tolist() == pytest.approx([0.3, 0.3, 0.4])


@pytest.mark.parametrize(
    "settings",
    [
        {"local": "slerp"},
        {"local": "frank-wolfe"},
        {"local": "tise"},
        {"local": "ties", "local_settings": {"densty": 0.5}},
        {"local_settings": {"weights": [1, 2, 3]}},
    ],
)
def test_a_local_rule_that_cannot_make_a_step_is_refused(settings, llama, tmp_path):
    from germane.core.errors import GermaneError

    with pytest.raises(GermaneError, match=r"local|did you mean"):
        merge(
            "frank-wolfe", llama.base, llama.members, tmp_path / "out", data=[llama.data], settings=settings
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("local", ["ties", "dare", "breadcrumbs", "average"])
def test_other_local_rules(local, llama, tmp_path):
    settings = {"local": local, "rounds": 2}
    merge("frank-wolfe", llama.base, llama.members, tmp_path / "out", data=[llama.data], settings=settings)
    assert (
        zoo.language_loss(tmp_path / "out", llama.rows) <= zoo.language_loss(llama.base, llama.rows) + 1e-6
    )


def test_a_base_that_saved_both_tied_weights(llama, tmp_path):
    """Both names are the same parameter in memory; both must come out moved, and alike."""
    import shutil

    base = shutil.copytree(llama.base, tmp_path / "base")
    zoo.rewrite(base, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()})
    result = merge(
        "frank-wolfe", base, llama.members, tmp_path / "out", data=[llama.data], settings={"rounds": 2}
    )
    ours = weights(result.folder)
    assert torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])
    assert not torch.equal(ours["lm_head.weight"], weights(base)["lm_head.weight"])
