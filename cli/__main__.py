"""`python -m moe_local.cli`, for where the moe-local command is not on the path."""

from moe_local.cli.main import main

main()
