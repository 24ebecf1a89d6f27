"""Where models, expert files and measurements are kept on this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

import platformdirs


def moe_local_home() -> Path:
    """The folder that everything is kept in: the variable MOE_LOCAL_HOME, else the user's cache folder."""
    home = os.environ.get("MOE_LOCAL_HOME")
    return Path(home).expanduser() if home else platformdirs.user_cache_path("moe-local", appauthor=False)


def expert_file_folder(home: Path, name: str, format: str, fingerprint: str) -> Path:
    """Where the expert file of this model, format and checkpoint belongs below `home`."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", name)[-80:].strip("-.") or "model"
    return home / "experts" / slug / f"{format.replace(':', '-')}-{fingerprint[:16]}"
