"""What `germane/tasks/merge/_task.py` promises, held against every registered merge method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from zoo import merge, weights

from germane import method as registry
from germane.core.errors import CheckpointError, SettingError
from germane.tasks.merge._live import LiveMethod
from germane.tasks.merge._rule import Rule

NAMES = registry.names("merge")
# Enough to show the effect on a tiny model.
QUICK = {"adamerging": {"steps": 3, "learning_rate": 0.05}, "frank-wolfe": {"rounds": 3, "step_size": 0.5}}
# A weaker and a stronger setting, where a method has such.
STRENGTH = {
    "adamerging": ({"start": 0.1, "steps": 0}, {"start": 0.4, "steps": 0}),
    "frank-wolfe": (
        {"step": "schedule", "rounds": 1, "step_size": 0.1, "granularity": "task"},
        {"step": "schedule", "rounds": 1, "step_size": 0.6, "granularity": "task"},
    ),
}
# Settings that mean "do nothing", other than `scale` 0.
NOTHING = {"adamerging": {"start": 0.0, "steps": 0}}

each = pytest.mark.parametrize("name", NAMES)


def quick(name: str) -> dict:
    return QUICK.get(name.split("/")[1], {})


def needs(name: str, data: str) -> list[str]:
    return [data] if "data" in registry.load(name).information.needs else []


def members_for(name: str, members: list[Path]) -> list[Path]:
    return members[:2] if name == "merge/slerp" else members


@pytest.fixture(scope="module")
def results(llama, tmp_path_factory):
    """Each method's result on the llama pool, made once."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name.replace("/", "-")) / "out"
            made[name] = merge(
                name,
                llama.base,
                members_for(name, llama.members),
                out,
                data=needs(name, llama.data),
                settings=quick(name),
                seed=7,
            )
        return made[name]

    return get


@each
def test_the_result_loads_in_plain_transformers_without_a_word(name, results, llama):
    folder = results(name).folder
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("w1 w2 w3", return_tensors="pt")
    assert torch.isfinite(model(input_ids=tokens["input_ids"]).logits).all()
    assert not list(folder.glob("*.bin"))


@each
def test_names_shapes_dtypes_files_and_tokenizer_are_the_bases(name, results, llama):
    folder, ours, base = results(name).folder, weights(results(name).folder), weights(llama.base)
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in base.items()
    }
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (folder / file).read_bytes() == (llama.base / file).read_bytes()


@each
def test_something_changed_and_the_evidence_says_how_much(name, results, llama):
    result = results(name)
    change, size = zoo.total_change(weights(result.folder), weights(llama.base)), 0.0
    size = sum(float(t.square().sum()) for t in weights(llama.base).values()) ** 0.5
    assert change > 0
    facts = result.evidence.steps[-1].facts
    assert facts["relative_change"] == pytest.approx(change / size, rel=1e-4)
    assert [f.code for f in result.findings if f.about == "result"] == ["changed"]


@each
def test_every_member_has_a_share_and_a_reason(name, results, llama):
    shares = results(name).shares
    assert [share.member for share in shares] == [m.name for m in members_for(name, llama.members)]
    assert all(share.share >= 0 and share.reason for share in shares)
    assert sum(share.share for share in shares) <= 1 + 1e-6


@each
def test_shards_of_the_base_are_the_shards_of_the_result(name, others, tmp_path, llama):
    base, members = others["sharded"]
    folder = merge(
        name, base, members, tmp_path / "out", data=needs(name, llama.data), settings=quick(name)
    ).folder
    index = json.loads((base / "model.safetensors.index.json").read_text())
    assert json.loads((folder / "model.safetensors.index.json").read_text()) == index
    for file in set(index["weight_map"].values()):
        ours, theirs = zoo.load_file(folder / file), zoo.load_file(base / file)
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    transformers.AutoModelForCausalLM.from_pretrained(folder)


