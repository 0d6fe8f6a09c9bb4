"""Every data-free rule against numbers worked out by hand, or written anew in numpy from its formula."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from germane.core.checkpoint import TensorInfo
from germane.core.errors import SettingError
from germane.method import build
from germane.tasks.merge import _stream
from germane.tasks.merge._live import Memory
from germane.tasks.merge._rule import elect_and_average, uniform_numbers
from germane.tasks.merge._stream import Stream
from germane.tasks.merge._threshold import magnitude_thresholds
from germane.tasks.merge.frank_wolfe import project, project_on_simplex

Model = dict[str, list | np.ndarray | torch.Tensor]


def info(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(name, Path("nowhere"), 0, "F32", tuple(tensor.shape))


def stream_of(base: Model, members: list[Model], labels: list[str] | None = None) -> Stream:
    tensors = [
        {n: torch.as_tensor(np.array(v), dtype=torch.float32) for n, v in m.items()}
        for m in (base, *members)
    ]
    labels = labels or [f"m{n}" for n in range(len(members))]
    sources = [Memory(label, model) for label, model in zip(labels, tensors[1:], strict=True)]
    return Stream(Memory("base", tensors[0]), sources, [info(n, t) for n, t in tensors[0].items()])


def apply(
    name: str,
    base: Model,
    members: list[Model],
    labels: list[str] | None = None,
    seed: int = 0,
    **settings: object,
) -> dict[str, np.ndarray]:
    """The whole merge by one rule, on models in memory."""
    rule = build(f"merge/{name}", settings)
    rule.check_pool(len(members))
    stream = stream_of(base, members, labels)
    survey = rule.survey(stream)
    parts: dict[str, list[torch.Tensor]] = {}
    for block_name, values in stream.map(lambda block: (block.name, rule.combine(block, survey, seed))):
        parts.setdefault(block_name, []).append(values)
    return {n: torch.cat(p).double().numpy().reshape(np.shape(base[n])) for n, p in parts.items()}


def one(name: str, base: list, *members: list, **settings: object) -> list[float]:
    return apply(name, {"w": base}, [{"w": m} for m in members], **settings)["w"].tolist()


def random_models(seed: int, shapes: dict[str, tuple[int, ...]], n: int) -> list[Model]:
    generator = np.random.default_rng(seed)
    return [{k: generator.normal(size=s).astype(np.float32) for k, s in shapes.items()} for _ in range(n)]


@pytest.fixture(params=[1 << 20, 4096, 1])
def budget(request, monkeypatch):
    """Blocks of several sizes; the smallest is 1024 elements."""
    monkeypatch.setattr(_stream, "_BUDGET", request.param)


# Average, task arithmetic.


def test_average_by_hand():
    # (3 + 1) / 2, (0 + 4) / 2
    assert one("average", [1, 1], [3, 0], [1, 4]) == [2, 2]


def test_average_with_weights_is_scaled_to_sum_to_one():
    # (3 * 3 + 1 * 1) / 4, (3 * 0 + 1 * 4) / 4; the base plays no part
    assert one("average", [7, -9], [3, 0], [1, 4], weights=[3, 1]) == [2.5, 1]


def test_task_arithmetic_by_hand():
    # task vectors (2, -1) and (0, 3): base + 0.5 * (2, 2)
    assert one("task-arithmetic", [1, 1], [3, 0], [1, 4], scale=0.5) == [2, 2]
    # weights 1 and -1: base + 0.5 * (2, -4)
    assert one("task-arithmetic", [1, 1], [3, 0], [1, 4], scale=0.5, weights=[1, -1]) == [2, -1]


@pytest.mark.parametrize("name", ["average", "task-arithmetic"])
def test_weights_must_be_as_many_as_members(name):
    with pytest.raises(SettingError, match=rf"merge/{name}.weights: 3 given for a pool of 2"):
        one(name, [1], [2], [3], weights=[1, 1, 1])


def test_weights_without_a_mean_are_refused():
    with pytest.raises(SettingError, match="sum to 0"):
        one("average", [1], [2], [3], weights=[1, -1])


# TIES.


def test_ties_by_hand():
    # density 0.5 of 4 elements keeps 2 of each: (4, -3, ., .), (., 2, ., -6), (., ., 3, 2)
    # columns: 4 alone | -3 + 2 < 0, so -3 alone | 3 alone | -6 + 2 < 0, so -6 alone
    members = [[4, -3, 1, 0], [1, 2, -1, -6], [0, 1, 3, 2]]
    assert one("ties", [0, 0, 0, 0], *members, density=0.5) == [4, -3, 3, -6]
    # untrimmed: 5 / 2 | (-3 + 2 + 1 = 0: nobody is elected) 0 | (1 + 3) / 2 | -6
    assert one("ties", [0, 0, 0, 0], *members, density=1) == [2.5, 0, 2, -6]
    assert one("ties", [1, 1, 1, 1], *[[v + 1 for v in m] for m in members], density=0.5, scale=0.5) == [
        3,
        -0.5,
        2.5,
        -2,
    ]


def ties_in_numpy(
    base: Model, members: list[Model], density: float, per_tensor: bool
) -> dict[str, np.ndarray]:
    deltas = [{n: m[n].astype(np.float32) - base[n].astype(np.float32) for n in base} for m in members]
    groups = [[n] for n in base] if per_tensor else [list(base)]
    for delta in deltas:
        for names in groups:
            flat = np.sort(np.abs(np.concatenate([delta[n].ravel() for n in names])))
            keep = max(1, math.floor(round(density * len(flat), 6)))
            for n in names:
                delta[n] = np.where(np.abs(delta[n]) >= flat[len(flat) - keep], delta[n], 0)
    out = {}
    for n in base:
        stacked = np.stack([delta[n] for delta in deltas]).astype(np.float64)
        sign = np.sign(stacked.sum(0))
        agree = stacked * sign > 0
        out[n] = base[n] + np.where(agree, stacked, 0).sum(0) / np.maximum(agree.sum(0), 1)
    return out


@pytest.mark.parametrize("trim", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.29, 0.7, 1.0])
def test_ties_against_numpy(density, trim, budget):
    shapes = {"a": (50, 61), "b": (100,), "c": (3, 3, 5)}
    base, *members = random_models(1, shapes, 5)
    ours = apply("ties", base, members, density=density, trim=trim)
    theirs = ties_in_numpy(base, members, density, trim == "tensor")
    for name in shapes:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)


def test_a_density_that_is_no_binary_fraction_keeps_its_exact_share():
    # 0.29 * 100 is 28.999999999999996 in floating point; 29 elements are meant
    member = np.arange(1, 101)
    assert sum(v != 0 for v in one("ties", [0] * 100, member.tolist(), density=0.29)) == 29


def test_the_elected_sign_is_that_of_the_sum():
    deltas = torch.tensor([[1.0, -5.0, 0.0, 2.0], [1.0, 3.0, 0.0, -2.0], [-3.0, 3.0, 0.0, 0.0]])
    # 1 + 1 - 3 < 0: -3 | -5 + 3 + 3 > 0: mean of 3 and 3 | nothing | exact tie: nothing
    assert elect_and_average(deltas).tolist() == [-3, 3, 0, 0]


# Thresholds by counting bits.


def thresholds_in_numpy(stream: Stream, ranks: list[int], per_tensor: bool) -> dict[str, np.ndarray]:
    out = {}
    groups = {i.name: [i] for i in stream.tensors} if per_tensor else {"": stream.tensors}
    for key, infos in groups.items():
        rows = []
        for member in stream.members:
            parts = [
                (member.read(i.name, 0, i.count) - stream.base.read(i.name, 0, i.count)).numpy()
                for i in infos
            ]
            size = np.sort(np.abs(np.concatenate(parts)))
            rows.append([size[min(max(r, 0), len(size) - 1)] for r in ranks])
        out[key] = np.array(rows, dtype=np.float32)
    return out


def kinds(kind: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    if kind == "random":
        return generator.normal(size=shape)
    if kind == "tied":
        return generator.integers(-3, 4, size=shape) / 4
    if kind == "tiny":  # denormals, and numbers that share their upper 16 bits
        return 1e-40 * generator.integers(-9, 9, size=shape) + 1e-6 * generator.integers(0, 2, size=shape)
    return np.zeros(shape)


@pytest.mark.parametrize("sampled", ["all", "some", "hardly any"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("kind", ["random", "tied", "tiny", "zero"])
def test_thresholds_are_exact(kind, per_tensor, sampled, budget, monkeypatch):
    least = {"all": 1 << 16, "some": 500, "hardly any": 30}[sampled]
    monkeypatch.setattr("germane.tasks.merge._threshold._SAMPLE", (least, 1 << 22))
    monkeypatch.setattr("germane.tasks.merge._threshold._RUN", 8)
    monkeypatch.setattr("germane.tasks.merge._threshold._MARGIN", 0.5)  # so that brackets miss, too
    generator = np.random.default_rng(3)
    shapes = {"a": (70, 61), "b": (9,), "c": (2000,)}
    base = {n: np.zeros(s) for n, s in shapes.items()}
    members = [{n: kinds(kind, s, generator) for n, s in shapes.items()} for _ in range(6)]
    stream = stream_of(base, members)
    ranks = [-4, 0, 1, 5, 8, 1000, 4000, 10**9]
    ours = magnitude_thresholds(stream, lambda count: ranks, per_tensor)
    theirs = thresholds_in_numpy(stream, ranks, per_tensor)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == torch.float32
        np.testing.assert_array_equal(ours[key].numpy(), theirs[key])


# DARE.


def test_dare_by_hand(monkeypatch):
    # random numbers 0.1, 0.8, 0.6, 0.7 with drop 0.6 keep those at 0.6 or above, divided by 0.4
    monkeypatch.setattr(
        "germane.tasks.merge.dare.uniform_numbers", lambda *_: torch.tensor([0.1, 0.8, 0.6, 0.7])
    )
    assert one("dare", [1, 1, 1, 1], [2, 3, 1, -1], drop=0.6, scale=0.5) == pytest.approx([1, 3.5, 1, -1.5])


def test_dare_without_dropping_is_task_arithmetic():
    base, *members = random_models(2, {"a": (30, 5)}, 4)
    ours, theirs = apply("dare", base, members, drop=0), apply("task-arithmetic", base, members)
    np.testing.assert_allclose(ours["a"], theirs["a"], atol=1e-6)


def test_dare_keeps_the_expected_value():
    n = 200_000
    result = np.array(one("dare", [0] * n, [1] * n, drop=0.7, scale=1))
    # each element is 0 or 1 / 0.3; the mean has standard deviation sqrt(0.7 / 0.3 / n) = 0.0034
    assert set(np.round(np.unique(result), 4)) == {0, 3.3333}
    assert abs(result.mean() - 1) < 5 * 0.0034


def test_dare_masks_do_not_depend_on_pool_or_blocks(monkeypatch):
    """Members that touch different elements show each one's mask in the sum."""
    n = 5000
    first, second, third = (np.eye(3)[k].repeat(n) for k in range(3))
    settings = {"drop": 0.5, "scale": 1}
    alone = apply("dare", {"w": np.zeros(3 * n)}, [{"w": first}, {"w": second}], ["x", "y"], **settings)[
        "w"
    ]
    monkeypatch.setattr(_stream, "_BUDGET", 1)
    more = apply(
        "dare",
        {"w": np.zeros(3 * n)},
        [{"w": third}, {"w": second}, {"w": first}],
        ["z", "y", "x"],
        **settings,
    )["w"]
    assert np.array_equal(alone[: 2 * n], more[: 2 * n])
    assert more[2 * n :].any()
    other_seed = apply("dare", {"w": np.zeros(3 * n)}, [{"w": first}], ["x"], seed=1, **settings)["w"]
    assert not np.array_equal(alone[:n], other_seed[:n])


