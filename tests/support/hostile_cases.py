"""Every hostile input there is: what the tests and ``tools/hostile_files.py`` run."""

from __future__ import annotations

from hostile_companions import COMPANIONS
from hostile_folders import FOLDERS
from hostile_graphs import FUNCTIONS, GRAPHS, NO_LINEAR_LAYER
from hostile_model_files import EXTERNAL, NO_MODEL, TENSORS
from hostile_models import COMPILED

# Refused by load_model, which needs no ONNX Runtime.
AT_LOAD = (*NO_MODEL, *EXTERNAL, *TENSORS, *GRAPHS, *FUNCTIONS)

CASES = (*AT_LOAD, NO_LINEAR_LAYER, *COMPILED, *COMPANIONS, *FOLDERS)
