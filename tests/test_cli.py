"""The command line: flags from the settings, JSON that parses, exit statuses, and no torch for --help."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
import zoo
from zoo import weights

from germane import cli
from germane import method as registry


@pytest.fixture
def germane(capsys, monkeypatch):
    """Run the command in this process: exit status, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["germane", *map(str, words)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def merge_words(llama, out: Path, *more: object) -> list[object]:
    return ["merge", llama.base, *llama.members, "--out", out, *more]


def test_help_and_import_load_no_torch():
    code = (
        "import sys, germane, germane.cli\n"
        "sys.argv = ['germane', '--help']\n"
        "try: germane.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'ray', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for word in ("merge", "run", "compare", "methods", "explain", "papers", "doctor", "demo"):
        assert word in done.stdout


def test_a_merge_with_settings(germane, llama, tmp_path):
    words = merge_words(
        llama, tmp_path / "out", "--method", "task-arithmetic", "--scale", "0.5", "--weights", "1,0,2"
    )
    status, out, _ = germane(*words)
    assert status == 0
    assert str(tmp_path / "out") in out
    base, *members = [weights(folder) for folder in (llama.base, *llama.members)]
    for name, values in weights(tmp_path / "out").items():
        expected = base[name] + 0.5 * (members[0][name] - base[name] + 2 * (members[2][name] - base[name]))
        assert (values - expected).abs().max() < 1e-6


def test_json_is_the_evidence(germane, llama, tmp_path):
    status, out, _ = germane(
        *merge_words(llama, tmp_path / "out", "--method", "ties", "--json", "--seed", "4")
    )
    assert status == 0
    evidence = json.loads(out)
    assert evidence["steps"][0]["method"] == "merge/ties"
    assert evidence["steps"][0]["seed"] == 4
    assert evidence == json.loads((tmp_path / "out" / "evidence.json").read_text())


def test_lists_and_mappings_and_switches(germane, llama, bert, tmp_path):
    status, _, err = germane(
        "merge",
        bert.base,
        bert.pool,
        "--method",
        "frank-wolfe",
        "--rounds",
        "1",
        "--local",
        "ties",
        "--local-settings",
        "density=0.5",
        "--data",
        bert.data[0],
        "--data",
        bert.data[1],
        "--save-tasks",
        "--evaluate",
        bert.data[1],
        "--out",
        tmp_path / "out",
    )
    assert status == 0, err
    step = json.loads((tmp_path / "out" / "evidence.json").read_text())["steps"][0]
    assert step["settings"]["local_settings"] == {"density": 0.5}
    assert step["job"]["save_tasks"] is True
    assert {score["subject"] for score in step["scores"]} == {"base", "result", "own"}
    assert (tmp_path / "out" / "tasks" / "three").is_dir()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "tise"], "no method 'merge/tise'; did you mean 'merge/ties'"),
        (["--method", "ties", "--densty", "1"], "--densty"),
        (
            ["--method", "ties", "--density", "2"],
            "density: input should be less than or equal to 1; got '2'",
        ),
        (["--method", "ties", "--decoys", "drp"], "decoys: must be 'refuse', 'report' or 'drop'"),
        ([], "--method"),
        (["--method", "frank-wolfe"], "needs data: --data NAME=FILE"),
        (["--method", "ties", "--fail-on", "no-effect", "--scale", "0"], "no-effect"),
    ],
)
def test_errors_are_one_message_and_a_status(more, message, germane, llama, tmp_path):
    status, out, err = germane(*merge_words(llama, tmp_path / "out", *more))
    assert status == (3 if "--fail-on" in more else 2)
    assert message in err
    assert "Traceback" not in err
    assert not out


def test_an_unknown_command(germane):
    status, _, err = germane("merg", "a")
    assert status == 2
    assert "no command 'merg'; did you mean 'merge'" in err


@pytest.mark.parametrize("name", registry.names("merge"))
def test_help_shows_every_setting_of_the_method(name, germane):
    status, out, _ = germane("merge", "--method", name.split("/")[1], "--help")
    assert status == 0
    for field in registry.load(name).model_fields:
        assert f"--{field.replace('_', '-')}" in out


def test_a_dry_run_writes_nothing(germane, llama, tmp_path):
    status, out, _ = germane(*merge_words(llama, tmp_path / "out", "--method", "ties", "--dry-run"))
    assert (status, out) == (0, "checked: merge/ties; nothing written.\n")
    assert not list(tmp_path.iterdir())


def test_a_recipe_with_changes(germane, llama, tmp_path):
    file = tmp_path / "r.yaml"
    step = {
        "task": "merge",
        "method": "task-arithmetic",
        "base": str(llama.base),
        "pool": [str(llama.pool)],
    }
    file.write_text(yaml.safe_dump({"steps": [step]}))
    status, _, err = germane("run", file, "--set", "steps.0.settings.scale=0", "--out", tmp_path / "out")
    assert status == 0
    assert "serious: the merged weights equal the base's" in err
    assert zoo.same_bytes(weights(tmp_path / "out"), weights(llama.base))
    assert germane("run", file, "--set", "steps.0", "--out", tmp_path / "x")[0] == 2
    assert germane("run", file, "--dry-run")[1].startswith("checked")