def test_dare_ties_votes_on_what_is_left():
    base, *members = random_models(5, {"a": (40, 7)}, 4)
    ours = apply("dare", base, members, drop=0.5, form="ties", scale=1, seed=9)["a"]
    deltas = []
    for number, member in enumerate(members):
        kept = uniform_numbers(9, f"m{number}", "a", 0, 280).numpy().reshape(40, 7) >= 0.5
        deltas.append((member["a"] - base["a"]) * kept * 2)
    stacked = np.stack(deltas)
    agree = stacked * np.sign(stacked.sum(0)) > 0
    np.testing.assert_allclose(
        ours, base["a"] + (stacked * agree).sum(0) / np.maximum(agree.sum(0), 1), atol=1e-5
    )


def test_random_numbers_belong_to_positions():
    whole = uniform_numbers(0, "m", "w", 0, 5000)
    assert torch.equal(whole[1024:3000], uniform_numbers(0, "m", "w", 1024, 3000 - 1024))
    assert 0 <= float(whole.min()) < 0.01 < 0.99 < float(whole.max()) < 1
    for other in (("n", "w"), ("m", "v")):
        assert not torch.equal(whole, uniform_numbers(0, *other, 0, 5000))


# Breadcrumbs.


def breadcrumbs_in_numpy(delta: np.ndarray, density: float, outliers: float) -> np.ndarray:
    order = np.argsort(np.abs(delta), kind="stable")
    n = len(delta)
    largest = math.floor(round(outliers * n, 6))
    smallest = max(0, n - math.floor(round(density * n, 6)) - largest)
    kept = np.zeros(n, dtype=bool)
    kept[order[smallest : n - largest]] = True
    return np.where(kept, delta, 0)


