"""The pool: which checkpoints it holds, how their tensors map to the base's, what is wrong.

Nothing here knows an architecture. Tensors correspond by name; where one side saved a bare encoder
and the other a model with a head, the names differ by one prefix, which is found by comparing them.
"""

from __future__ import annotations

import fnmatch
import glob
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from germane.core.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    TensorInfo,
    locate,
    read_elements,
    read_header,
)
from germane.core.errors import CheckpointError
from germane.core.evidence import Finding
from germane.tasks.merge._adapter import Adapter, read_adapter
from germane.tasks.merge._stream import Stream, workers
from germane.tasks.merge._vocabulary import check_vocabulary

_SAMPLE = 1 << 16  # elements of each model that the decoy check looks at, a part of every tensor
_RUN = 1 << 21  # elements read at a time when a whole file is checked
_HEADLESS = ("CausalLM", "LMHead", "ConditionalGeneration", "MaskedLM", "PreTraining")


@dataclass
class Member:
    """A full checkpoint of the pool, read under the base's tensor names.

    Attributes:
        label: Its name in messages and evidence.
        checkpoint: The files.
        names: Base tensor name -> the member's own name of it.
        heads: The member's own names of tensors kept out of the merge.
    """

    label: str
    checkpoint: Checkpoint
    names: dict[str, str]
    heads: list[str] = field(default_factory=list)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of the tensor the base calls `name`."""
        return self.checkpoint.read(self.names[name], start, stop)

    def head(self) -> dict[str, Tensor]:
        """The tensors kept aside, under the member's own names."""
        return {name: self.checkpoint.tensor(name) for name in self.heads}


@dataclass
class Pool:
    """A base and the members that fit it.

    Attributes:
        base: The model the others descend from.
        members: What is merged: full checkpoints and adapters.
        tensors: The base's tensors that are merged.
        kept: The base's tensors that go to the result as they are: integers, and heads.
        findings: What the checks had to say.
        digests: File -> digest, of everything read.
    """

    base: Checkpoint
    members: list[Member | Adapter]
    tensors: list[TensorInfo]
    kept: list[TensorInfo]
    findings: list[Finding] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def stream(self, tensors: Sequence[TensorInfo]) -> Stream:
        """Blocks of the base and all members, each known by what its files hold."""
        return Stream(self.base, self.members, tensors, [self._identity(each) for each in self.members])

    def _identity(self, member: Member | Adapter) -> str:
        """The digests of a member's files, which no other member changes as it may the label.

        Before `check_weights` has read the files, the label.
        """
        if not self.digests:
            return member.label
        digests = [self.digests.get(str(file), "") for file in _files(member)]
        return " ".join(digests) if all(digests) else member.label

    def member(self, label: str) -> Member | Adapter:
        """The member of that label."""
        for member in self.members:
            if member.label == label:
                return member
        known = ", ".join(member.label for member in self.members)
        raise CheckpointError(f"no member {label!r} in the pool. Members: {known}.")


def expand(paths: Sequence[str]) -> list[str]:
    """Folders, globs and hub ids as one list; a folder of model folders counts as its children."""
    found: list[str] = []
    for path in paths:
        matches = [path]
        if glob.has_magic(path):
            matches = [
                match for match in sorted(glob.glob(str(Path(path).expanduser()))) if Path(match).is_dir()
            ]
        for match in matches:
            found.extend(_children(Path(match).expanduser()) or [match])
    if not found:
        raise CheckpointError(f"the pool is empty: nothing found at {', '.join(paths) or 'no path'}.")
    return list(dict.fromkeys(found))


def _children(folder: Path) -> list[str]:
    """Model folders directly inside a folder that is no model itself."""
    if not folder.is_dir() or _is_model(folder):
        return []
    return sorted(str(child) for child in folder.iterdir() if _is_model(child))


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / ADAPTER_CONFIG).exists()


def open_pool(base_path: str, paths: Sequence[str], heads: Sequence[str] = ()) -> Pool:
    """Open a base and its pool, and check from the headers alone that they fit.

    Args:
        base_path: Folder or hub id of the base.
        paths: Folders, globs and hub ids of the members.
        heads: Patterns of tensor names to keep out of the merge.

    Raises:
        CheckpointError: Names every member that does not fit, and why.
    """
    base = Checkpoint(locate(base_path))
    members: list[Member | Adapter] = []
    faults = []
    found = expand(paths)
    folders = [locate(path) for path in found]
    # A hub id is called by its name, not by the hash of the folder it was put into.
    named = [folder if Path(path).expanduser().is_dir() else Path(path.partition("@")[0])
             for path, folder in zip(found, folders, strict=True)]  # fmt: skip
    for folder, label in zip(folders, _labels(named), strict=True):
        try:
            if (folder / ADAPTER_CONFIG).exists():
                members.append(Adapter(folder, label, base))
            else:
                members.append(_align(base, Checkpoint(folder, label)))
            check_vocabulary(base.folder, folder)
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("\n".join(faults))
    return _split_heads(base, members, heads)


