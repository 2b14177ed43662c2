"""Where this package keeps files of its own: under OMNIVLM_HOME, or the system's usual places."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def models_dir() -> Path:
    """Converted and quantized models: `OMNIVLM_HOME/models`, or the user's data directory."""
    home = os.environ.get("OMNIVLM_HOME")
    base = Path(home) if home else platformdirs.user_data_path("omnivlm-edge")
    return base / "models"


def cache_dir() -> Path:
    """What can be computed again: `OMNIVLM_HOME/cache`, or the user's cache directory."""
    home = os.environ.get("OMNIVLM_HOME")
    return Path(home) / "cache" if home else platformdirs.user_cache_path("omnivlm-edge")
