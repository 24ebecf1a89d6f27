"""Where things are kept: the variable, the user's cache folder, and one folder for each expert file."""

from pathlib import Path

import platformdirs

from moe_local.offload.system.home import expert_file_folder, moe_local_home


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("MOE_LOCAL_HOME", str(tmp_path))
    assert moe_local_home() == tmp_path
    monkeypatch.setenv("MOE_LOCAL_HOME", "~/models")
    assert moe_local_home() == Path.home() / "models"
    monkeypatch.setenv("MOE_LOCAL_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert moe_local_home().name == "moe-local"
    monkeypatch.delenv("MOE_LOCAL_HOME")
    assert moe_local_home() == platformdirs.user_cache_path("moe-local", appauthor=False)


def test_folder_of_a_model():
    home, fingerprint = Path("/home"), "0123456789abcdef0123456789abcdef"
    folder = expert_file_folder(home, "mistralai/Mixtral-8x7B-Instruct-v0.1", "nf4", fingerprint)
    assert folder == home / "experts" / "mistralai--Mixtral-8x7B-Instruct-v0.1" / "nf4-0123456789abcdef"
    assert expert_file_folder(home, "../..", "nf4", fingerprint).parent == home / "experts" / "model"
    assert expert_file_folder(home, "/data/my model/", "nf4", fingerprint).parent.name == "data--my--model"
    assert len(expert_file_folder(home, "x" * 500, "nf4", fingerprint).parent.name) == 80
