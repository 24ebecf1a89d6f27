"""Checks what this machine has, and what keeps it from running experts as fast as it could."""
