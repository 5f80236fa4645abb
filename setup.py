"""What pyproject.toml cannot say: the C kernels compiled into a wheel, and README without links that break on a package index.

RAMULUS_WHEEL_KERNELS=require fails where no compiler is found, =none leaves the kernels out. A wheel without them compiles at the first use.
RAMULUS_URL is the address of the repository's files, say https://example.org/ramulus/blob/main/: README's links then lead there.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "src"))
from ramulus.native import prebuilt  # noqa: E402
from ramulus.native.build import Unavailable, compiler  # noqa: E402

WANTED = os.environ.get("RAMULUS_WHEEL_KERNELS", "")


def command():
    """The compiler for the kernels, None where they are left out."""
    if WANTED == "none":
        return None
    try:
        return compiler()
    except Unavailable:
        if WANTED == "require":
            raise
        return None


class BuildWithKernels(build_py):
    """The Python files, then the kernels for every kind of this machine's processors; a checkout (editable) compiles its own."""

    def run(self):
        super().run()
        if command() and not self.editable_mode:
            prebuilt.make(Path(self.build_lib) / "ramulus" / "native" / "lib", command())


class WheelOfThisMachine(bdist_wheel):
    """Kernels are called through ctypes: any Python, this machine."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


class WithKernels(Distribution):
    """Not pure where the kernels go in."""

    def has_ext_modules(self):
        return command() is not None


def readme():
    """README for a package index: relative links lead to RAMULUS_URL, or are text where nobody has said where that is."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    url = os.environ.get("RAMULUS_URL")
    if url:
        raw = url.replace("/blob/", "/raw/")
        text = re.sub(r"(!\[[^\]]*\]\()(?!https?:|#)", rf"\1{raw}", text)
        return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https?:|#)", rf"\1{url}", text)
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


def addresses():
    """Where things are, as far as somebody has said where."""
    url = os.environ.get("RAMULUS_URL")
    pages = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md", "Source": ""}
    return {name: url.rstrip("/") + "/" + page for name, page in pages.items()} if url else {}


setup(
    distclass=WithKernels,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfThisMachine},
    project_urls=addresses(),
    long_description=readme(),
    long_description_content_type="text/markdown",
)
