"""The memory of experts: arenas of slots, the device, and experts on their way between tiers."""
