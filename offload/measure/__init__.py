"""Measuring a loaded model: floors, workloads, ablations, routes, and models made for it."""
