from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moe_local.offload.system.read_at import open_for_reading, read_at


@pytest.mark.parametrize("system", ["posix", "windows"])
def test_threads_share_a_descriptor(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "windows":
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("there is none here")
    content = os.urandom(256 * 1024)
    (tmp_path / "file").write_bytes(content)
    descriptor = open_for_reading(tmp_path / "file")
    try:

        def read(start: int) -> None:
            buffer = bytearray(1000)
            count = read_at(descriptor, memoryview(buffer), start)
            assert count == min(1000, len(content) - start)
            assert buffer[:count] == content[start : start + count]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(0, len(content), 997)))
        assert read_at(descriptor, memoryview(bytearray(8)), len(content)) == 0
    finally:
        os.close(descriptor)
    with pytest.raises(OSError, match="No such file"):
        open_for_reading(tmp_path / "none")
