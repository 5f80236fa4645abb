"""What a learner hands an engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

Weights = None | str | os.PathLike[str] | Mapping[Any, Any]
"""None: in place, the engine reads the learner's own parameters; a path: a folder of safetensors, or one such file; a mapping: name -> tensor."""
