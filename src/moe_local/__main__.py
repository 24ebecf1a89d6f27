"""`python -m moe_local` is `moe-local`."""

from moe_local.cli.entry import main

if __name__ == "__main__":
    main()
