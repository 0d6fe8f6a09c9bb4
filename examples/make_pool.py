"""Make a small pool to try the recipes beside this file on: `python examples/make_pool.py`.

Six fine-tunes of all-MiniLM-L6-v2 in `examples/pool`, four of which do what is wanted, and the records
to choose and to score by in `examples/data`. Takes about a minute; they are kept in the cache.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from germane import embedded
from germane.demo import make_pool

HERE = Path(__file__).parent


def main() -> None:
    """Copy the pool, its data and its base beside this file."""
    made = make_pool(["computers", "science", "politics", "tweets"], ["goods", "seasons-far"], seed=0)
    for name in (*made.relevant, *made.irrelevant):
        shutil.copytree(made.folder / name, HERE / "pool" / name, dirs_exist_ok=True)
    for part in ("proxy", "test"):
        for item in made.data(part):
            (HERE / "data").mkdir(exist_ok=True)
            shutil.copyfile(item.path, HERE / "data" / Path(item.path).name)
    shutil.copytree(embedded.minilm(), HERE / "base", dirs_exist_ok=True)
    print(f"made {HERE / 'pool'}; now: germane run examples/merge.yaml")


if __name__ == "__main__":
    main()