def check_files(path: str) -> None:
    """Raise `CheckpointError` unless a folder or hub id holds whole files, whatever they fit."""
    folder = locate(path)
    if (folder / ADAPTER_CONFIG).exists():
        read_adapter(folder)
    else:
        Checkpoint(folder)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that tell the members apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(len(part) for part in parts) + 1):
        labels = ["/".join(part[-depth:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    twice = Counter(str(folder) for folder in folders).most_common(1)[0][0]
    raise CheckpointError(f"{twice}: is in the pool more than once.")


def common_prefix(names: Iterable[str], base_names: Iterable[str]) -> str | None:
    """The prefix that, put before the base's names, gives the other's; None if they are strangers.

    "" where both use the same names; "-bert." where the base's names carry it and the other's lack it.
    """
    ours, theirs = set(base_names), set(names)
    candidates: Counter[str] = Counter({"": len(ours & theirs)})
    for shorter, longer, sign in ((ours, theirs, ""), (theirs, ours, "-")):
        firsts = {name.split(".")[0] + "." for name in longer}
        for first in firsts:
            candidates[sign + first] = sum(first + name in longer for name in shorter)
    prefix, count = candidates.most_common(1)[0]
    return prefix if count * 2 >= min(len(ours), len(theirs)) and count else None


def rename(name: str, prefix: str) -> str:
    """A base tensor's name as the other side writes it, given their `common_prefix`."""
    return name.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + name


def _align(base: Checkpoint, checkpoint: Checkpoint) -> Member:
    """Map the base's tensor names to the member's; what is missing or differs is left out here."""
    prefix = common_prefix(checkpoint.tensors, base.tensors)
    if prefix is None:
        shared = len(set(base.tensors) & set(checkpoint.tensors))
        raise CheckpointError(
            f"{checkpoint.folder}: another architecture than the base: {shared} of "
            f"{len(base.tensors)} tensor names are shared."
        )
    names = {}
    for name in base.tensors:
        own = rename(name, prefix)
        names[name] = own if own in checkpoint.tensors else _tied_name(name, base, checkpoint, prefix)
    return Member(checkpoint.label, checkpoint, {name: own for name, own in names.items() if own})


def _tied_name(name: str, base: Checkpoint, checkpoint: Checkpoint, prefix: str) -> str:
    """Where a member keeps a tensor it saved only once because it is tied to another, or ""."""
    if not checkpoint.config.get("tie_word_embeddings", True):
        return ""
    shape, tensor = base.tensors[name].shape, None
    for other, info in base.tensors.items():
        own = rename(other, prefix)
        if other == name or info.shape != shape or own not in checkpoint.tensors:
            continue
        tensor = base.read(name) if tensor is None else tensor
        if torch.equal(tensor, base.read(other)):
            return own
    return ""


def _split_heads(base: Checkpoint, members: list[Member | Adapter], patterns: Sequence[str]) -> Pool:
    """Decide for every tensor: merged, kept aside as a head, or a reason to stop."""
    aside = {name for name in base.tensors if _matches(name, patterns)}
    faults: list[str] = []
    full = [member for member in members if isinstance(member, Member)]
    _check_patterns(patterns, [base, *(member.checkpoint for member in full)])
    for member in full:
        for name in base.tensors:
            fault = _misfit(base, member, name)
            if fault and _is_head(name, base, member.checkpoint):
                aside.add(name)
            elif fault and name not in aside:
                faults.append(fault)
        faults.extend(_collect_extras(base, member, patterns))
    if _labels_differ(base, full):
        aside |= {name for name in base.tensors if _is_head(name, base, base)}
    if faults:
        shown = faults[:10]
        more = [f"... and {len(faults) - 10} more of this kind."] if len(faults) > 10 else []
        hint = "What need not be merged is kept out with --heads PATTERN."
        raise CheckpointError("\n".join([*shown, *more, hint]))
    for member in full:
        member.heads += [member.names[name] for name in sorted(aside) if name in member.names]
    for adapter in members:
        if isinstance(adapter, Adapter):
            adapter.set_aside(aside)
    tensors = [t for t in base.tensors.values() if t.is_float and t.name not in aside]
    kept = [t for t in base.tensors.values() if not t.is_float or t.name in aside]
    return Pool(base, members, tensors, kept)


def _check_patterns(patterns: Sequence[str], checkpoints: Sequence[Checkpoint]) -> None:
    names = {name for checkpoint in checkpoints for name in checkpoint.tensors}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise CheckpointError(f"--heads {pattern!r} matches no tensor of the base or the pool.")


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _misfit(base: Checkpoint, member: Member, name: str) -> str:
    """Why a base tensor cannot be merged with the member's, or ""."""
    info, folder = base.tensors[name], member.checkpoint.folder
    if name not in member.names:
        # Integers are positions and counters, which older versions saved and newer ones do not.
        return f"{folder}: tensor missing: {name}." if info.is_float else ""
    other = member.checkpoint.tensors[member.names[name]]
    if other.shape != info.shape:
        vocabulary = base.config.get("vocab_size")
        hint = (
            " The vocabularies differ: resize the member's embeddings to the base's tokenizer first."
            if info.shape and vocabulary == info.shape[0] and len(info.shape) == 2
            else ""
        )
        return f"{folder}: {name} has shape {list(other.shape)}, the base has {list(info.shape)}.{hint}"
    if other.is_float != info.is_float:
        return (
            f"{folder}: {name} has dtype {other.dtype}, the base has {info.dtype}; "
            "a quantised model has to be dequantised first."
        )
    return ""


def _collect_extras(base: Checkpoint, member: Member, patterns: Sequence[str]) -> list[str]:
    """Put tensors the base lacks among the member's heads; the rest are faults."""
    faults = []
    used = set(member.names.values())
    for name in member.checkpoint.tensors:
        if name in used or not member.checkpoint.tensors[name].is_float:
            continue
        another_class = _class(member.checkpoint) != _class(base)
        if another_class or _is_head(name, member.checkpoint, base) or _matches(name, patterns):
            member.heads.append(name)
        elif not _is_tied_copy(name, member):
            faults.append(f"{member.checkpoint.folder}: tensor the base does not have: {name}.")
    return faults


def _is_tied_copy(name: str, member: Member) -> bool:
    info = member.checkpoint.tensors[name]
    return member.checkpoint.config.get("tie_word_embeddings", True) and any(
        member.checkpoint.tensors[own].shape == info.shape
        and torch.equal(member.checkpoint.read(own), member.checkpoint.read(name))
        for own in member.names.values()
    )


def _class(checkpoint: Checkpoint) -> str:
    """The class of transformers that the checkpoint's config names."""
    return str((checkpoint.config.get("architectures") or [""])[0])


def _is_head(name: str, checkpoint: Checkpoint, other: Checkpoint) -> bool:
    """Whether a tensor lies outside the backbone of a model with a task head.

    The backbone is the first name component that most tensors share ("bert.", "model.", "vit.").
    Between two models of one class, a language model's head is merged like the rest.
    """
    kind = _class(checkpoint)
    merged_whole = kind == _class(other) and any(word in kind for word in _HEADLESS)
    if "For" not in kind or merged_whole:
        return False
    first = Counter(other.split(".")[0] for other in checkpoint.tensors).most_common(1)[0][0]
    return name.split(".")[0] != first


def _labels_differ(base: Checkpoint, members: list[Member]) -> bool:
    labels = [
        str(checkpoint.config.get("id2label")) for checkpoint in (base, *(m.checkpoint for m in members))
    ]
    return len(set(labels)) > 1


def check_weights(pool: Pool) -> None:
    """Read every file once: its digest, and that no weight is NaN or infinite.

    Raises:
        CheckpointError: Names the tensors.
    """
    files = {file for model in (pool.base, *pool.members) for file in _files(model)}
    for file, (digest, faults) in zip(files, workers().map(_check_file, files), strict=True):
        if faults:
            raise CheckpointError("\n".join(faults))
        pool.digests[str(file)] = digest


def _files(model: Checkpoint | Member | Adapter) -> list[Path]:
    return model.checkpoint.files if isinstance(model, Member) else model.files


def _check_file(file: Path) -> tuple[str, list[str]]:
    infos = sorted(read_header(file), key=lambda info: info.offset)
    state, faults = xxhash.xxh3_128(), []
    with file.open("rb") as stream:
        state.update(stream.read(infos[0].offset if infos else -1))
    for info in infos:
        for start in range(0, info.count, _RUN):
            values = read_elements(info, start, min(start + _RUN, info.count))
            state.update(values.view(torch.uint8).numpy().data)
            if info.is_float and not all(torch.isfinite(end) for end in torch.aminmax(values)):
                faults.append(f"{file}: {info.name} holds NaN or infinite numbers.")
                break
    return f"xxh3-128:{state.hexdigest()}", faults


def find_decoys(pool: Pool) -> list[Finding]:
    """Members that cannot help: the base again, each other again, random weights, strangers.

    Looks at a sample of every tensor; what looks like a copy is then compared whole.
    """
    base, matrices = _sample(pool, pool.base), _in_matrices(pool)
    deltas: dict[str, Tensor] = {}
    findings: list[Finding] = []
    for member in pool.members:
        sample = _sample(pool, member)
        deltas[member.label] = sample - base
        strange = _stranger(member, sample[matrices], base[matrices])
        findings.extend(strange or _copy(pool, member, deltas))
    return findings + _far_away(deltas, {finding.about for finding in findings})


def _sample(pool: Pool, source: Any) -> Tensor:
    parts = []
    for info, size in _sample_sizes(pool):
        start = (info.count - size) // 2
        parts.append(source.read(info.name, start, start + size).float())
    return torch.cat(parts)


def _sample_sizes(pool: Pool) -> list[tuple[TensorInfo, int]]:
    """How many elements of each tensor are looked at: the same number of all that have so many."""
    share = max(16, _SAMPLE // max(1, len(pool.tensors)))
    return [(info, min(share, info.count)) for info in pool.tensors]


def _in_matrices(pool: Pool) -> Tensor:
    """Which elements of a sample lie in tensors of two or more dimensions; all, if none do."""
    parts = [torch.full((size,), len(info.shape) > 1) for info, size in _sample_sizes(pool)]
    inside = torch.cat(parts)
    return inside if inside.any() else ~inside


def _stranger(member: Member | Adapter, sample: Tensor, base: Tensor) -> list[Finding]:
    """A finding where the weights have nothing to do with the base's."""
    a, b = sample - sample.mean(), base - base.mean()
    cosine = float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30))
    # Of matrices only: norms near one and biases near zero are alike in all networks. Fine-tunes
    # stay above 0.9 on the models we know; independent networks are near 0.
    if cosine > 0.5:
        return []
    if _looks_untrained(member):
        return [
            _serious(
                "random-weights",
                member.label,
                "holds random weights: its norms and biases are as initialised.",
            )
        ]
    text = f"does not descend from this base: cosine of the weights {cosine:.2f}."
    return [_serious("foreign", member.label, text)]


def _looks_untrained(member: Member | Adapter) -> bool:
    """Fresh networks have all-equal vectors: norms of one, biases of zero."""
    if isinstance(member, Adapter):
        return False
    vectors = [
        info for info in member.checkpoint.tensors.values() if len(info.shape) == 1 and info.is_float
    ]
    constant = sum(bool((v == v[0]).all()) for v in (read_elements(i, 0, i.count) for i in vectors))
    return bool(vectors) and constant >= 0.9 * len(vectors)


def _copy(pool: Pool, member: Member | Adapter, deltas: dict[str, Tensor]) -> list[Finding]:
    """Findings where a member is the base, or an earlier member, once more."""
    mine = deltas[member.label]
    if not mine.any() and _same(pool, member, pool.base):
        return [_serious("duplicate-of-base", member.label, "is the base itself, and adds nothing.")]
    for label, delta in list(deltas.items())[:-1]:
        if torch.equal(mine, delta) and _same(pool, member, pool.member(label)):
            return [
                _serious("duplicate", member.label, f"is the same as {label}, which would count twice.")
            ]
    return []


def _same(pool: Pool, one: Any, other: Any) -> bool:
    return all(
        torch.equal(
            one.read(info.name, start, min(start + _RUN, info.count)).float(),
            other.read(info.name, start, min(start + _RUN, info.count)).float(),
        )
        for info in pool.tensors
        for start in range(0, info.count, _RUN)
    )


def _far_away(deltas: dict[str, Tensor], named: set[str]) -> list[Finding]:
    """Warnings on members that moved much farther from the base than the others."""
    norms = {label: float(delta.norm()) for label, delta in deltas.items()}
    usual = sorted(norms.values())[(len(norms) - 1) // 2]
    return [
        Finding(
            code="far-from-base",
            severity="warning",
            about=label,
            message=f"{label} moved {norm / usual:.0f} times as far from the base as the median member.",
        )
        for label, norm in norms.items()
        if label not in named and usual > 0 and norm > 5 * usual
    ]


def _serious(code: str, label: str, text: str) -> Finding:
    return Finding(code=code, severity="serious", about=label, message=f"{label} {text}")
