"""Recipes: what a run does, checked whole, then done step by step, stopped and resumed.

A recipe is a YAML file or the same as Python values; a single command such as `germane merge` is a
recipe of one step. Paths in it are relative to the working directory; `step:NAME` stands for the
result of an earlier step.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from germane.core.errors import EffectError, NoSpace, OutputExists, SettingError
from germane.core.evidence import Evidence, Finding, Score, Share, Step, peak_memory
from germane.core.progress import announce
from germane.core.records import Data
from germane.core.settings import Settings, validate
from germane.job import REFERENCE, Job, is_reference, job_class, records_of
from germane.method import Method, build

_OWN_KEYS = ("task", "method", "name", "settings")


class Recipe(Settings):
    """A recipe as written: steps, evaluations, and where the result goes."""

    title: str = Field(default="", description="what the run is called in its report")
    seed: int = Field(default=0, ge=0, description="seed of everything random")
    out: str = Field(default="", description="folder of the result; --out overrides it")
    steps: list[dict[str, Any]] = Field(
        min_length=1, description="each: task, method, settings, name, and the task's own arguments"
    )
    evaluate: list[Data] = Field(default=[], description="records the last step's result is scored on")
    card: dict[str, Any] = Field(default={}, description="front matter of the model card")
    fail_on: list[str] = Field(
        default=[], description="codes of findings that make the run end with exit status 3"
    )


@dataclass(frozen=True)
class Planned:
    """A step of a recipe, every key of it checked."""

    name: str
    method: Method
    arguments: dict[str, Any]
    kind: type[Job]
    place: str

    def job(self, results: Mapping[str, Path]) -> Job:
        """The task's arguments, with references to earlier steps replaced by their folders."""
        return validate(self.kind, _resolve(self.arguments, results), self.place)

    @property
    def waits(self) -> bool:
        """Whether it needs an earlier step's result."""
        return any(is_reference(text) for text in _texts(self.arguments))


@dataclass(frozen=True)
class Result:
    """What a run left.

    Attributes:
        folder: The result: a Hugging Face folder with evidence, report and model card beside.
        evidence: The same as `evidence.json`.
    """

    folder: Path
    evidence: Evidence

    @property
    def scores(self) -> list[Score]:
        """Scores of the result, and of what it is compared with."""
        return self.evidence.scores

    @property
    def shares(self) -> list[Share]:
        """What each member of the pool gave, and why."""
        return self.evidence.steps[-1].shares

    @property
    def findings(self) -> list[Finding]:
        """What the checks of inputs and effect had to say."""
        return self.evidence.findings


