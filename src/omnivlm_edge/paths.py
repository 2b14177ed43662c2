"""Where our own files live. OMNIVLM_HOME, when set, holds them all."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_NAME = "omnivlm-edge"


def models_dir() -> Path:
    """The directory of the models that were made here."""
    home = os.environ.get("OMNIVLM_HOME")
    return (Path(home) if home else platformdirs.user_data_path(_NAME, appauthor=False)) / "models"


def cache_dir() -> Path:
    """The directory of what may be deleted at any time."""
    home = os.environ.get("OMNIVLM_HOME")
    return Path(home) / "cache" if home else platformdirs.user_cache_path(_NAME, appauthor=False)
