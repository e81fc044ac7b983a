"""Every hostile input there is: what the tests and ``tools/hostile_files.py`` run."""

from __future__ import annotations

from hostile_companions import COMPANIONS
from hostile_folders import FOLDERS
from hostile_models import MODELS

CASES = (*MODELS, *COMPANIONS, *FOLDERS)
