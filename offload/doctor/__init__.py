"""What this machine is, and what keeps it from running experts as fast as it could."""