@each
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_half_precision_in_and_out(name, kind, others, tmp_path, llama):
    base, members = others[kind]
    folder = merge(
        name, base, members, tmp_path / "out", data=needs(name, llama.data), settings=quick(name)
    ).folder
    assert {t.dtype for t in weights(folder).values()} == {t.dtype for t in weights(base).values()}


@each
def test_two_copies_of_the_base_give_the_base(name, llama, tmp_path):
    pool = [shutil.copytree(llama.base, tmp_path / f"copy{n}") for n in (1, 2)]
    result = merge(
        name,
        llama.base,
        pool,
        tmp_path / "out",
        data=needs(name, llama.data),
        settings=quick(name),
        decoys="report",
    )
    assert zoo.same_bytes(weights(result.folder), weights(llama.base))
    assert "no-effect" in [finding.code for finding in result.findings]


@each
def test_the_order_of_the_pool_does_not_matter(name, results, llama, tmp_path):
    pool = members_for(name, llama.members)[::-1]
    other = merge(
        name, llama.base, pool, tmp_path / "out", data=needs(name, llama.data), settings=quick(name), seed=7
    )
    assert zoo.distance(weights(other.folder), weights(results(name).folder)) < 1e-5


@each
def test_the_same_seed_gives_the_same_bytes_and_inputs_stay(name, results, llama, tmp_path):
    pool = members_for(name, llama.members)
    before = zoo.digest([llama.base, *pool])
    again = merge(
        name, llama.base, pool, tmp_path / "out", data=needs(name, llama.data), settings=quick(name), seed=7
    )
    assert zoo.same_bytes(weights(again.folder), weights(results(name).folder))
    assert zoo.digest([llama.base, *pool]) == before
    assert not list(tmp_path.glob("*.partial"))


@each
def test_settings_that_mean_nothing_leave_every_bit(name, llama, tmp_path):
    short = name.split("/")[1]
    settings = NOTHING.get(short)
    if settings is None:
        if "scale" not in registry.load(name).model_fields:
            pytest.skip("no setting means nothing")
        settings = {"scale": 0}
    result = merge(
        name, llama.base, llama.members, tmp_path / "out", data=needs(name, llama.data), settings=settings
    )
    assert zoo.same_bytes(weights(result.folder), weights(llama.base))
    assert "no-effect" in [finding.code for finding in result.findings]


@each
def test_stronger_has_no_smaller_effect(name, llama, tmp_path):
    short = name.split("/")[1]
    pair = STRENGTH.get(short)
    if pair is None:
        if "scale" not in registry.load(name).model_fields:
            pytest.skip("no setting of strength")
        pair = ({"scale": 0.2}, {"scale": 0.5})
    base, moved = weights(llama.base), []
    for number, settings in enumerate(pair):
        out = tmp_path / str(number)
        merge(name, llama.base, llama.members, out, data=needs(name, llama.data), settings=settings)
        moved.append(zoo.total_change(weights(out), base))
    assert 0 < moved[0] < moved[1]


@each
def test_an_unknown_setting_is_refused_with_the_nearest_spelling(name, llama, tmp_path):
    field = next(iter(registry.load(name).model_fields))
    with pytest.raises(SettingError, match=rf"settings\.{field}x: unknown setting; did you mean '{field}'"):
        merge(name, llama.base, llama.members, tmp_path / "out", settings={f"{field}x": 1})
    assert not list(tmp_path.iterdir())


@each
def test_every_setting_has_a_meaning_and_a_default(name):
    for field, info in registry.load(name).model_fields.items():
        assert info.description, f"{name}.{field}"
        assert not info.is_required(), f"{name}.{field}: a method runs without settings"


@each
def test_a_method_is_a_rule_or_moves_a_live_model(name):
    kind = registry.load(name)
    assert issubclass(kind, (Rule, LiveMethod))
    assert issubclass(kind, LiveMethod) == ("data" in kind.information.needs)


