"""The register of methods: the folder is the register."""

from __future__ import annotations

import inspect
import re

import pytest

from germane import method as registry
from germane.core.errors import GermaneError, UnknownName
from germane.core.settings import Settings
from germane.job import Job, job_class


@pytest.mark.parametrize("name", registry.names())
def test_a_methods_name_is_its_files(name):
    kind = registry.load(name)
    assert kind.information.name == name
    task, _, short = name.partition("/")
    assert kind.__module__.startswith("germane.")
    assert kind.__module__ == f"germane.tasks.{task}.{short.replace('-', '_')}"
    assert kind.information.task == task
    assert kind.model_construct().name == name


@pytest.mark.parametrize("name", registry.names())
def test_a_method_says_when_to_use_it_and_when_not(name):
    kind = registry.load(name)
    text = inspect.getdoc(kind) or ""
    assert re.search(r"\bUse it\b", text), "says when to use it"
    assert re.search(r"\bNot\b", text) or "exactly" in text, "says when not"
    assert kind.information.summary.endswith(".")
    assert "\n" not in kind.information.summary


@pytest.mark.parametrize("name", registry.names())
def test_a_method_names_its_paper_or_says_where_it_is_from(name):
    information = registry.load(name).information
    assert not information.paper or re.fullmatch(r"\d{4}\.\d{4,5}", information.paper)
    assert not information.code or re.fullmatch(r"[\w.-]+/[\w.-]+", information.code)
    text = inspect.getdoc(registry.load(name)) or ""
    assert information.paper or re.search(r"\d{4}|[Bb]aseline|simple|reference", text), (
        "a year, a source, or a reason"
    )


def test_unknown_names_are_met_with_the_nearest():
    with pytest.raises(UnknownName, match=r"no method 'merge/frank-wolf'; did you mean 'merge/frank-wolfe"):
        registry.load("merge/frank-wolf")
    with pytest.raises(UnknownName, match=r"no task 'merg'; did you mean 'merge'\? Tasks: "):
        registry.names("merg")
    with pytest.raises(UnknownName, match="Known: "):
        registry.load("ties")
    with pytest.raises(UnknownName):
        job_class("nothing")


def test_names_are_found_without_importing_anything():
    assert registry.names("merge") == sorted(registry.names("merge"))
    assert not any(name.split("/")[1].startswith("-") for name in registry.names())
    assert "merge" in registry.tasks()


@pytest.mark.parametrize("task", registry.tasks())
def test_a_task_has_one_job_whose_arguments_are_described(task):
    job = job_class(task)
    assert issubclass(job, Job)
    assert job.task == task
    for name, field in job.model_fields.items():
        assert field.description, name
    assert set(job.paths) <= set(job.model_fields)


def test_every_error_is_on_the_page_of_errors():
    from germane.core import errors

    for kind in GermaneError.__subclasses__():
        if kind.__module__ == errors.__name__:
            assert kind.__name__ in (errors.__doc__ or "")


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        registry.build("merge/ties", {}).density = 0.5
    assert issubclass(registry.Method, Settings)


def test_a_package_adds_methods_by_entry_point(monkeypatch, tmp_path):
    """An outside module is registered and runs like those inside."""
    (tmp_path / "outside_methods.py").write_text(
        "from germane.method import method\n"
        "from germane.tasks.merge.average import Average\n"
        "@method('merge/outside')\n"
        "class Outside(Average):\n"
        "    '''From outside.'''\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    class Point:
        name, value = "merge/outside", "outside_methods"

    monkeypatch.setattr(registry, "entry_points", lambda group: [Point])
    registry._modules.cache_clear()
    try:
        assert "merge/outside" in registry.names("merge")
        assert registry.build("merge/outside", {}).information.summary == "From outside."
    finally:
        registry._modules.cache_clear()
        registry._registered.pop("merge/outside", None)


def test_the_verbs_can_be_called_more_than_once(tmp_path):
    """No module may have a verb's name: it would replace the verb once it is imported."""
    import importlib

    import germane

    importlib.import_module("germane.tasks.merge._task")
    importlib.import_module("germane.comparison")
    for name in germane.__all__:
        assert inspect.isfunction(getattr(germane, name)), f"germane.{name} is a module"
