"""The command line. Every flag of a task or method comes from its settings class.

`germane --help` imports neither torch nor any method; a task's command imports what it runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_origin

import click
import yaml

from germane import method as registry
from germane.core.errors import GermaneError, SettingError, UnknownName, nearest
from germane.core.settings import (
    Settings,
    describe_bounds,
    describe_default,
    describe_type,
)

_OUT = click.Option(["--out"], help="folder of the result")
_SEED = click.Option(["--seed"], type=int, default=0, show_default=True, help="of everything random")
_OVERWRITE = click.Option(["--overwrite"], is_flag=True, help="replace --out if it is there")
_RESUME = click.Option(["--resume"], is_flag=True, help="go on with a run that was stopped")
_DRY_RUN = click.Option(["--dry-run"], is_flag=True, help="check everything, write nothing")
_JSON = click.Option(["--json", "as_json"], is_flag=True, help="print JSON")
_FAIL_ON = click.Option(["--fail-on"], help="findings that end with exit status 3, as no-effect,destroyed")


def _commands() -> dict[str, click.Command]:
    return {
        "run": run_recipe,
        "compare": CompareCommand("compare", help="Many methods, one job, one table."),
        "ask": ask,
        "edits": list_edits,
        "methods": list_methods,
        "explain": explain,
        "papers": list_papers,
        "doctor": doctor,
        "demo": demo,
    }


class Germane(click.Group):
    """The root: fixed commands, and one for each task that has methods."""

    def list_commands(self, context: click.Context) -> list[str]:
        return [*registry.tasks(), *_commands()]

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        fixed = _commands()
        if name in fixed:
            return fixed[name]
        if name in registry.tasks():
            return TaskCommand(name, help=_TASK_HELP.get(name, f"Do the task {name}."))
        return None

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(context, args[0]) is None:
            known = self.list_commands(context)
            raise UnknownName(
                f"no command {args[0]!r}{nearest(args[0], known)} Commands: {', '.join(known)}."
            )
        return super().resolve_command(context, args)


# One line each, so that `germane --help` need not import a task.
_TASK_HELP = {
    "attend": "Measure a model that reads otherwise inside a block, beside the model as it is.",
    "edit": "Change facts that a model states, and leave the rest unmoved.",
    "erase": "Make a diffusion pipeline draw a concept no more.",
    "evaluate": "Measure a model with a suite.",
    "ground": "Answer questions from passages, some of which are irrelevant or mislead.",
    "merge": "Merge the relevant checkpoints of a pool into one.",
    "reason": "Answer questions with a chat model, by a way of prompting.",
    "retrieve": "Find the passages of a corpus that answer queries.",
    "synthesize": "Have a model make records: to forget, to refuse, to ask.",
    "unlearn": "Make a model behave as if some records had never been trained on.",
    "route": "Send each query to the model of a pool that should answer it.",
}


@click.command(cls=Germane, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="germane")
def root() -> None:
    """Find what is relevant in the models and data you hold, and act on it.

    Results are plain Hugging Face folders; `germane explain TASK/METHOD` says when to use what.
    """


class TaskCommand(click.Command):
    """`germane TASK ... --method NAME`: flags from the task's job and the chosen method."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        from germane.job import job_class

        assert self.name
        job = job_class(self.name)
        names = [name.split("/")[1] for name in registry.names(self.name)]
        self.help = job.__doc__
        self.params = [
            click.Option(["--method"], required=True, help=f"one of {', '.join(names)}"),
            *_job_parameters(job),
        ]
        chosen = _peek(args, "--method")
        if chosen:
            kind = registry.load(f"{self.name}/{chosen}")
            self.params += [_option(kind, name) for name in kind.model_fields]
            self.epilog = f"{chosen}: {kind.information.summary}"
        else:
            self.epilog = "With --method NAME, --help also shows that method's settings."
        self.params += [_OUT, _SEED, _OVERWRITE, _RESUME, _DRY_RUN, _FAIL_ON, _JSON]
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, context: click.Context) -> Any:
        from germane.job import job_class

        assert self.name
        values = context.params
        kind = registry.load(f"{self.name}/{values['method']}")
        step = {
            "task": self.name,
            "method": values["method"],
            **_given(job_class(self.name), values),
            "settings": _given(kind, values),
        }
        _run({"steps": [step]}, values)


