"""The memory of experts: arenas of slots, devices, and the transfers between tiers."""
