"""`python -m germane` is the `germane` command."""

from germane.cli import main

main()