@each
def test_data_that_is_needed_is_asked_for(name, llama, tmp_path):
    if "data" not in registry.load(name).information.needs:
        pytest.skip("needs none")
    with pytest.raises(SettingError, match="needs data: --data NAME=FILE"):
        merge(name, llama.base, llama.members, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@each
@pytest.mark.parametrize("kind", ["gpt2", "t5", "vit", "classifier"])
def test_every_architecture(name, kind, others, tmp_path):
    """Data-free methods know no architecture."""
    if "data" in registry.load(name).information.needs:
        pytest.skip("reads text with a classifier or a causal language model")
    base, members = others[kind]
    folder = merge(name, base, members, tmp_path / "out").folder
    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    _, report = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {n: t.shape for n, t in weights(folder).items()} == {
        n: t.shape for n, t in weights(base).items()
    }
    assert zoo.total_change(weights(folder), weights(base)) > 0


@each
def test_members_with_heads_of_their_own(name, bert, tmp_path):
    data = bert.data if "data" in registry.load(name).information.needs else []
    folder = merge(name, bert.base, bert.members, tmp_path / "out", data=data, settings=quick(name)).folder
    transformers.AutoModel.from_pretrained(folder)
    for member in bert.members:
        own, kept = weights(member), weights(folder / "heads" / member.name)
        assert kept.keys() == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(kept[key], own[key]) for key in kept)


# The decoy check.


def decoys(llama) -> list[Path]:
    return [llama.random, llama.foreign, llama.again, llama.twin]


@each
def test_decoys_are_refused_by_name(name, llama, tmp_path):
    if name == "merge/slerp":
        pytest.skip("takes two models")
    with pytest.raises(CheckpointError) as caught:
        merge(
            name,
            llama.base,
            [*llama.members, *decoys(llama)],
            tmp_path / "out",
            data=needs(name, llama.data),
        )
    message = str(caught.value)
    for text in (
        "random holds random weights",
        "foreign does not descend from this base",
        "again is the base itself",
        "twin is the same as m1",
        "--decoys drop",
        "--decoys report",
    ):
        assert text in message
    assert "m0 " not in message
    assert "m2 " not in message
    assert not (tmp_path / "out").exists()


@each
def test_dropped_decoys_leave_the_result_of_the_pool_without_them(name, results, llama, tmp_path):
    pool = members_for(name, llama.members)
    extra = decoys(llama)[:2] if name == "merge/slerp" else decoys(llama)
    if name == "merge/slerp":
        pytest.skip("the pool is counted before decoys are dropped")
    result = merge(
        name,
        llama.base,
        [*pool, *extra],
        tmp_path / "out",
        data=needs(name, llama.data),
        settings=quick(name),
        decoys="drop",
        seed=7,
    )
    assert zoo.same_bytes(weights(result.folder), weights(results(name).folder))
    assert {f.about: f.code for f in result.findings if f.severity == "serious"} == {
        "random": "random-weights",
        "foreign": "foreign",
        "again": "duplicate-of-base",
        "twin": "duplicate",
    }


@pytest.mark.parametrize(
    "settings",
    [{}, {"granularity": "task"}, {"variant": "soft", "inner_steps": 5, "rounds": 2}, {"score": "cosine"}],
    ids=lambda s: "-".join(map(str, s.values())) or "default",
)
def test_decoys_do_not_hurt_frank_wolfe(settings, llama, tmp_path):
    settings = {"rounds": 4, **settings}
    clean = merge(
        "frank-wolfe", llama.base, llama.members, tmp_path / "a", data=[llama.data], settings=settings
    )
    crowded = merge(
        "frank-wolfe",
        llama.base,
        [*llama.members, *decoys(llama)],
        tmp_path / "b",
        data=[llama.data],
        settings=settings,
        decoys="report",
    )
    base, one, other = (
        zoo.language_loss(f, llama.rows) for f in (llama.base, clean.folder, crowded.folder)
    )
    assert one < base
    assert other <= one + 0.1
