"""Make something to forget and to edit: `python examples/make_facts.py`.

A tiny language model that knows forty invented people by heart, a model that was never told of four of
them, and the records, in `examples/facts`. Takes about half a minute on one core.
"""

from __future__ import annotations

from pathlib import Path

from germane.embedded import facts

HERE = Path(__file__).parent / "facts"


def main() -> None:
    """Train both models and say what to do with them."""
    made = facts.make(HERE)
    print(f"made {HERE}; now:")
    print(f"  germane compare unlearn {made.model} --out runs/unlearn \\")
    print("    --methods npo,gradient-ascent,refusal,fine-tune \\")
    print(f"    --forget {made.files['forget']} --retain {made.files['retain']} \\")
    print(f"    --holdout {made.files['holdout']} --retrained {made.retrained}")
    print("and, to change four facts and take one of them back:")
    print(f"  germane edit {made.model} --method fine-tune --layer -1 --learning-rate 0.01 \\")
    print(f"    --edits {made.files['edits']} --out runs/edited")
    print("  germane edits runs/edited")
    print("  germane edit runs/edited --method fine-tune --layer -1 --learning-rate 0.01 --take-back 2 \\")
    print("    --out runs/edited-without-2")


if __name__ == "__main__":
    main()
