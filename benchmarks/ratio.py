"""Ratios over rounds, under the name by which benchmarks import them."""

from moe_local.offload.measure.ratio import CONFIDENCE, Ratio, median_interval

__all__ = ["CONFIDENCE", "Ratio", "median_interval"]