def test_methods_as_json(germane):
    status, out, _ = germane("methods", "merge", "--json")
    assert status == 0
    assert [entry["name"] for entry in json.loads(out)] == registry.names("merge")
    assert germane("methods", "merg")[0] == 2


@pytest.mark.parametrize("name", [*registry.names("merge"), *registry.tasks()])
def test_explain(name, germane):
    status, out, _ = germane("explain", name)
    assert status == 0
    assert out.startswith(f"# {name}")
    if "/" in name:
        assert all(f"| `{field}` |" in out for field in registry.load(name).model_fields)


def test_doctor(germane):
    status, out, _ = germane("doctor")
    assert status == 0
    assert "device: " in out


def test_papers_as_json(germane):
    status, out, _ = germane("papers", "--json")
    assert status == 0
    found = {paper["arxiv"]: paper for paper in json.loads(out)}
    assert found["2404.19296"]["method"] == "route/functional-token"


# Comparisons: each row is a process of its own.


@pytest.fixture(scope="module")
def comparison(llama, tmp_path_factory):
    """Two methods and two seeds; one method's rows fail, though nothing is wrong beforehand."""
    from germane.comparison import compare

    folder = tmp_path_factory.mktemp("compare")
    spoilt = folder / "pool"
    for number, member in enumerate(llama.members[:2]):
        shutil.copytree(member, spoilt / f"m{number}")
    zoo.rewrite(spoilt / "m1", lambda t: {**t, "model.norm.weight": t["model.norm.weight"] * float("nan")})
    arguments = {"base": str(llama.base), "pool": [str(llama.pool)], "evaluate": [llama.data]}
    options = {"methods": ["dare", "average"], "seeds": [0, 1], "arguments": arguments}
    result = compare("merge", out=folder / "out", **options)
    return result, options, spoilt


def test_a_comparison_of_two_methods_and_two_seeds(comparison):
    result, _, _ = comparison
    rows = [(row.label, row.seed, row.status) for row in result.evidence.rows if row.method]
    assert rows == [(name, seed, "done") for name in ("dare", "average") for seed in (0, 1)]
    assert "base" in [row.label for row in result.evidence.rows if row.status == "reference"]
    scores = {(row.label, row.seed): row.scores[0].value for row in result.evidence.rows if row.method}
    assert scores["average", 0] == scores["average", 1]
    assert scores["dare", 0] != scores["dare", 1]
    assert all(
        row.seconds > 0 and row.peak_memory_bytes > 1e6 for row in result.evidence.rows if row.method
    )
    assert not list(result.folder.rglob("*.safetensors"))
    assert {"evidence.json", "report.html"} <= {file.name for file in result.folder.iterdir()}


def test_resume_runs_only_what_is_missing(comparison, monkeypatch):
    from germane import comparison as module

    result, options, _ = comparison
    missing = result.folder / "rows" / "dare-seed1"
    shutil.rmtree(missing)
    ran = []
    original = module.run_cell
    monkeypatch.setattr(
        module, "run_cell", lambda cell, *more: (ran.append(cell.folder.name), original(cell, *more))
    )
    again = module.compare("merge", out=result.folder, resume=True, **options)
    assert ran == ["dare-seed1"]
    assert [row.scores for row in again.evidence.rows] == [row.scores for row in result.evidence.rows]


def test_a_row_that_fails_is_a_row(comparison, llama, tmp_path):
    from germane.comparison import compare

    _, _, spoilt = comparison
    arguments = {"base": str(llama.base), "pool": [str(spoilt)], "evaluate": [llama.data]}
    result = compare("merge", methods=["average"], out=tmp_path / "out", arguments=arguments)
    (row,) = [row for row in result.evidence.rows if row.method]
    assert row.status == "failed"
    assert "model.norm.weight holds NaN or infinite numbers" in row.error


def test_a_comparison_is_checked_before_any_row(germane, llama, tmp_path):
    words = ["compare", "merge", llama.base, llama.pool, "--out", tmp_path / "out"]
    for more, message in (
        (["--methods", "average,tise"], "did you mean 'merge/ties'"),
        (["--methods", "average", "--seeds", "x"], "--seeds: must be whole numbers"),
        (
            ["--methods", "average", "--vary", "ties.density=0.1,0.2"],
            "ties: settings for a method that is not compared",
        ),
        (["--methods", "ties", "--vary", "ties.density=0.1,2"], "less than or equal to 1"),
        (["--methods", "ties", "--set", "density=1"], "must be METHOD.SETTING=value"),
    ):
        status, _, err = germane(*words, *more)
        assert status == 2
        assert message in err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rows_on_ray(llama, tmp_path, monkeypatch):
    from germane.comparison import compare

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    arguments = {"base": str(llama.base), "pool": [str(llama.pool)], "evaluate": [llama.data]}
    result = compare(
        "merge", methods=["average", "ties"], out=tmp_path / "out", arguments=arguments, on="ray"
    )
    here = compare("merge", methods=["average", "ties"], out=tmp_path / "here", arguments=arguments)
    assert [row.status for row in result.evidence.rows if row.method] == ["done", "done"]
    assert [row.scores for row in result.evidence.rows] == [row.scores for row in here.evidence.rows]
