"""What libraries tell their programmers stays off the screen; what they and we tell users does not."""

from __future__ import annotations

import warnings

import pytest

from ramulus.run.runtime import quiet


@pytest.mark.parametrize(
    ("kind", "module", "shown"),
    [
        (FutureWarning, "transformers.modeling_utils", False),
        (DeprecationWarning, "torch.utils.checkpoint", False),
        (UserWarning, "peft.tuners.tuners_utils", False),
        (RuntimeWarning, "peft.tuners.tuners_utils", False),
        (UserWarning, "torch.optim", True),
        (UserWarning, "ramulus.run.stage", True),
        (FutureWarning, "mine", True),
        (FutureWarning, "torchmine", True),
    ],
)
def test_advice_of_libraries_is_left_out(kind: type[Warning], module: str, shown: bool) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        quiet()
        warnings.warn_explicit("say", kind, "file.py", 1, module=module)
    assert bool(said) == shown
