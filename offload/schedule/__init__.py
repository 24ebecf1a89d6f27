"""Which missing experts the CPU computes, which go over the link, and what both cost: plain numbers."""
