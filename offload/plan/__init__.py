"""Bytes in, placement out: what fits where, and the speed that bandwidths allow."""
