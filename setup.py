"""Puts the compiled C++ library into the wheel and names the platform; the rest: pyproject.toml.

The library has a plain C interface, so one wheel serves every Python and every PyTorch. Without a
compiler the wheel holds sources alone, and says so. GIKERNELS_WHEEL_ARCHS=80,90,100,120 adds the
CUDA library, which is otherwise built on first use.
"""

import importlib.util
import os
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
FROM_FILE = importlib.util.spec_from_file_location("build", ROOT / "gikernels/backends/build.py")
build = importlib.util.module_from_spec(FROM_FILE)  # not by its package, which imports torch
FROM_FILE.loader.exec_module(build)

CHOSEN = os.environ.get("GIKERNELS_WHEEL_ARCHS", "")
ARCHS = tuple(sorted(int(arch) for arch in CHOSEN.split(",") if arch))


def has_compiler() -> bool:
    try:
        return bool(build.compiler("cpp"))
    except build.BuildError:
        return False


class Libraries(build_py):
    """Compiles beside the modules; a checkout that is installed in place compiles on first use."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        into = Path(self.build_lib) / "gikernels" / "lib"
        if has_compiler():
            build.build("cpp", into=into)
        else:
            self.warn("no C++ compiler: this wheel has no library, and runs without one")
        if ARCHS:
            build.build("cuda", ARCHS, into=into)
        for lock in into.glob("*.lock"):
            lock.unlink()


class WithLibraries(Distribution):
    """Of one platform, where something was compiled for it."""

    def has_ext_modules(self):
        return has_compiler() or bool(ARCHS)


class PlatformWheel(bdist_wheel):
    """For every Python of that platform."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


setup(distclass=WithLibraries, cmdclass={"build_py": Libraries, "bdist_wheel": PlatformWheel})
