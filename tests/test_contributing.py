"""Do what CONTRIBUTING.md says a newcomer does, with its own text."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = re.compile(r"<!-- example: (\S+) -->\n```python\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the example's two files added."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    examples = EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert [file for file, _ in examples] == [
        "src/germane/tasks/merge/nearest.py",
        "tests/merge/test_nearest.py",
    ]
    for file, text in examples:
        (copy / file).write_text(text, encoding="utf-8")
    return copy


def run(checkout: Path, *command: str) -> str:
    environment = {"PYTHONPATH": str(checkout / "src"), "PATH": str(Path(sys.executable).parent)}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=checkout, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_method_explains_itself(checkout: Path):
    page = run(checkout, "germane", "explain", "merge/nearest")
    assert "applied to the move that is taken" in page


def test_its_own_test_and_the_contract_tests_pass(checkout: Path):
    said = run(
        checkout, "pytest", "tests/merge/test_nearest.py", "tests/contracts/test_merge.py", "-k", "nearest"
    )
    assert "passed" in said
