"""``python -m megatron_distil``: the command line, where the script is not on the path."""

from megatron_distil.cli import main

main()
