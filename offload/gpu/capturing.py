"""What must not meet a CUDA graph that is being captured in another thread, where several models are loaded.

CUDA forbids most of it to the capturing thread alone. But torch captures one graph at a time in a process,
and until that is complete nobody else may draw from its global generator or replay a graph, for which it
looks at that generator (both raise), nor have its allocator give memory back to the driver. All that takes
`alone`, which whoever captures holds, and is waited for some milliseconds, or for a token that is captured.
So does what is not to run beside a session, which has a stream of its own.

And nobody waits for a whole device (`torch.cuda.synchronize`), which spoils a capture in any thread, but for
streams.
"""

from __future__ import annotations

import threading

alone = threading.RLock()
"""Held by one thread at a time, for as long as it captures, or does one of these."""
