"""Measuring a loaded model: lower bounds (floors), workloads, ablations, routes, and synthetic models."""
