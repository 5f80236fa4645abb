"""Optional libraries that are missing are named, with the extra that brings them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ramulus.tasks.files import File
from ramulus.tasks.gym import Gym
from ramulus.tasks.math import Boxed


@pytest.mark.parametrize(
    ("library", "extra"), [("math_verify", "math"), ("reasoning_gym", "gym"), ("pyarrow", "data"), ("datasets", "data")]
)
def test_a_missing_library_names_its_extra(
    library: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_text("")
    use = {
        "math_verify": Boxed,
        "reasoning_gym": Gym("chain_sum", 1, seed=987),
        "pyarrow": File(str(tmp_path / "a.parquet")),
        "datasets": File(str(tmp_path)),
    }[library]
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf'pip install "ramulus\[{extra}\]"'):
        use()
