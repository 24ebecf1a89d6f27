"""Computing experts from their flat buffers, with the fastest kernels for a device and format."""
