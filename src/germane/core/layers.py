"""The parts of a decoder language model, found by their structure and not by a list of architectures."""

from __future__ import annotations

from torch import Tensor, nn

from germane.core.checkpoint import Checkpoint
from germane.core.errors import CheckpointError

Named = tuple[str, nn.Module]
_ATTENTION = ("attn", "attention")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")  # how configs call the number of layers


def decoder_layers(model: nn.Module) -> list[Named]:
    """The decoder layers with their dotted names, from the input to the output.

    They are the longest list of modules that each hold an attention and a feed-forward part.

    Raises:
        CheckpointError: There is no such list.
    """
    found: list[Named] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > len(found):
            layers = [(f"{name}.{number}", layer) for number, layer in enumerate(module)]
            if all(_is_layer(layer) for _, layer in layers):
                found = layers
    if not found:
        raise CheckpointError(
            f"a {type(model).__name__} has no list of layers with an attention and a feed-forward part."
        )
    return found


def check_layer(source: Checkpoint, layer: int) -> None:
    """Refuse a layer that a model does not have, before it is loaded.

    Raises:
        CheckpointError: With the allowed range.
    """
    count = next((source.config[name] for name in _COUNTS if name in source.config), None)
    if count is not None:
        _require_layer(layer, count)


def _require_layer(layer: int, count: int) -> None:
    if not -count <= layer < count:
        raise CheckpointError(
            f"layer {layer}: the model has {count} layers, from 0 to {count - 1}, "
            f"or from -{count} to -1 counted from the end."
        )


def layer_at(model: nn.Module, layer: int) -> Named:
    """The decoder layer of this number; negative numbers count from the end.

    Raises:
        CheckpointError: There is none; the allowed range is said.
    """
    layers = decoder_layers(model)
    _require_layer(layer, len(layers))
    return layers[layer]


def value_matrix(model: nn.Module, layer: int) -> Named:
    """The linear map that writes the output of a layer's feed-forward part, and its dotted name.

    It is the last linear map outside the attention whose output is as wide as the attention's.

    Raises:
        CheckpointError: No such layer, or a layer with several feed-forward parts, such as experts.
    """
    place, module = layer_at(model, layer)
    found = _feed_forward(module)
    parents = {name.rpartition(".")[0] for name, _ in found}
    if len(parents) > 1:
        raise CheckpointError(
            f"{place}: has {len(parents)} feed-forward parts, such as a mixture of experts; one is needed."
        )
    name, matrix = found[-1]
    return f"{place}.{name}", matrix


def attention_output(layer: nn.Module) -> nn.Module:
    """The linear map that writes the output of a decoder layer's attention: the last one in it.

    Raises:
        CheckpointError: It has no attention part.
    """
    for name, part in layer.named_modules():
        if _is_attention(name, part):
            return _linears(part)[-1][1]
    raise CheckpointError(f"a {type(layer).__name__} has no attention part.")


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear map as (outputs, inputs), a view of the parameter, however it is stored.

    Raises:
        CheckpointError: It has no such weight, or it is quantised.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise CheckpointError(f"a {type(module).__name__} has no matrix of plain numbers as its weight.")
    return weight.T if _is_transposed(module) else weight


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _linears(module: nn.Module) -> list[Named]:
    """The linear maps in a module, with names from it on, in their order."""
    return [
        (name, part)
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) or _is_transposed(part)
    ]


def _is_attention(name: str, part: nn.Module) -> bool:
    last = name.rpartition(".")[2].lower()
    return any(word in last for word in _ATTENTION) and bool(_linears(part))


def _feed_forward(layer: nn.Module) -> list[Named]:
    """The linear maps outside the attention that write into the residual stream."""
    inside = [name for name, part in layer.named_modules() if _is_attention(name, part)]
    width = weight_of(attention_output(layer)).shape[0]
    return [
        (name, part)
        for name, part in _linears(layer)
        if not any(name == within or name.startswith(f"{within}.") for within in inside)
        and weight_of(part).shape[0] == width
    ]


def _is_layer(layer: nn.Module) -> bool:
    try:
        return bool(_feed_forward(layer))
    except CheckpointError:
        return False
