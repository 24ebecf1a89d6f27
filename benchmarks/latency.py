"""Where does each millisecond of a token go, beside what physics allows? The same code as `moe-local bench`.

Method. The floor comes first: the bytes of a decoded token over the bandwidths measured in the same run,
before and after the workloads. These (one question, a conversation of four questions on two topics, a long
prompt, a batch) are text from this repository, answered greedily with a fixed number of tokens. Each run
begins with an empty cache, and with the expert file dropped from the page cache. The first round warms up and
gives the hit rates: in it the cache is emptied again after the prompt, so that `cold` is over all decode
steps from an empty cache and `steady` over the second half of them, as in a replay of the recorded routes.
All later rounds are timed. With --compare every variant of the model takes its turn in each round; ratios are
of the same round, with the interval that holds the true median with 95 % confidence.
  TPOT    from each new token to the next; TTFT from the call to the first
  stalls  the layers' waits, by cause; `other` is the rest of a token: kernels and everything around them
  floor   every weight of a token once from the fastest tier; `with misses`, the counted bytes over their
          links, too

Run: python benchmarks/latency.py MODEL [--slots N] [--compare] [--json]
"""

from __future__ import annotations

import sys

from moe_local.cli.main import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]], prog_name="latency.py")
