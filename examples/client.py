"""Start `moe-local serve` and talk to it with the openai package: pip install openai."""

import subprocess
import sys

from openai import OpenAI


def start_server() -> "tuple[subprocess.Popen[str], str]":
    """A server on a free port, and the address that it says it has."""
    command = [sys.executable, "-m", "moe_local.cli", "serve", "demo", "--port", "0", "--parallel", "2"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        print(line, end="", file=sys.stderr)
        if " at http://" in line:  # demo at http://127.0.0.1:41213/v1, with a page at ...
            return server, line.partition(" at ")[2].partition(",")[0]
    raise SystemExit("the server ended before it was up")


def main() -> None:
    server, url = start_server()
    try:
        client = OpenAI(base_url=url, api_key="unused", max_retries=0)
        stream = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "What does the router do?"}],
            max_tokens=64,
            stream=True,
        )
        for chunk in stream:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
