"""moe-local itself as a peer: in its own process, whose memory can be limited like that of other peers.

Counts the bytes that it reads from disk while decoding, and the time in which any read was in flight.

    python ours_peer.py CHECKPOINT --context 256 --dense nf4 --prefetch off
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from serve import Pipe, read_bytes

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer prompts with moe-local over stdin and stdout.")
    parser.add_argument("model", metavar="CHECKPOINT")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--dense", default="nf4")
    parser.add_argument("--prefetch", default="auto")
    options = parser.parse_args()
    pipe = Pipe()
    sys.path.insert(0, str(HERE.parent))
    from slow_reads import slow_reads

    import moe_local
    from moe_local.offload.measure.floor import planned_weights

    with (
        slow_reads(math.inf) as reads,
        moe_local.load(
            options.model,
            device="cpu",
            context=options.context,
            dense=options.dense,
            prefetch=options.prefetch,
        ) as model,
    ):
        answer = None

        def first(prompt: list[int]) -> int:
            nonlocal answer
            if answer is not None:
                answer.close()
            most = options.context - len(prompt)
            answer = model.stream(prompt, max_new_tokens=most, do_sample=False, eos_token_id=None)
            return next(answer).id

        def following(token: int) -> int:
            assert answer is not None
            return next(answer).id

        def figures() -> dict[str, float]:
            stats = model.stats()
            return {
                "read_bytes": read_bytes(),
                "expert_bytes": stats.bytes.disk,
                "reading_s": reads.busy_s,
                "stall_s": stats.stall.disk + stats.stall.late_prefetch,
                "hits": stats.hits,
                "misses": stats.misses,
            }

        weights = planned_weights(model.plan)
        plan = model.plan.to_dict()
        hello = {
            "name": f"moe-local, prefetch {options.prefetch}",
            "version": moe_local.__version__,
            "detail": f"{plan['mode']}, {plan['slots']['ram']} of {plan['experts_per_layer']} experts",
            "plan": {
                name: plan[name] for name in ("mode", "slots", "staging", "prefill_chunk", "bytes", "used")
            },
            "threads": torch.get_num_threads(),
            "weights": {
                name: getattr(weights, name)
                for name in ("expert_bytes", "expert_numel", "dense_bytes", "dense_numel")
            },
        }
        pipe.serve(hello, first, following, figures)


if __name__ == "__main__":
    main()
