"""Bad input ends in one error that names the file and says what to do, and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import zoo
from zoo import merge, rewrite

from germane.core import checkpoint
from germane.core.errors import (
    CheckpointError,
    GermaneError,
    MissingExtra,
    NoSpace,
    OutputExists,
    RecordsError,
    SettingError,
    UnknownName,
)


def copy(llama, tmp_path: Path, number: int = 0) -> Path:
    """A member to spoil."""
    return Path(shutil.copytree(llama.members[number], tmp_path / "spoilt"))


def refused(error: type[GermaneError], *parts: str, out: Path, call) -> str:
    """The call raises that error, its message holds the parts, and nothing was written."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert not out.exists()
    partial = out.with_name(out.name + ".partial")
    assert not partial.exists(), list(partial.rglob("*"))
    return message


@pytest.fixture
def attempt(llama, tmp_path):
    """Merge the good members with a spoilt one; what must hold of the refusal."""

    def run(error, *parts, pool=None, method="average", base=None, out=None, **options):
        out = out or tmp_path / "out"
        pool = [llama.members[1], tmp_path / "spoilt"] if pool is None else pool
        return refused(
            error, *parts, out=out, call=lambda: merge(method, base or llama.base, pool, out, **options)
        )

    return run


NAME = "model.layers.1.mlp.up_proj.weight"

