"""Make something to forget: `python examples/make_facts.py`.

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


if __name__ == "__main__":
    main()
