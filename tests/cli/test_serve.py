"""`moe-local serve` as a command: what it refuses before it loads, and a real one that is stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from moe_local.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask, and there is no key; add --api-key"),
        (["--host", "example.org"], "lets other machines ask"),
        (["--api-key", " "], "--api-key is empty"),
        (["--port", "70000"], "70000 is not in the range"),
        (["--parallel", "0"], "parallel 0 is not a number from 1 up"),
        (["--timeout", "0"], "0.0 is not in the range"),
        (
            ["--host", "203.0.113.7", "--api-key", "k"],
            "Cannot assign requested address; choose another --host",
        ),
        (["--host", "256.1.1.1", "--api-key", "k"], "; choose another --host"),
    ],
)
def test_what_is_refused(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["serve", "demo", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", "demo", "--port", str(port)])
    assert result.exit_code == 2
    assert (
        f"cannot listen on 127.0.0.1 port {port}: Address already in use; choose another --port"
        in result.stderr
    )


@pytest.mark.slow  # among the quick ones, examples/client.py starts one, talks with it and ends it
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_real_one_answers_and_ends_clean(stop: signal.Signals, tmp_path: Any) -> None:
    command = [sys.executable, "-m", "moe_local.cli", "serve", "demo", "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "MOE_LOCAL_HOME": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            url = None
            for line in process.stderr:
                found = re.search(r"demo at (http://127\.0\.0\.1:\d+)/v1", line)
                if found:
                    url = found[1]
                    break
            assert url is not None
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=200, trust_env=False)
            assert answer.json()["usage"]["completion_tokens"] == 5
            process.send_signal(stop)
            rest = process.stderr.read()
            code = process.wait(timeout=200)
        finally:
            process.kill()
    assert "Traceback" not in rest
    assert code == (130 if stop is signal.SIGINT else 0)
