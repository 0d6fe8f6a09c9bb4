"""A model that knows the forget records even better: what task vectors and "Who's Harry Potter" need."""

from __future__ import annotations

import random
from copy import copy

import torch

from germane.core.checkpoint import save_tensors
from germane.core.models import Loaded
from germane.core.training import Training, finish, fit, prepare
from germane.tasks.unlearn._unlearner import Work, mean_loss, plot_losses, shuffled

_FILE = "reinforced.safetensors"


def reinforce(work: Work, settings: Training) -> Loaded:
    """The untouched model, trained on the forget records until it knows them by heart.

    It stays in the scratch folder, because it is the same whatever strength is tried.
    """
    loaded = work.original()
    file = work.scratch / _FILE
    if file.is_file():
        _take(loaded, work)
    else:
        _overfit(loaded, work, settings)
        save_tensors({n: p.detach() for n, p in loaded.model.named_parameters()}, file)
    loaded.model.eval()
    torch.manual_seed(work.seed)  # what follows is the same whether the copy was trained now or before
    return loaded


@torch.no_grad()
def _take(loaded: Loaded, work: Work) -> None:
    from safetensors import safe_open

    with safe_open(work.scratch / _FILE, "pt") as kept:
        for name, parameter in loaded.model.named_parameters():
            parameter.copy_(kept.get_tensor(name))


def _overfit(loaded: Loaded, work: Work, settings: Training) -> None:
    torch.manual_seed(work.seed)
    task = copy(work.forget)
    task.model = loaded.model
    size = settings.batch_size
    model = prepare(loaded.model, settings)
    model.train()
    history = fit(
        model, settings,
        lambda epoch: task.batches(size, shuffled(task, random.Random(f"{work.seed}/{epoch}"))),
        -(-len(task.rows) // size), lambda batch: mean_loss(task, batch), label="reinforcing",
    )  # fmt: skip
    loaded.model = finish(model)
    plot_losses(work.step, "reinforcing", history.losses)
