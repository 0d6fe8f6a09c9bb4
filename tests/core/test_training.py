from itertools import pairwise

import pytest
import torch
import zoo
from torch import nn

from germane.core.errors import SettingError
from germane.core.training import Diverged, Hooks, Training, finish, fit, prepare


def line() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    return model


def run(model, settings, values, steps=None, hooks=None, loss=None):
    def batches(epoch):
        return values

    return fit(
        model, settings, batches, steps or len(values),
        loss or (lambda x: (model(torch.tensor([[x]])) ** 2).sum()), hooks,
    )  # fmt: skip


def test_sgd_by_hand():
    # loss w^2 x^2 at x = 1: gradient 2 w; w = 1, then 0.8, then 0.64
    model = line()
    settings = Training(optimiser="sgd", momentum=0, learning_rate=0.1, epochs=1)
    history = run(model, settings, [1.0, 1.0])
    assert model.weight.item() == pytest.approx(0.64)
    assert history.losses == pytest.approx([1.0, 0.64])


def test_accumulated_batches_make_one_step_of_their_mean():
    # gradients 2 and 8, mean 5: one step of 0.1 leads to 0.5
    model = line()
    settings = Training(optimiser="sgd", momentum=0, learning_rate=0.1, epochs=1, accumulate=2)
    run(model, settings, [1.0, 2.0])
    assert model.weight.item() == pytest.approx(0.5)


def test_what_is_left_over_makes_a_step_too():
    model = line()
    settings = Training(optimiser="sgd", momentum=0, learning_rate=0.1, epochs=1, accumulate=2)
    seen = []
    run(model, settings, [1.0, 1.0, 1.0], hooks=Hooks(after_step=lambda: seen.append(model.weight.item())))
    assert len(seen) == 2


def test_a_long_gradient_is_shortened():
    model = line()
    settings = Training(optimiser="sgd", momentum=0, learning_rate=0.1, epochs=1, clip=0.5)
    run(model, settings, [1.0])
    assert model.weight.item() == pytest.approx(1 - 0.1 * 0.5, abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_it_with_the_weights_before(bad):
    model = line()
    settings = Training(optimiser="sgd", momentum=0, learning_rate=0.1, epochs=2)
    with pytest.raises(Diverged, match=r"the loss became (nan|inf) in epoch 1, batch 2"):
        run(model, settings, [1.0, bad])
    assert model.weight.item() == pytest.approx(0.8)


def test_a_gradient_that_is_not_finite_ends_it_too():
    model = line()

    def loss(x):
        return (model.weight - 1).abs().sqrt().sum()  # 0 at w = 1, with an infinite slope

    with pytest.raises(Diverged, match="the gradient became"):
        run(model, Training(epochs=1), [1.0], loss=loss)
    assert model.weight.item() == 1.0


def test_an_epoch_can_be_the_last():
    model, seen = line(), []
    settings = Training(optimiser="sgd", momentum=0, learning_rate=0.1, epochs=5)
    run(model, settings, [1.0], hooks=Hooks(after_epoch=lambda epoch: seen.append(epoch) or epoch == 2))
    assert seen == [1, 2]


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_schedules(schedule, factors):
    model = line()
    seen = [1.0]
    settings = Training(optimiser="sgd", momentum=0, learning_rate=0.1, epochs=1, schedule=schedule)
    hooks = Hooks(after_step=lambda: seen.append(model.weight.item()))
    run(model, settings, [1.0] * 4, hooks=hooks, loss=lambda x: model.weight.sum())
    steps = [(a - b) / 0.1 for a, b in pairwise(seen)]
    assert steps == pytest.approx(factors, abs=1e-5)


def test_adapters_are_folded_into_a_plain_model(tmp_path):
    model = zoo.transformers.LlamaForCausalLM(zoo.llama_config()).eval()
    tokens = torch.tensor([[5, 6, 7]])
    names = set(model.state_dict())
    wrapped = prepare(model, Training(lora_rank=2))
    settings = Training(learning_rate=0.05, epochs=1)
    fit(wrapped, settings, lambda _: [0, 1], 2, lambda _: -model(input_ids=tokens).logits[0, -1, 9])
    inside = model(input_ids=tokens).logits
    plain = finish(wrapped)
    assert set(plain.state_dict()) == names
    torch.testing.assert_close(plain(input_ids=tokens).logits, inside, atol=1e-5, rtol=1e-4)


def test_recomputing_activations_changes_nothing():
    results = []
    for again in (False, True):
        torch.manual_seed(0)
        model = zoo.transformers.LlamaForCausalLM(zoo.llama_config())
        settings = Training(gradient_checkpointing=again, epochs=1, learning_rate=1e-2)
        wrapped = prepare(model, settings).train()
        fit(
            wrapped, settings, lambda _: [0], 1,
            lambda _, model=model: model(input_ids=torch.tensor([[5, 6, 7]])).logits.square().mean(),
        )  # fmt: skip
        results.append(finish(wrapped).state_dict())
    assert all(torch.allclose(results[0][n], results[1][n], atol=1e-6) for n in results[0])


def test_a_model_that_cannot_recompute_says_so(digits_model):
    with pytest.raises(SettingError, match="gradient_checkpointing"):
        prepare(digits_model, Training(gradient_checkpointing=True))


@pytest.fixture
def digits_model():
    from germane.core.rows import RowClassifier, RowConfig

    return RowClassifier(RowConfig(features=["a", "b"], num_labels=2))