def test_breadcrumbs_by_hand():
    # 10 elements: the largest (10) goes as an outlier, of the rest the 4 smallest, so that 5 stay
    member = [1, -2, 3, -4, 5, -6, 7, -8, 9, -10]
    assert one("breadcrumbs", [0] * 10, member, density=0.5, outliers=0.1, scale=1) == [
        0,
        0,
        0,
        0,
        5,
        -6,
        7,
        -8,
        9,
        0,
    ]


@pytest.mark.parametrize(
    ("density", "outliers"), [(0.9, 0.01), (0.29, 0.29), (1.0, 0.3), (0.01, 0.5), (1.0, 0.0)]
)
def test_breadcrumbs_against_a_sort(density, outliers, budget):
    base, *members = random_models(4, {"a": (50, 61), "b": (100,)}, 4)
    ours = apply("breadcrumbs", base, members, density=density, outliers=outliers, scale=0.7)
    for name in base:
        flats = [(m[name] - base[name]).ravel() for m in members]
        masked = sum(breadcrumbs_in_numpy(f.astype(np.float64), density, outliers) for f in flats)
        np.testing.assert_allclose(ours[name].ravel(), base[name].ravel() + 0.7 * masked, atol=1e-5)


# SLERP.


def test_slerp_by_hand():
    # a quarter turn in 2 dimensions: halfway between the axes, on the circle
    assert one("slerp", [5, 5], [1, 0], [0, 1]) == pytest.approx([2**-0.5, 2**-0.5], abs=1e-6)
    # a third of it: cos 30, sin 30
    assert one("slerp", [5, 5], [1, 0], [0, 1], t=1 / 3) == pytest.approx([3**0.5 / 2, 0.5], abs=1e-6)


