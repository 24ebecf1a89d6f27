"""`python -m moe_local.cli`, for environments in which the moe-local command is not on the path."""

from moe_local.cli.entry import main

main()
