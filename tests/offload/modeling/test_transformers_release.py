"""A transformers whose insides moved is told at import, in one line with the range that works."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest
import transformers.core_model_loading

from moe_local.cache.errors import MoeLocalError
from moe_local.offload.modeling import transformers_release
from moe_local.offload.modeling.transformers_release import REMEDY, WORKS, check_release


def test_the_installed_one_is_in_the_range() -> None:
    check_release()
    first, last = (tuple(map(int, version.split("."))) for version in WORKS.split(" to "))
    installed = tuple(map(int, metadata.version("transformers").split(".")[:2]))
    assert first <= installed <= last
    assert f">={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}" in REMEDY


@pytest.mark.parametrize("name", ["rename_source_key", "WeightConverter"])
def test_what_moved_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delattr(transformers.core_model_loading, name)
    with pytest.raises(MoeLocalError, match=rf"has no core_model_loading\.{name}.* works with 5\.") as info:
        check_release()
    assert "\n" not in str(info.value)
    assert REMEDY in str(info.value)
    assert isinstance(info.value, ImportError)


def test_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(transformers_release.metadata, "version", absent)
    with pytest.raises(MoeLocalError, match="transformers is not installed"):
        check_release()


@pytest.mark.slow
def test_the_command_says_it_in_one_line() -> None:
    """With a transformers whose loader is called otherwise."""
    script = (
        "import transformers.conversion_mapping as m; del m.get_model_conversion_mapping\n"
        "from moe_local.cli.main import main; main(['run', 'demo', 'hello'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = ran.stderr.strip().splitlines()
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert len(lines) == 1
    assert "conversion_mapping.get_model_conversion_mapping" in lines[0]
