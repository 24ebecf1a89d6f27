"""The page at /: one file, with nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi.responses import Response

PARTS = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class Page:
    """Its policy allows the file's own scripts and styles, to the byte, and requests to this server only."""

    def __init__(self) -> None:
        self._html = resources.files("moe_local.cli.server").joinpath("page.html").read_bytes()
        hashes: dict[bytes, list[str]] = {b"script": [], b"style": []}
        for kind, text in PARTS.findall(self._html):
            hashes[kind].append(f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'")
        policy = (
            "default-src 'none'",
            f"script-src {' '.join(hashes[b'script'])}",
            f"style-src {' '.join(hashes[b'style'])}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
        self._headers = {
            "Content-Security-Policy": "; ".join(policy),
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def give(self) -> Response:
        return Response(self._html, media_type="text/html; charset=utf-8", headers=self._headers)
