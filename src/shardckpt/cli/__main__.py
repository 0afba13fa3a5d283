"""``python -m shardckpt.cli``, where the program is not on the path."""

from shardckpt.cli import main

main()
