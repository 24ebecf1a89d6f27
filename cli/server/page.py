"""The page at /: one file, with nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi.responses import Response

PARTS = re.compile(rb"<(script|style)>(.*?)</\1>", re.DOTALL)


class Page:
    """Allowed is what the file itself says, to the byte, and to ask this server; everything else is not."""

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