class CompareCommand(click.Command):
    """`germane compare RECIPE.yaml|TASK ... --methods a,b,c`."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        from germane.job import job_class

        first = next((word for word in args if not word.startswith("-")), "")
        self.params = [
            click.Argument(["what"], metavar="RECIPE.yaml|TASK"),
            click.Option(["--methods"], required=True, help="names, separated by commas"),
            click.Option(["--seeds"], default="0", show_default=True, help="separated by commas"),
            click.Option(
                ["--vary"],
                multiple=True,
                help="METHOD.SETTING=a,b,...: a row for each value; repeatable",
            ),
            click.Option(
                ["--set", "changes"],
                multiple=True,
                help="METHOD.SETTING=value, or a recipe's key=value",
            ),
            click.Option(["--on"], default="", help="ray, or ray://host:port; default: this machine"),
            click.Option(["--workers"], type=int, default=1, show_default=True, help="rows at a time"),
            click.Option(["--keep"], is_flag=True, help="keep every row's model, not only its evidence"),
            _OUT,
            _RESUME,
            _JSON,
        ]
        if first in registry.tasks():
            self.params += _job_parameters(job_class(first))
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, context: click.Context) -> Any:
        from germane.comparison import compare, print_table

        values = context.params
        out = values["out"] or "comparison"
        what, changes = _compared(values)
        result = compare(
            what,
            methods=_split(values["methods"]),
            out=out,
            seeds=[_integer(word, "--seeds") for word in _split(values["seeds"])],
            vary=_varied(values["vary"]),
            settings=_fixed(changes),
            on=values["on"],
            workers=values["workers"],
            keep=values["keep"],
            resume=values["resume"],
        )
        if values["as_json"]:
            click.echo(json.dumps([row.model_dump(mode="json") for row in result.evidence.rows], indent=1))
        else:
            print_table(result.evidence)
            click.echo(f"{result.folder / 'report.html'}")


def _compared(values: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The recipe to compare on, and what of --set concerns methods' settings."""
    from germane.job import job_class
    from germane.recipe import Recipe, read_recipe

    what, changes = values["what"], list(values["changes"])
    if what in registry.tasks():
        return Recipe(steps=[{"task": what, **_given(job_class(what), values)}]), changes
    recipe_changes = [c for c in changes if c.partition("=")[0].split(".")[0] in Recipe.model_fields]
    rest = [change for change in changes if change not in recipe_changes]
    return read_recipe(what, _pairs(recipe_changes)), rest


def _job_parameters(job: Any) -> list[click.Parameter]:
    """Arguments for what is given by position, options for the rest."""
    parameters: list[click.Parameter] = []
    for name in job.paths:
        many = get_origin(job.model_fields[name].annotation) is list
        parameters.append(click.Argument([name], nargs=-1 if many else 1, required=True))
    return parameters + [_option(job, name) for name in job.model_fields if name not in job.paths]


def _option(kind: type[Settings], name: str) -> click.Option:
    field = kind.model_fields[name]
    bounds = describe_bounds(field)
    notes = [describe_type(field.annotation) + (f" {bounds}" if bounds else "")]
    notes.append("required" if field.is_required() else f"default: {describe_default(field)}")
    text = f"{field.description}  [{'; '.join(notes)}]"
    flag = "--" + name.replace("_", "-")
    if field.annotation is bool:
        return click.Option([f"{flag}/--no-{name.replace('_', '-')}", name], default=None, help=text)
    many = get_origin(field.annotation) in (list, dict)
    return click.Option([flag, name], multiple=many, default=None, metavar="VALUE", help=text)


