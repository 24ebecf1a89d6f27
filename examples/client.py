"""Start `moe-local serve` and talk to it with the openai package: pip install openai."""

import socket
import subprocess
import sys
import time

from openai import APIConnectionError, OpenAI


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_up(client: OpenAI, server: "subprocess.Popen[bytes]") -> None:
    while server.poll() is None:
        try:
            client.models.list()
        except APIConnectionError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit("the server ended before it was up")


def main() -> None:
    port = free_port()
    command = [sys.executable, "-m", "moe_local.cli", "serve", "demo", "--port", str(port), "--parallel", "2"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)
        wait_until_up(client, server)
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
