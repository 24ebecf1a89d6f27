"""The clients of serving.py, in their own process, which knows only the server's address.

Lines in: {"clients", "prompts": [ids, ...], "tokens"}. Lines out: {"seconds", "tokens", "ttft_s": [...],
"tpot_s": [...], "answers": [text, ...]}, with a time for each request and a text for each prompt.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import deque
from typing import Any

import httpx


def main(url: str) -> None:
    for line in sys.stdin:
        print(json.dumps(asyncio.run(_ask_all(url, **json.loads(line)))), flush=True)


async def _ask_all(url: str, clients: int, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    left = deque(enumerate(prompts))
    answers: dict[int, list[str]] = {}
    ttft, tpot = [], []

    async def one_after_the_other(client: httpx.AsyncClient) -> None:
        while left:
            number, prompt = left.popleft()
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
            began, times, texts = time.perf_counter(), [], []
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                reply.raise_for_status()
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        times.append(time.perf_counter())
                        texts.append(json.loads(line[6:])["choices"][0]["text"])
            answers[number] = texts
            ttft.append(times[0] - began)
            tpot.append((times[-1] - times[0]) / (tokens - 1))

    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        began = time.perf_counter()
        await asyncio.gather(*(one_after_the_other(client) for _ in range(clients)))
        seconds = time.perf_counter() - began
    said = ["".join(answers[number]) for number in range(len(prompts))]
    return {
        "seconds": seconds,
        "tokens": tokens * len(prompts),
        "ttft_s": ttft,
        "tpot_s": tpot,
        "answers": said,
    }


if __name__ == "__main__":
    main(sys.argv[1])