@pytest.mark.parametrize("t", [0, 0.1, 0.5, 0.9, 1])
def test_slerp_against_the_formula(t, budget):
    base, first, second = random_models(6, {"a": (50, 61), "b": (7,)}, 3)
    ours = apply("slerp", base, [first, second], t=t)
    for name in base:
        x, y = first[name].astype(np.float64).ravel(), second[name].astype(np.float64).ravel()
        angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
        expected = (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)
        np.testing.assert_allclose(ours[name].ravel(), expected, atol=2e-6)


def test_slerp_of_nearly_parallel_opposite_and_zero_tensors_is_linear():
    assert one("slerp", [0, 0], [1, 0], [1, 1e-3], t=0.25) == pytest.approx([1, 2.5e-4])
    assert one("slerp", [0, 0], [1, 0], [-1, 0], t=0.25) == pytest.approx([0.5, 0])
    assert one("slerp", [0, 0], [0, 0], [2, 4], t=0.25) == pytest.approx([0.5, 1])


@pytest.mark.parametrize("t", np.linspace(0, 1, 21).tolist())
def test_slerp_of_two_copies_of_the_base_is_the_base(t):
    base = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    ours = apply("slerp", {"w": base}, [{"w": base}, {"w": base}], t=t)["w"]
    assert np.array_equal(ours.astype(np.float32), base)


