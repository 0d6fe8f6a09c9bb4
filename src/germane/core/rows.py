"""A classifier of rows of numbers, as a transformers model: for tables, and for small checks."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class RowConfig(PretrainedConfig):  # type: ignore[misc]
    """Of `RowClassifier`.

    Args:
        features: Names of a record's fields, in the order of the inputs.
        hidden: Sizes of the hidden layers; none gives logistic regression.
        means: Subtracted from each input; default: zeros.
        scales: Each input is divided by it then; default: ones.
    """

    model_type = "germane-rows"

    def __init__(
        self,
        features: list[str] | None = None,
        hidden: list[int] | None = None,
        means: list[float] | None = None,
        scales: list[float] | None = None,
        **rest: Any,
    ) -> None:
        self.features = features or []
        self.hidden = hidden or []
        self.means = means or [0.0] * len(self.features)
        self.scales = scales or [1.0] * len(self.features)
        super().__init__(**rest)


class RowClassifier(PreTrainedModel):  # type: ignore[misc]
    """Linear layers with ReLU between them, on standardised inputs.

    It loads in plain transformers once `germane.core.rows` has been imported.
    """

    config_class = RowConfig
    main_input_name = "values"

    def __init__(self, config: RowConfig) -> None:
        super().__init__(config)
        sizes = [len(config.features), *config.hidden]
        self.register_buffer("means", torch.tensor(config.means), persistent=False)
        self.register_buffer("scales", torch.tensor(config.scales), persistent=False)
        self.layers = nn.ModuleList(nn.Linear(size, following) for size, following in pairwise(sizes))
        self.classifier = nn.Linear(sizes[-1], config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Uniform in +-1/sqrt(inputs), as torch's own linear layers begin."""
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        elif module is self:
            self.means = torch.tensor(self.config.means)
            self.scales = torch.tensor(self.config.scales)

    def forward(self, values: Tensor, **_: Any) -> SequenceClassifierOutput:
        """Logits (records, classes) of values (records, features)."""
        hidden = (values - self.means) / self.scales
        for layer in self.layers:
            hidden = layer(hidden).relu()
        return SequenceClassifierOutput(logits=self.classifier(hidden))


AutoConfig.register(RowConfig.model_type, RowConfig, exist_ok=True)
