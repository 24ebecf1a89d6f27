"""Where expert files, measurements and moe-local's other files are kept."""

from __future__ import annotations

import os
import re
from pathlib import Path

import platformdirs


def moe_local_home() -> Path:
    """The folder of all of moe-local's files: MOE_LOCAL_HOME if set, else a folder in the user's cache."""
    home = os.environ.get("MOE_LOCAL_HOME")
    return Path(home).expanduser() if home else platformdirs.user_cache_path("moe-local", appauthor=False)


def expert_file_folder(home: Path, name: str, format: str, fingerprint: str) -> Path:
    """The folder below `home` for the expert file of this model, format and checkpoint."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", name)[-80:].strip("-.") or "model"
    return home / "experts" / slug / f"{format.replace(':', '-')}-{fingerprint[:16]}"
