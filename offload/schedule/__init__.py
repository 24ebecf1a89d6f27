"""Decides which missing experts the CPU computes and which are copied over the link to the device."""