def read_recipe(file: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a YAML file, with some keys replaced.

    Args:
        file: The YAML file.
        changes: Path to a key, such as "steps.0.settings.density", -> its new value.

    Raises:
        SettingError: No such file, no YAML, or a key that is unknown.
    """
    path = Path(file)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{path}: no such recipe.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingError(f"{path}: must hold a mapping with `steps`.")
    for key, value in (changes or {}).items():
        _set(content, key, value)
    return validate(Recipe, content, path.name)


def _set(content: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(content, dict):
            content[part] = content.get(part) or {}
        content = content[_index(content, key, part)]
    content[_index(content, key, last)] = value


def _index(content: Any, key: str, part: str) -> Any:
    """`part` of the path `key` as what indexes `content`, a mapping or a list."""
    if isinstance(content, dict):
        return part
    if not isinstance(content, list):
        raise SettingError(f"--set {key}: {part!r} is sought in {content!r}, which holds no keys.")
    if not part.isdigit() or int(part) >= len(content):
        raise SettingError(f"--set {key}: there is no item {part}; the list has {len(content)}.")
    return int(part)


def plan(recipe: Recipe) -> list[Planned]:
    """Every step with its keys, settings and references checked; no file is opened."""
    planned: list[Planned] = []
    for number, step in enumerate(recipe.steps):
        place = f"steps[{number}]"
        for key in ("task", "method"):
            if not isinstance(step.get(key), str):
                raise SettingError(f"{place}.{key}: required, but not given.")
        task, method = step["task"], step["method"].removeprefix(f"{step['task']}/")
        arguments = {key: value for key, value in step.items() if key not in _OWN_KEYS}
        if number == len(recipe.steps) - 1 and recipe.evaluate:
            arguments["evaluate"] = [*(arguments.get("evaluate") or []), *_plain(recipe.evaluate)]
        name = str(step.get("name") or f"{number + 1}-{task}")
        if not re.fullmatch(r"\w[\w-]*", name):
            raise SettingError(f"{place}.name: must be letters, digits, _ and -; got {name!r}.")
        _check_references(arguments, [earlier.name for earlier in planned], place)
        kind = job_class(task)
        validate(kind, arguments, place)
        settings = step.get("settings") or {}
        if not isinstance(settings, dict):
            raise SettingError(f"{place}.settings: must be a mapping; got {settings!r}.")
        chosen = build(f"{task}/{method}", settings, f"{place}.settings")
        planned.append(Planned(name, chosen, arguments, kind, place))
    if len({step.name for step in planned}) < len(planned):
        raise SettingError("steps: two steps have the same name.")
    return planned


def _plain(values: list[Data]) -> list[dict[str, Any]]:
    return [value.model_dump(exclude_defaults=True) for value in values]


def _check_references(value: Any, known: list[str], place: str) -> None:
    for text in _texts(value):
        if is_reference(text) and text.removeprefix(REFERENCE) not in known:
            earlier = ", ".join(known) or "none"
            raise SettingError(f"{place}: {text!r} names no earlier step. Earlier: {earlier}.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _resolve(value: Any, results: Mapping[str, Path]) -> Any:
    if isinstance(value, str) and is_reference(value):
        return str(results.get(value.removeprefix(REFERENCE), value))
    if isinstance(value, dict):
        return {key: _resolve(item, results) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, results) for item in value]
    return value


def check(recipe: Recipe) -> list[Planned]:
    """Everything that can be known before the work: keys, files, shapes, records.

    What hangs on an earlier step's result is checked when that is there.
    """
    planned = plan(recipe)
    for step in planned:
        job = step.job({})
        if step.waits:
            job.check_early(step.method)
        else:
            job.check(step.method)
    return planned


def run(
    recipe: Recipe,
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Run a recipe; the folder appears under its name when everything in it is complete.

    Args:
        recipe: What to do.
        out: Folder of the result; the recipe's own `out` if not given.
        resume: Take over the finished steps of an earlier run that was stopped.
        overwrite: Replace the folder if it is there.

    Raises:
        GermaneError: Before any work for what can be known before; see `germane.core.errors`.
        EffectError: After the run, for findings named in `fail_on`; the result is kept.
    """
    target = Path(out or recipe.out)
    if not str(out or recipe.out):
        raise SettingError("out: say where the result goes, with --out or in the recipe.")
    if target.exists() and not overwrite and (target.is_file() or any(target.iterdir())):
        raise OutputExists(f"{target}: is there already; choose another --out, or --overwrite it.")
    planned = check(recipe)
    _keep_inputs(target, planned)
    evidence = Evidence.begin(recipe.title or target.name, recipe.model_dump(exclude_defaults=True))
    with _workshop(target, resume) as workshop:
        results: dict[str, Path] = {}
        for step in planned:
            results[step.name] = workshop / step.name
            done = _run_step(step, recipe.seed, workshop, results, resume, evidence.steps)
            evidence.steps.append(done)
        final = _finish(evidence, recipe, workshop, planned)
        _put_in_place(final, target)
    shutil.rmtree(workshop, ignore_errors=True)
    _judge(evidence, recipe.fail_on)
    return Result(target, evidence)


def _paths(job: Job) -> Iterator[str]:
    """The files and folders a job reads."""
    yield from (data.path for data in records_of(job))
    for name in job.paths:
        value = getattr(job, name)
        yield from filter(None, value if isinstance(value, list) else [value])


def _keep_inputs(target: Path, planned: list[Planned]) -> None:
    """Refuse to replace a folder that holds what the run reads."""
    for step in planned:
        for text in _paths(step.job({})):
            for found in glob.glob(str(Path(text).expanduser())):
                path = Path(found).resolve()
                in_pool = path == target.resolve().parent and not (path / "config.json").exists()
                if target.exists() and (in_pool or target.resolve() in (path, *path.parents)):
                    raise OutputExists(
                        f"{target}: holds {text}, which the run reads; choose another --out."
                    )


@contextlib.contextmanager
def _workshop(target: Path, resume: bool) -> Iterator[Path]:
    """The sibling folder in which the result is made; locked, so that two runs cannot share it."""
    workshop = target.absolute().with_name(target.name + ".partial")
    try:
        workshop.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"out: {target}: cannot be written: {error.strerror}.") from None
    with (workshop / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputExists(f"{target}: another run is writing it now.") from None
        for entry in workshop.iterdir():
            if entry.is_dir() and (not resume or entry.name.endswith(".tmp")):
                shutil.rmtree(entry)
        try:
            yield workshop
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise NoSpace(f"{target}: the disk is full: make room and try again.") from None
        finally:
            if not any(entry.is_dir() for entry in workshop.iterdir()):
                shutil.rmtree(workshop)


def _run_step(
    planned: Planned,
    seed: int,
    workshop: Path,
    results: dict[str, Path],
    resume: bool,
    earlier: list[Step],
) -> Step:
    folder = workshop / planned.name
    job = planned.job(results)
    step = Step(
        task=job.task,
        method=planned.method.name,
        summary=planned.method.information.summary,
        paper=planned.method.information.paper,
        settings=planned.method.model_dump(mode="json"),
        job=_resolve_names(job.model_dump(mode="json", exclude_defaults=True), workshop),
        seed=seed,
    )
    key = _key([*earlier, step])
    if resume and (folder / "step.json").exists():
        kept = json.loads((folder / "step.json").read_text(encoding="utf-8"))
        if kept["key"] == key:
            announce(f"{planned.name}: taken over from the earlier run")
            return Step.model_validate(kept["step"])
    shutil.rmtree(folder, ignore_errors=True)
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir()
    try:
        if planned.waits:
            job.check(planned.method)
        start = time.perf_counter()
        job.run(planned.method, temporary, step, seed)
        step.seconds = round(time.perf_counter() - start, 4)
        step.peak_memory_bytes = peak_memory()
        step.inputs = {_resolve_names(path, workshop): seen for path, seen in step.inputs.items()}
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    kept = {"key": key, "step": step.model_dump(mode="json")}
    (temporary / "step.json").write_text(json.dumps(kept), encoding="utf-8")
    temporary.rename(folder)
    return step


def _resolve_names(value: Any, workshop: Path) -> Any:
    """Say `step:NAME` in the evidence where the job names a folder of the workshop."""
    prefix = f"{workshop}{os.sep}"
    if isinstance(value, str) and value.startswith(prefix):
        return REFERENCE + value.removeprefix(prefix)
    if isinstance(value, dict):
        return {key: _resolve_names(item, workshop) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve_names(item, workshop) for item in value]
    return value


def _key(steps: list[Step]) -> str:
    """Changes when anything that was asked of the last step, or of those before it, changes."""
    asked = [
        [step.task, step.method, step.settings, step.job, step.seed, _stamps(step.job)] for step in steps
    ]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _stamps(job: dict[str, Any]) -> list[list[Any]]:
    """Size and time of change of every file the arguments name, so that a replaced one is noticed."""
    stamps: list[list[Any]] = []
    for text in _texts(job):
        place = Path(text)
        if place.is_dir() or place.is_file():
            files = sorted(place.rglob("*")) if place.is_dir() else [place]
            stamps += [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]
    return stamps


def _finish(evidence: Evidence, recipe: Recipe, workshop: Path, planned: list[Planned]) -> Path:
    """Put evidence, report, card and earlier steps beside the last step's result."""
    from germane.core.card import write_card
    from germane.core.report import write_report

    final = workshop / planned[-1].name
    (final / "step.json").unlink()
    for step in planned[:-1]:
        (final / "steps").mkdir(exist_ok=True)
        (workshop / step.name / "step.json").unlink()
        (workshop / step.name).rename(final / "steps" / step.name)
    evidence.write(final)
    write_report(evidence, final)
    if (final / "config.json").exists():
        write_card(evidence, final, {"model_name": evidence.title, **recipe.card})
    return final


def _put_in_place(final: Path, target: Path) -> None:
    """One rename; a folder that is to be replaced is moved away first and removed after."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        final.rename(target)
        return
    old = target.with_name(target.name + ".old")
    _remove(old)  # of a run that was killed after the second rename
    target.rename(old)
    final.rename(target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _judge(evidence: Evidence, fail_on: list[str]) -> None:
    found = [finding for finding in evidence.findings if finding.code in fail_on]
    if found:
        raise EffectError("; ".join(f"{finding.code}: {finding.message}" for finding in found))


def run_task(
    task: str,
    method: str,
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> Result:
    """A recipe of one step: what the verbs of the package and of the command line call."""
    step = {"task": task, "method": method, **arguments, "settings": dict(settings)}
    return run(Recipe(steps=[step], seed=seed), out, overwrite=overwrite)
