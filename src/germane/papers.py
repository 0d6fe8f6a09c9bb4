"""The papers germane is built on, and how far it has come: read from `papers.toml`."""

from __future__ import annotations

import sys
from importlib.resources import files

from pydantic import Field

from germane.core.settings import Settings, validate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Paper(Settings):
    """One paper; `method` and `claim` are set only once they are true."""

    slug: str
    title: str
    arxiv: str
    task: str
    code: str = Field(default="", description="official repository")
    method: str = Field(default="", description="registered method or suite")
    claim: str = Field(default="", description="script that re-measures the main claim")


def papers() -> list[Paper]:
    """Every paper, in the order of its task."""
    content = tomllib.loads(files("germane").joinpath("papers.toml").read_text(encoding="utf-8"))
    return [validate(Paper, entry, "papers.toml") for entry in content["paper"]]
