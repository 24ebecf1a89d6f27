"""A lock for operations that must not run while another thread captures a CUDA graph (several loaded models).

CUDA restricts most operations only in the capturing thread. But torch captures one graph at a time per
process, and until that is complete no other thread may draw from its global generator, replay a graph (which
reads that generator; both raise), or let its allocator return memory to the driver. All of these, and the
capture itself, hold the lock `alone`, for some milliseconds or for the token that is being captured. So does
work that must not overlap with a session, which has a stream of its own.

Nor may any thread wait for a whole device (`torch.cuda.synchronize`), which invalidates a capture in every
thread; wait for streams instead.
"""

from __future__ import annotations

import threading

alone = threading.RLock()
"""Held by the thread that captures, or does any of the operations above."""