def _given(kind: type[Settings], values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `kind` that were given on the command line."""
    found: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        value = values.get(name)
        if value is None or value == ():
            continue
        if get_origin(field.annotation) is dict:
            value = _pairs(value)
        elif isinstance(value, tuple):
            value = _list(field.annotation, value)
        found[name] = value
    return found


def _list(annotation: Any, values: Sequence[str]) -> list[Any]:
    """Repeated flags as a list; numbers may also come separated by commas."""
    if get_args(annotation)[0] in (int, float):
        return [part for value in values for part in value.split(",")]
    return list(values)


def _pairs(values: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as a mapping; values are read as YAML."""
    pairs = {}
    for value in values:
        key, sign, text = value.partition("=")
        if not sign:
            raise SettingError(f"{value!r}: must be key=value.")
        pairs[key] = yaml.safe_load(text)
    return pairs


def _fixed(values: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`METHOD.SETTING=value` words as method -> settings."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in _pairs(values).items():
        name, dot, setting = key.partition(".")
        if not dot:
            raise SettingError(f"{key!r}: must be METHOD.SETTING=value.")
        found.setdefault(name, {})[setting] = value
    return found


def _varied(values: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """`METHOD.SETTING=a,b` words as method -> setting -> values."""
    return {
        name: {
            key: [yaml.safe_load(part) for part in str(text).split(",")] for key, text in settings.items()
        }
        for name, settings in _fixed(values).items()
    }


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integer(text: str, flag: str) -> int:
    if not text.isdigit():
        raise SettingError(f"{flag}: must be whole numbers separated by commas; got {text!r}.")
    return int(text)


def _peek(args: Sequence[str], flag: str) -> str:
    """The value of a flag, before the arguments are parsed."""
    for index, word in enumerate(args):
        if word == flag and index + 1 < len(args):
            return args[index + 1]
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return ""


def _run(content: dict[str, Any], values: Mapping[str, Any], recipe: Any = None) -> None:
    from germane.core.settings import validate
    from germane.recipe import Recipe, check, run

    if recipe is None:
        asked = {**content, "seed": values["seed"], "out": values["out"] or ""}
        if values["fail_on"]:
            asked["fail_on"] = _split(values["fail_on"])
        recipe = validate(Recipe, asked, "arguments")
    if values["dry_run"]:
        steps = check(recipe)
        click.echo("checked: " + ", then ".join(step.method.name for step in steps) + "; nothing written.")
        return
    result = run(recipe, values["out"], resume=values["resume"], overwrite=values["overwrite"])
    if values["as_json"]:
        click.echo(result.evidence.model_dump_json(indent=1))
        return
    from germane.core.report import headline

    for finding in result.findings:
        click.echo(f"{finding.severity}: {finding.message}", err=True)
    click.echo(headline(result.evidence))
    click.echo(f"{result.folder}")


@click.command("run", params=[_OUT, _RESUME, _DRY_RUN, _OVERWRITE, _JSON])
@click.argument("recipe")
@click.option("--set", "changes", multiple=True, help="key=value, as steps.0.settings.density=0.5")
def run_recipe(recipe: str, changes: tuple[str, ...], **values: Any) -> None:
    """Run a recipe."""
    from germane.recipe import read_recipe

    _run({}, values, read_recipe(recipe, _pairs(changes)))


@click.command("ask", params=[_JSON])
@click.argument("router")
@click.argument("query")
@click.option("--graph", default="", help="a graph to use instead of the one the router was trained in")
@click.option("--max-steps", type=int, help="longest walk through the graph")
@click.option("--generate/--no-generate", default=True, help="let the model answer, or only find it")
def ask(router: str, query: str, as_json: bool, **options: Any) -> None:
    """Send a query through a trained router to the model that should answer it."""
    from germane.tasks.route import ask as ask_router

    answer = ask_router(router, query, **options)
    if as_json:
        click.echo(json.dumps(asdict(answer), indent=1, ensure_ascii=False))
        return
    for decision in answer.path:
        why = f" ({decision.fallback})" if decision.fallback else ""
        click.echo(f"{decision.master} -> {decision.worker}, score {decision.score:.3f}{why}", err=True)
    click.echo(answer.rewritten if answer.text is None else answer.text)


@click.command("edits", params=[_JSON])
@click.argument("folder")
@click.option("--ask", "question", default="", help="also let the edited model answer this")
def list_edits(folder: str, question: str, as_json: bool) -> None:
    """List the edits of an edited model, and ask it something."""
    from germane.core.checkpoint import locate
    from germane.edited import EditList, answer, replaced

    listed = EditList.read(locate(folder)) or EditList(method="", model=folder)
    if as_json:
        click.echo(listed.model_dump_json(indent=1))
    else:
        over = replaced(listed.edits)
        for entry in listed.edits:
            note = f"  (replaced by {over[entry.id]})" if entry.id in over else ""
            click.echo(f"{entry.id}: {entry.prompt}{entry.answer}{note}")
        click.echo(
            f"{len(listed.edits)} edits" + (f" by {listed.method}" if listed.method else ""), err=True
        )
    if question:
        click.echo(answer(folder, [question])[0])


@click.command("methods", params=[_JSON])
@click.argument("task", required=False)
def list_methods(task: str | None, as_json: bool) -> None:
    """List the methods, of all tasks or of one."""
    found = [registry.load(name).information for name in registry.names(task)]
    if as_json:
        click.echo(json.dumps([vars(entry) for entry in found], indent=1))
        return
    width = max(len(entry.name) for entry in found)
    for entry in found:
        click.echo(f"{entry.name:<{width}}  {entry.summary}")


@click.command("explain")
@click.argument("name", metavar="TASK/METHOD")
def explain(name: str) -> None:
    """Say what a method does, when to use it and when not, and its settings."""
    from germane.documentation import explanation, overview

    click.echo(explanation(name) if "/" in name else overview(name))


@click.command("papers", params=[_JSON])
def list_papers(as_json: bool) -> None:
    """List the papers germane is built on, and which are done."""
    from germane.papers import papers

    found = papers()
    if as_json:
        click.echo(json.dumps([paper.model_dump() for paper in found], indent=1))
        return
    for paper in found:
        state = paper.method or "not yet"
        click.echo(f"{paper.arxiv:<11} {paper.task:<11} {state:<24} {paper.title}")
    done = sum(bool(paper.method) for paper in found)
    click.echo(f"{done} of {len(found)} done")


@click.command("doctor")
def doctor() -> None:
    """Look at this machine: versions, device, room, extras."""
    from germane.doctor import examine

    for line in examine():
        click.echo(line)


@click.command("demo", params=[_OUT])
def demo(out: str | None) -> None:
    """Make a pool of relevant and irrelevant checkpoints, merge it, and show what happened."""
    from germane.demo import run_demo

    run_demo(Path(out or "demo"))


def main() -> None:
    """Entry point of the `germane` command."""
    try:
        root.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped; finished steps are kept: the same command with --resume goes on.", err=True)
        sys.exit(130)
    except GermaneError as error:
        click.echo(f"germane: {error}", err=True)
        sys.exit(error.exit_code)