# What is done to the tensors -> what the message says.
TENSORS = {
    "missing": (lambda t: {n: v for n, v in t.items() if n != NAME}, f"tensor missing: {NAME}"),
    "extra": (lambda t: {**t, "model.extra": torch.ones(2)}, "tensor the base does not have: model.extra"),
    "shape": (
        lambda t: {**t, NAME: torch.ones(40, 16)},
        f"{NAME} has shape [40, 16], the base has [32, 16]",
    ),
    "nan": (
        lambda t: {**t, NAME: t[NAME].index_fill(0, torch.tensor([3]), torch.nan)},
        f"{NAME} holds NaN or infinite",
    ),
    "inf": (
        lambda t: {**t, NAME: t[NAME].index_fill(0, torch.tensor([31]), -torch.inf)},
        f"{NAME} holds NaN or infinite",
    ),
    "int8": (
        lambda t: {**t, NAME: t[NAME].to(torch.int8)},
        "a quantised model has to be dequantised first",
    ),
    "fp8": (
        lambda t: {**t, NAME: t[NAME].to(torch.float8_e4m3fn)},
        "dtype F8_E4M3, which cannot be computed with",
    ),
    "vocabulary size": (
        lambda t: {**t, "model.embed_tokens.weight": torch.ones(70, 16)},
        "vocabularies differ: resize the member's embeddings",
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_a_spoilt_tensor(kind, llama, tmp_path, attempt):
    change, message = TENSORS[kind]
    rewrite(copy(llama, tmp_path), change)
    attempt(CheckpointError, str(tmp_path / "spoilt"), message)


def test_every_fault_is_told_at_once_but_not_a_thousand(llama, tmp_path, attempt):
    rewrite(copy(llama, tmp_path), lambda t: dict(sorted(t.items())[:8]))
    message = attempt(CheckpointError, "tensor missing", "more of this kind")
    assert len(message.split("\n")) == 12


def spoil_bytes(file: Path, data: bytes) -> None:
    file.write_bytes(data)


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def file_with_header(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


FILES = {
    "empty": (b"", "truncated or no safetensors file (0 bytes)"),
    "short": (b"abc", "truncated or no safetensors file"),
    "a long header": ((1 << 60).to_bytes(8, "little") + b"{}", "truncated or no safetensors file"),
    "no JSON": (
        (4).to_bytes(8, "little") + b"\xff\xfe{]" + b"\0" * 8,
        "header is damaged; download it again",
    ),
    "a list": (file_with_header([1, 2]), "header is damaged"),
    "no dtype": (file_with_header({"a": {"shape": [2]}}), "header is damaged"),
    "three offsets": (
        file_with_header({"a": {**HEADER["a"], "data_offsets": [0, 4, 8]}}),
        "header is damaged",
    ),
    "text for shape": (file_with_header({"a": {**HEADER["a"], "shape": ["x"]}}), "header is damaged"),
    "wrong length": (file_with_header({"a": {**HEADER["a"], "shape": [3]}}), "a has 8 bytes for (3,)"),
    "too short": (file_with_header(HEADER, b"\0" * 5), "truncated: its header promises"),
    "too long": (file_with_header(HEADER, b"\0" * 50), "truncated: its header promises"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_spoilt_file(kind, llama, tmp_path, attempt):
    data, message = FILES[kind]
    file = copy(llama, tmp_path) / "model.safetensors"
    file.write_bytes(data)
    attempt(CheckpointError, str(file), message)


def test_a_truncated_download(llama, tmp_path, attempt):
    file = copy(llama, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    attempt(CheckpointError, str(file), "truncated", "download or copy it again")


def test_a_missing_shard(others, tmp_path):
    base, members = others["sharded"]
    broken = shutil.copytree(base, tmp_path / "broken")
    sorted(broken.glob("*.safetensors"))[1].unlink()
    refused(
        CheckpointError,
        str(broken),
        "names model-00002",
        "which is not there",
        out=tmp_path / "out",
        call=lambda: merge("average", base, [*members, broken], tmp_path / "out"),
    )


def test_pickles_are_not_opened(llama, tmp_path, attempt):
    folder = copy(llama, tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    attempt(
        CheckpointError, "holds only pytorch_model.bin, a pickle, which can run code", "save_pretrained()"
    )


def test_no_weights_at_all(llama, tmp_path, attempt):
    (copy(llama, tmp_path) / "model.safetensors").unlink()
    attempt(CheckpointError, "holds no safetensors file")


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_spoilt_config(text, llama, tmp_path, attempt):
    folder = copy(llama, tmp_path)
    (folder / "config.json").write_text(text)
    attempt(CheckpointError, str(folder / "config.json"))


def test_the_same_words_in_another_order(llama, tmp_path, attempt):
    folder = copy(llama, tmp_path)
    zoo.tokenizer(zoo.WORDS[::-1]).save_pretrained(folder)
    attempt(CheckpointError, str(folder), "vocabulary differs", "'w0' is number 4 in the base and 63 here")


def test_a_member_without_a_tokenizer_uses_the_bases(llama, tmp_path):
    folder = copy(llama, tmp_path)
    (folder / "tokenizer.json").unlink()
    merge("average", llama.base, [folder], tmp_path / "out")


def test_an_added_word(llama, tmp_path, attempt):
    folder = copy(llama, tmp_path)
    zoo.tokenizer([*zoo.WORDS[:-1], "other"]).save_pretrained(folder)
    attempt(CheckpointError, "vocabulary differs", "'w59' of the base is not there")


def test_another_architecture(llama, others, attempt):
    attempt(CheckpointError, "another architecture than the base: 0 of", pool=[others["gpt2"][0]])


def test_every_spoilt_member_is_named_at_once(llama, tmp_path, attempt, others):
    spoilt = copy(llama, tmp_path) / "model.safetensors"
    spoilt.write_bytes(b"")
    message = attempt(CheckpointError, str(spoilt), pool=[tmp_path / "spoilt", others["t5"][0]])
    assert len(message.split("\n")) == 2


@pytest.mark.parametrize("kind", ["no path", "empty glob", "no folder", "a file", "empty folder"])
def test_pools_that_are_none(kind, llama, tmp_path, attempt):
    (tmp_path / "empty").mkdir()
    pool, message = {
        "no path": ([], "the pool is empty"),
        "empty glob": ([f"{tmp_path}/*/nothing"], "the pool is empty: nothing found at"),
        "no folder": ([tmp_path / "nowhere"], "no such folder, and not a hub id"),
        "a file": ([llama.base / "config.json"], "is a file; name the folder that holds it"),
        "empty folder": ([tmp_path / "empty"], "has no config.json; is it a model folder?"),
    }[kind]
    attempt(CheckpointError, message, pool=pool)


def test_a_hub_id_that_is_not_there_offline(attempt, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    attempt(
        CheckpointError,
        "nobody/nothing: no such folder here, and the hub did not give it",
        pool=["nobody/nothing"],
    )


def test_a_member_equal_to_the_base(llama, attempt):
    attempt(
        CheckpointError, "again is the base itself", "--decoys drop", pool=[llama.members[0], llama.again]
    )


def test_dropping_everything(llama, attempt):
    attempt(CheckpointError, "every member was dropped as a decoy", pool=[llama.again], decoys="drop")


# Names and settings.


def test_names_and_settings(llama, attempt):
    attempt(UnknownName, "no method 'merge/tise'; did you mean 'merge/ties'", method="tise")
    attempt(
        SettingError,
        "settings.densty: unknown setting; did you mean 'density'",
        method="ties",
        settings={"densty": 1},
    )
    attempt(
        SettingError,
        "settings.density: input should be less than or equal to 1; got 3",
        method="ties",
        settings={"density": 3},
    )
    attempt(SettingError, "steps[0].decoy: unknown setting; did you mean 'decoys'", decoy="drop")
    attempt(
        SettingError,
        "steps[0].decoys: must be 'refuse', 'report' or 'drop'; got 'dropp'; did you mean 'drop'",
        decoys="dropp",
    )


# Data.


def rows_file(tmp_path: Path, rows: list, name: str = "d.jsonl") -> Path:
    return zoo.write_rows(tmp_path / name, rows)


def bad_data(tmp_path: Path) -> dict[str, tuple[object, type[GermaneError], str]]:
    good = {"text": "w1 w2", "label": 0}
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00\x81\n")
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "object.json").write_text('{"text": "a"}')
    (tmp_path / "none.json").write_text("{")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "words.txt").write_text("a")
    (tmp_path / "binary.csv").write_bytes(b"text,label\n\xff\xfe,1\n")
    return {
        "no file": (f"d={tmp_path / 'none.jsonl'}", RecordsError, "none.jsonl: no such file"),
        "binary": (f"d={tmp_path / 'binary.jsonl'}", RecordsError, "binary.jsonl: cannot be read"),
        "binary csv": (f"d={tmp_path / 'binary.csv'}", RecordsError, "binary.csv: cannot be read"),
        "broken": (f"d={tmp_path / 'broken.jsonl'}", RecordsError, "broken.jsonl, line 2: not JSON"),
        "a list": (f"d={tmp_path / 'list.jsonl'}", RecordsError, "list.jsonl, line 1: must be an object"),
        "an object": (f"d={tmp_path / 'object.json'}", RecordsError, "must hold a list of objects"),
        "no JSON": (f"d={tmp_path / 'none.json'}", RecordsError, "none.json: not JSON"),
        "empty": (f"d={tmp_path / 'empty.jsonl'}", RecordsError, "empty.jsonl: holds no records"),
        "another kind": (
            f"d={tmp_path / 'words.txt'}",
            RecordsError,
            "germane reads .jsonl, .json, .csv and .parquet",
        ),
        "no field": (
            {"name": "d", "path": str(rows_file(tmp_path, [good, {"txt": "a"}], "f.jsonl"))},
            RecordsError,
            "f.jsonl, record 2: has no text in field 'text'; did you mean 'txt'? Fields: txt.",
        ),
        "no pair": (
            {"name": "d", "path": str(rows_file(tmp_path, [good], "p.jsonl")), "pair": "second"},
            RecordsError,
            "has no text in field 'second'",
        ),
        "unknown key": (
            {"name": "d", "path": "x.jsonl", "lable": "y"},
            SettingError,
            "unknown setting; did you mean 'label'",
        ),
        "long prompt": (
            {
                "name": "d",
                "path": str(rows_file(tmp_path, [{"prompt": "w1 " * 60, "answer": "w2"}], "l.jsonl")),
                "max_tokens": 20,
            },
            RecordsError,
            "record 1: nothing is left to predict in its first 20 tokens",
        ),
        "hub, no library": ("someone/things", MissingExtra, "pip install 'germane[data]'"),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "no file",
        "binary",
        "binary csv",
        "broken",
        "a list",
        "an object",
        "no JSON",
        "empty",
        "another kind",
        "no field",
        "no pair",
        "unknown key",
        "long prompt",
        "hub, no library",
    ],
)
def test_data(kind, llama, tmp_path_factory, attempt, monkeypatch):
    data, error, message = bad_data(tmp_path_factory.mktemp("data"))[kind]
    if error is MissingExtra:
        monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    attempt(error, message, method="frank-wolfe", pool=llama.members, data=[data])


@pytest.fixture
def with_heads(bert, tmp_path):
    def run(error, *parts, **options):
        options = {"method": "frank-wolfe", "data": bert.data, **options}
        method = options.pop("method")
        out = tmp_path / "out"
        return refused(
            error, *parts, out=out, call=lambda: merge(method, bert.base, bert.members, out, **options)
        )

    return run


def test_labels_unknown_to_the_head(with_heads, tmp_path):
    file = rows_file(tmp_path, [{"text": "w1", "label": 0}, {"text": "w2", "label": 2}])
    with_heads(
        RecordsError, "record 2: label 2 is none of the model's 2: LABEL_0, LABEL_1", data=[f"two={file}"]
    )


def test_data_that_names_no_members_head(with_heads, bert, tmp_path):
    data = {"name": "other", "path": bert.data[0].partition("=")[2]}
    with_heads(
        RecordsError,
        "data 'other': no member 'other' with a head to read it; set its `head` to one of two, three",
        data=[data],
    )
    with_heads(RecordsError, "no member 'tow' with a head", data=[{**data, "head": "tow"}])
    with_heads(RecordsError, "no member 'other'", method="average", data=[], evaluate=[data])


def test_a_head_where_there_is_none(llama, attempt):
    data = {"name": "d", "path": llama.data.partition("=")[2], "head": "m0"}
    attempt(
        RecordsError,
        "no member of the pool has a head of its own",
        pool=llama.members,
        method="frank-wolfe",
        data=[data],
    )


@pytest.mark.parametrize(
    "rows", [[{"text": "w1"}], [{"text": "w1", "label": 1}, {"text": "w1", "label": None}]]
)
def test_records_without_labels(rows, with_heads, tmp_path):
    file = rows_file(tmp_path, rows)
    with_heads(
        RecordsError,
        f"{file}, record {len(rows)}: has no field 'label'",
        "objective=entropy",
        data=[f"two={file}"],
    )


def test_some_labels_are_no_harm_to_entropy(bert, tmp_path):
    file = rows_file(tmp_path, [{"text": "w1 w3", "label": 1}, {"text": "w2 w3"}])
    merge(
        "adamerging", bert.base, bert.members, tmp_path / "out", data=[f"two={file}"], settings={"steps": 1}
    )


def test_a_dropped_members_head_reads_nothing(bert, tmp_path):
    """The other member's head must not read its data instead."""
    random = zoo.save(transformers.BertForSequenceClassification(zoo.bert_config()), tmp_path / "random")
    file = rows_file(tmp_path, [{"text": "w1 w3", "label": 1}])
    refused(
        CheckpointError,
        "random",
        "cannot be dropped: its head reads data 'random'",
        out=tmp_path / "out",
        call=lambda: merge(
            "frank-wolfe",
            bert.base,
            [bert.members[0], random],
            tmp_path / "out",
            data=[f"random={file}"],
            decoys="drop",
        ),
    )


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_models_that_read_no_records(kind, others, llama, tmp_path):
    base, members = others[kind]
    refused(
        CheckpointError,
        str(base) if kind == "vit" else "T5ForConditionalGeneration",
        out=tmp_path / "out",
        call=lambda: merge("frank-wolfe", base, members, tmp_path / "out", data=[llama.data]),
    )


# The place of the result.


def test_a_folder_that_is_there(llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputExists, match="is there already; choose another --out, or --overwrite it"):
        merge("average", llama.base, llama.members, out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    merge("average", llama.base, llama.members, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert not list(tmp_path.glob("out.*"))


def test_an_empty_folder_is_no_obstacle(llama, tmp_path):
    (tmp_path / "out").mkdir()
    merge("average", llama.base, llama.members, tmp_path / "out")
    assert not list(tmp_path.glob("out.*"))


def test_what_an_earlier_kill_left_is_cleared(llama, tmp_path):
    for name in ("out", "out.old", "out.partial/1-merge.tmp", "out.partial/9-other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "left.txt").write_text("left")
    result = merge("average", llama.base, llama.members, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not (result.folder / "left.txt").exists()


def test_inputs_are_not_replaced(llama, tmp_path):
    pool = shutil.copytree(llama.pool, tmp_path / "pool")
    before = zoo.digest([pool])
    for out in (pool, pool / "m0"):
        with pytest.raises(OutputExists, match="which the run reads; choose another --out"):
            merge("average", llama.base, [pool], out, overwrite=True)
    with pytest.raises(OutputExists, match="which the run reads"):
        merge("average", llama.base, [f"{pool}/m*"], pool, overwrite=True)
    assert zoo.digest([pool]) == before


def test_a_place_where_nothing_can_be_written(llama, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="cannot be written"):
        merge("average", llama.base, llama.members, tmp_path / "file" / "out")


def test_another_run_is_writing(llama, tmp_path):
    import fcntl

    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputExists, match="another run is writing it now"):
            merge("average", llama.base, llama.members, tmp_path / "out")
    merge("average", llama.base, llama.members, tmp_path / "out")


# The disk.


def test_too_little_room_is_known_before_the_work(llama, attempt, monkeypatch):
    usage = SimpleNamespace(total=1, used=1, free=1 << 20)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    attempt(
        NoSpace, "out", "the disk has 0.00 GB free; make room or choose another --out", pool=llama.members
    )


@pytest.mark.parametrize("allowed", [0, 1, 2, 7, 20])
def test_the_disk_fills_up_while_tensors_are_written(allowed, llama, attempt, monkeypatch):
    calls, original = [], os.pwrite

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > allowed:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    attempt(NoSpace, "the disk took no more: No space left on device", pool=llama.members)


@pytest.mark.parametrize("what", ["copyfile", "fsync"])
def test_the_disk_fills_up_elsewhere(what, llama, attempt, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil if what == "copyfile" else os, what, full)
    attempt(NoSpace, "out: the disk is full: make room and try again", pool=llama.members)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of half a megabyte, where root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk, llama, monkeypatch):
    out = small_disk / "out"
    call = lambda: merge("average", llama.base, llama.members, out)  # noqa: E731
    refused(NoSpace, "make room", out=out, call=call)
    monkeypatch.setattr("germane.tasks.merge._task.require_space", lambda *_: None)
    (small_disk / "ballast").write_bytes(b"\0" * (505 << 10))
    refused(NoSpace, "disk", out=out, call=call)
    (small_disk / "ballast").unlink()
    call()
    transformers.AutoModelForCausalLM.from_pretrained(out)
