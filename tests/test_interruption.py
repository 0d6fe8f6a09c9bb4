"""A run that is killed leaves nothing under the final name that is not whole, and the next one succeeds."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
import zoo
from zoo import weights


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A few megabytes, so that the merge takes a while."""
    place = tmp_path_factory.mktemp("larger")
    config = zoo.llama_config(
        hidden_size=160, intermediate_size=640, num_hidden_layers=8, num_attention_heads=4
    )
    base = zoo.save(zoo.make(transformers.LlamaForCausalLM, config), place / "base", shard="4MB")
    members = [zoo.vary(base, place / "pool" / f"m{n}", n, size=0.002) for n in range(6)]
    return SimpleNamespace(base=base, members=members, pool=place / "pool")


def start(*words: object) -> subprocess.Popen:
    """The command as a child, in a process group of its own, that can be interrupted."""
    spoken = {name: value for name, value in os.environ.items() if name != "GERMANE_QUIET"}
    return subprocess.Popen(
        [sys.executable, "-m", "germane", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background has its children ignore interruptions.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**spoken, "OMP_NUM_THREADS": "1"},
    )


def wait_for(path: Path, child: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def words(larger, out: Path) -> list[object]:
    return ["merge", larger.base, larger.pool, "--method", "ties", "--out", out, "--overwrite"]


def whole(folder: Path) -> bool:
    """Everything that belongs to a result is there, and it loads."""
    json.loads((folder / "evidence.json").read_text())
    assert (folder / "report.html").exists()
    _, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.fixture(scope="module")
def reference(larger, tmp_path_factory):
    """The result of a run nobody stopped, and how long it works once it has begun."""
    out = tmp_path_factory.mktemp("reference") / "out"
    child = start(*words(larger, out))
    wait_for(out.with_name("out.partial"), child)
    begun = time.monotonic()
    _, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    return SimpleNamespace(weights=weights(out), seconds=time.monotonic() - begun)


MOMENTS = [random.Random(7).uniform(0, 1.05) for _ in range(10)]


@pytest.mark.parametrize("share", MOMENTS[:3])
def test_killed(share, larger, reference, tmp_path):
    kill_at(share, larger, reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("share", MOMENTS[3:])
def test_killed_at_more_moments(share, larger, reference, tmp_path):
    kill_at(share, larger, reference, tmp_path)


def kill_at(share: float, larger, reference, tmp_path: Path) -> None:
    """SIGKILL after that share of the working time; then the same command again, in this process."""
    out = tmp_path / "out"
    child = start(*words(larger, out))
    wait_for(tmp_path / "out.partial", child)
    time.sleep(share * reference.seconds)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    if out.exists():
        assert whole(out)
        assert zoo.same_bytes(weights(out), reference.weights)
    result = zoo.merge("ties", larger.base, [larger.pool], out, overwrite=True)
    assert whole(result.folder)
    assert zoo.same_bytes(weights(out), reference.weights)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_from_the_keyboard(larger, tmp_path):
    out = tmp_path / "out"
    child = start(*words(larger, out))
    wait_for(tmp_path / "out.partial" / "1-merge.tmp", child)
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert [line for line in err.strip().split("\n") if "checking" not in line] == [
        "stopped; finished steps are kept: the same command with --resume goes on."
    ]
    assert not out.exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_recipe_killed_in_its_second_step_goes_on_with_it(larger, tmp_path):
    first = {
        "task": "merge",
        "method": "average",
        "name": "first",
        "base": str(larger.base),
        "pool": [str(m) for m in larger.members[:2]],
    }
    second = {
        "task": "merge",
        "method": "ties",
        "name": "second",
        "base": str(larger.base),
        "pool": ["step:first", str(larger.members[2])],
    }
    file, out = tmp_path / "recipe.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({"steps": [first, second]}))
    child = start("run", file, "--out", out)
    wait_for(tmp_path / "out.partial" / "second.tmp", child)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert not out.exists()
    kept = tmp_path / "out.partial" / "first"
    made = {file.name: file.stat().st_mtime_ns for file in kept.glob("*.safetensors")}
    again = start("run", file, "--out", out, "--resume")
    _, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "first: taken over from the earlier run" in err
    steps = out / "steps" / "first"
    assert {file.name: file.stat().st_mtime_ns for file in steps.glob("*.safetensors")} == made
    assert whole(out)
    expected = [weights(m) for m in larger.members[:2]]
    ours = weights(steps)
    for name in ours:
        torch.testing.assert_close(ours[name], (expected[0][name] + expected[1][name]) / 2)
    assert not (tmp_path / "out.partial").exists()
