"""``python -m headrace``: the same as the ``headrace`` program."""

from headrace.cli import main

main()