def test_slerp_takes_two_models():
    with pytest.raises(SettingError, match="merges exactly two models; the pool has 3"):
        one("slerp", [1], [1], [2], [3])


# The simplex.


def nearest_on_simplex(values: np.ndarray) -> np.ndarray:
    """Try every set of entries that may be positive; the nearest feasible point wins."""
    best, least = values, np.inf
    for size in range(1, len(values) + 1):
        for chosen in itertools.combinations(range(len(values)), size):
            point = np.zeros_like(values)
            part = values[list(chosen)]
            point[list(chosen)] = part + (1 - part.sum()) / size
            distance = ((point - values) ** 2).sum()
            if (point >= -1e-12).all() and distance < least:
                best, least = point, distance
    return best


@pytest.mark.parametrize("seed", range(5))
def test_projection_against_brute_force(seed):
    values = np.random.default_rng(seed).normal(size=(5, 8)) * (1 + seed)
    values[:, 0] = 0.2  # already there
    values[:, 1] = values[0, 1]  # all equal
    ours = project_on_simplex(torch.tensor(values)).numpy()
    for column in range(8):
        np.testing.assert_allclose(ours[:, column], nearest_on_simplex(values[:, column]), atol=1e-9)


def test_projection_leaves_the_rest_to_the_current_model():
    inside = torch.tensor([[0.2, 0.0], [0.3, 0.0]], dtype=torch.float64)
    assert torch.allclose(project(inside), inside)
    # (0.9, 0.9, rest -0.8): the rest gets nothing, the two share one
    assert project(torch.tensor([[0.9], [0.9]], dtype=torch.float64)).flatten().tolist() == pytest.approx(
        [0.5, 0.5]
    )


# The stream itself.


def test_blocks_cover_every_element_once_and_in_order(budget):
    base, *members = random_models(7, {"a": (70, 61), "s": (), "e": (0,), "b": (3000,)}, 3)
    seen: dict[str, list[int]] = {}
    for name, start, length in stream_of(base, members).map(lambda b: (b.name, b.start, len(b.base))):
        assert start == sum(seen.setdefault(name, []))
        seen[name].append(length)
    assert {n: sum(v) for n, v in seen.items()} == {"a": 4270, "s": 1, "b": 3000}


def test_a_fold_is_the_same_for_every_number_of_threads(monkeypatch, budget):
    base, *members = random_models(8, {"a": (70, 61), "b": (3000,)}, 3)
    stream, sums = stream_of(base, members), []
    for cores in (1, 5):
        monkeypatch.setattr(_stream.os, "cpu_count", lambda cores=cores: cores)
        sums.append(dict(stream.fold(lambda block: block.deltas.sum(dim=1))))
    assert torch.equal(sums[0][""], sums[1][""])


def test_an_error_in_a_block_ends_the_stream():
    base, *members = random_models(9, {"a": (10,)}, 2)
    threads = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(stream_of(base, members).map(lambda block: 1 / 0))
    assert torch.get_num_threads() == threads
