"""Guessing which experts later layers will need."""
