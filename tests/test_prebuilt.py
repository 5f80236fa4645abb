"""Kernels that come with a wheel: made for several kinds of processor, the best that fits is taken, the same numbers come of each."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ramulus.native import build, prebuilt
from ramulus.native.prebuilt import Kind

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def lib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels for a good and a plain kind of this machine, of one source."""
    kinds = (Kind("best", (), frozenset({"wings"})), Kind("good", ()), Kind("plain", ()))
    monkeypatch.setattr(prebuilt, "PROCESSORS", {platform.machine(): kinds})
    monkeypatch.setattr(prebuilt, "bundled", lambda: [("draw.c", ())])
    monkeypatch.setattr(prebuilt, "LIB", tmp_path / "lib")
    monkeypatch.setenv("RAMULUS_CACHE", str(tmp_path / "cache"))
    for cached in (prebuilt.as_the_sources, build.opened):
        cached.cache_clear()
    prebuilt.make(tmp_path / "lib", ["cc"])
    yield tmp_path / "lib"
    for cached in (prebuilt.as_the_sources, build.opened):
        cached.cache_clear()


def test_the_best_that_fits_is_taken(lib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(path.name for path in lib.iterdir()) == ["draw-best.so", "draw-good.so", "draw-plain.so", "sources.sha256"]
    assert prebuilt.brought_for("draw.c", ()) == lib / "draw-good.so"
    assert build.library("draw.c", {})._name == str(lib / "draw-good.so")
    assert not (lib.parent / "cache").exists(), "nothing was compiled"
    assert prebuilt.brought_for("draw.c", ("-DOTHER",)) is None
    monkeypatch.setenv("RAMULUS_KERNELS", "plain")
    assert prebuilt.brought_for("draw.c", ()) == lib / "draw-plain.so"
    monkeypatch.setenv("RAMULUS_KERNELS", "best")
    assert prebuilt.brought_for("draw.c", ()) is None, "this processor has no wings"
    monkeypatch.setenv("RAMULUS_KERNELS", "compile")
    assert prebuilt.brought_for("draw.c", ()) is None


@pytest.mark.parametrize("damage", ["other sources", "no digest", "broken", "gone"])
def test_else_they_are_compiled(lib: Path, damage: str) -> None:
    if damage == "other sources":
        (lib / prebuilt.DIGEST).write_text("0" * 64)
    elif damage == "no digest":
        (lib / prebuilt.DIGEST).unlink()
    else:
        for path in lib.glob("*.so"):
            path.write_bytes(b"no library") if damage == "broken" else path.unlink()
    assert str(lib.parent / "cache") in build.library("draw.c", {})._name


def test_every_source_is_among_them_with_every_flag_that_is_asked_for() -> None:
    from ramulus.learn.attention.kernels import FLAGS

    made = prebuilt.bundled()
    assert {source for source, _ in made} == {path.name for path in prebuilt._HERE.glob("*.c")}
    assert {("attention.c", flags) for flags in FLAGS.values()} | {("decode.c", ()), ("decode.c", ("-DBFLOAT",)), ("draw.c", ())} <= set(made)
    names = [prebuilt.file_of(source, flags, "k") for source, flags in made]
    assert len(set(names)) == len(names)


def test_a_machine_of_another_kind_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert prebuilt.runnable_kinds() == []
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    newest = prebuilt._V4 | {"avx512_bf16"}
    wanted = ((set(), "baseline"), (prebuilt._V3, "avx2"), (prebuilt._V4, "avx512"), (newest, "avx512bf16"), ({"avx512f"}, "baseline"))
    for flags, best in wanted:
        monkeypatch.setattr(prebuilt, "abilities", lambda flags=flags: frozenset(flags))
        assert prebuilt.runnable_kinds()[0].name == best


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_brings_kernels_and_each_kind_decodes_alike(tmp_path: Path) -> None:
    pytest.importorskip("build")
    shutil.copytree(ROOT / "src", tmp_path / "source" / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "lib"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(tmp_path / "source")]
    made = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"RAMULUS_WHEEL_KERNELS": "require"})
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    [wheel] = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    for kind in prebuilt.runnable_kinds():
        paths = os.environ | {"PYTHONPATH": str(tmp_path / "installed"), "RAMULUS_KERNELS": kind.name}
        paths |= {"RAMULUS_CACHE": str(tmp_path / "cache"), "CC": "false"}  # what is not in the wheel cannot be had
        tests = [str(ROOT / "tests" / "test_engine_native.py"), "-k", "company or long_texts or temperatures or coldest or new_weights"]
        words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(words, cwd=ROOT, env=paths, capture_output=True, text=True)
        assert done.returncode == 0, f"{kind.name}: {done.stdout[-3000:]}"
