"""Pages and lists made from the methods' definitions, so that they cannot go stale.

`python -m germane.documentation` rewrites `docs/` and the generated parts of the README; a test
fails while they differ from what it would write.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

from germane import method as registry
from germane.core.settings import Settings, describe_bounds, describe_default, describe_type
from germane.job import job_class

_MARK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def explanation(name: str) -> str:
    """The page of a method, in Markdown: what, when and when not, settings."""
    kind = registry.load(name)
    information = kind.information
    lines = [f"# {name}", inspect.getdoc(kind) or ""]
    if information.paper:
        lines.append(f"Paper: https://arxiv.org/abs/{information.paper}")
    if information.code:
        lines.append(f"Official code: https://github.com/{information.code}")
    if information.needs:
        lines.append(f"Needs: {', '.join(information.needs)}.")
    lines.append("## Settings\n\n" + _table(kind))
    return "\n\n".join(lines) + "\n"


def overview(task: str) -> str:
    """The page of a task: its contract, its arguments, its methods."""
    names = registry.names(task)
    job = job_class(task)
    module = inspect.getmodule(job)
    lines = [f"# {task}", inspect.getdoc(module) or "", "## Arguments\n\n" + _table(job)]
    methods = [f"| `{n}` | {registry.load(n).information.summary} |" for n in names]
    lines.append("## Methods\n\n| method | |\n|---|---|\n" + "\n".join(methods))
    return "\n\n".join(lines) + "\n"


def _table(kind: type[Settings]) -> str:
    if not kind.model_fields:
        return "None."
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in kind.model_fields.items():
        kinds = " ".join(filter(None, (describe_type(field.annotation), describe_bounds(field))))
        lines.append(f"| `{name}` | {kinds} | {describe_default(field)} | {field.description} |")
    return "\n".join(lines)


def method_list() -> str:
    """Every method of every task, as the README shows it."""
    lines = ["| method | what it does | paper |", "|---|---|---|"]
    for name in registry.names():
        information = registry.load(name).information
        paper = information.paper
        link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper else ""
        lines.append(f"| [`{name}`](docs/{name}.md) | {information.summary} | {link} |")
    return "\n".join(lines) + "\n"


def speed(root: Path) -> str:
    """What `benchmarks/merge.py` measured last, as the README shows it."""
    rows = json.loads((root / "benchmarks/results/merge.json").read_text(encoding="utf-8"))["rows"]
    lines = [
        "| merge | program | seconds | times germane's | peak memory, MiB | times germane's |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["method"],
            _PROGRAMS.get(row["program"], row["program"]),
            f"{row['wall_seconds']:.1f}",
            f"{row['wall_ratio']:.2f}",
            f"{row['peak_rss_mebibytes']:.0f}",
            f"{row['rss_ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_PROGRAMS = {"floor": "reading the inputs, writing one output", "germane": "**germane**"}


def claims(root: Path) -> str:
    """The first table of the FW-Merging section of CLAIMS.md, and its verdict."""
    text = (root / "CLAIMS.md").read_text(encoding="utf-8")
    section = text.split("<!-- fw_merging -->")[1].split("<!-- end fw_merging -->")[0]
    verdict = next(line for line in section.splitlines() if line.startswith("**"))
    table = next(part for part in section.split("\n\n") if part.startswith("|"))
    return f"{verdict}\n\n{table}\n"


def pages(root: Path) -> dict[Path, str]:
    """Every generated file -> its content."""
    docs = root / "docs"
    written = {docs / f"{name}.md": explanation(name) for name in registry.names()}
    written |= {docs / f"{task}.md": overview(task) for task in registry.tasks()}
    parts = {"methods": method_list(), "speed": speed(root), "claims": claims(root)}
    readme = root / "README.md"
    written[readme] = _MARK.sub(
        lambda match: match[1] + parts[match[2]] + match[3], readme.read_text(encoding="utf-8")
    )
    return written


def main() -> None:
    """Write every generated file."""
    for file, content in pages(Path.cwd()).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
