"""Compiling on first use: where to, with what, and what is said when it cannot be done."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gikernels
from gikernels import partition
from gikernels.backends import build

ROOT = Path(__file__).parents[3]
COMPILER = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has loaded nothing, with an empty cache."""
    monkeypatch.setenv("GIKERNELS_CACHE", str(tmp_path / "cache"))
    build._load_once.cache_clear()
    yield monkeypatch
    build._load_once.cache_clear()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The same compiler, told not to optimise, and to remember what it has made: a dozen builds of
    the same sources take a minute."""
    folder = tmp_path_factory.mktemp("compiler")
    cxx, made = folder / "quick-c++", folder / "made.so"
    real = build.compiler("cpp")
    cxx.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && exec {real} --version\n'
        "for last; do :; done\n"
        f'[ -e {made} ] || {{ {real} "$@" -O0 && cp "$last" {made}; exit; }}\n'
        f'sleep 0.2; cp {made} "$last"\n'
    )
    cxx.chmod(0o755)
    return str(cxx)


def python(code, folder, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@COMPILER
def test_built_once_and_kept(fresh, quick):
    fresh.setenv("CXX", quick)
    available, path = build.status("cpp")
    assert available, path
    built = Path(path).stat().st_mtime_ns
    build._load_once.cache_clear()
    assert build.status("cpp") == (True, path)
    assert Path(path).stat().st_mtime_ns == built
    left = sorted(p.suffix for p in build.cache_dir().iterdir())
    assert left == [".lock", ".so"]
    assert gikernels.backends()["cpp"].reason == path


def test_the_name_changes_with_source_flags_and_compiler(fresh, tmp_path):
    def name(**flags):
        for key, value in flags.items():
            fresh.setattr(build, key, value)
        return build._hash(*build._recipe("cpp"))

    csrc = shutil.copytree(build.CSRC, tmp_path / "csrc")
    names = [name(), name(CPP_FLAGS=(*build.CPP_FLAGS, "-g")), name(CSRC=csrc)]
    with open(csrc / "partition.h", "a") as header:
        header.write("// changed\n")
    names.append(name())
    assert names[0] != names[1] == names[2] != names[3]

    compilers = []
    for version in ("1", "2"):
        cxx = tmp_path / f"c++{version}"
        cxx.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\ntouch "${{@: -1}}"\n'
        )
        cxx.write_text(cxx.read_text().replace("#!/bin/sh", "#!/bin/bash"))
        cxx.chmod(0o755)
        fresh.setenv("CXX", str(cxx))
        compilers.append(build.build("cpp").name)
    assert compilers[0] != compilers[1]


@COMPILER
def test_two_processes_race_for_one_library(quick, tmp_path):
    code = "from gikernels.backends import build; print(build.status('cpp')[1])"
    cache = tmp_path / "cache"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GIKERNELS_CACHE": str(cache),
        "CXX": quick,
    }
    racers = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    paths = {racer.communicate()[0].decode().strip() for racer in racers}
    assert len(paths) == 1 and Path(paths.pop()).exists()
    assert sorted(p.suffix for p in cache.iterdir()) == [".lock", ".so"]


def test_without_a_compiler_auto_is_pytorch_and_cpp_says_why(tmp_path):
    """Also: the import alone builds nothing."""
    out = python(
        "import os, torch, gikernels\n"
        "assert not os.path.exists(os.environ['GIKERNELS_CACHE'])\n"
        "x = torch.tensor([1.0, 9, 2, 8])\n"
        "print(gikernels.partition(x).group_ids.tolist())\n"
        "print(gikernels.backends()['cpp'].reason)\n"
        "try:\n    gikernels.partition(x, backend='cpp')\n"
        "except gikernels.BackendUnavailable as error:\n    print(error)\n",
        tmp_path,
        PATH="",
        CXX="",
        GIKERNELS_CACHE=str(tmp_path / "cache"),
    )
    groups, reason, error = out.splitlines()
    assert groups == "[0, 1, 0, 1]"
    assert "no C++ compiler" in reason and "install g++" in reason
    assert "'cpp'" in error and reason in error


def test_a_compiler_that_is_not_there(fresh):
    fresh.setenv("CXX", "no-such-compiler")
    assert build.status("cpp") == (False, "no C++ compiler: CXX=no-such-compiler is not found")
    with pytest.raises(gikernels.BackendUnavailable, match=r"cpp.*CXX=no-such-compiler"):
        partition(torch.arange(3.0), backend="cpp")
    assert partition(torch.arange(3.0)).group_ids.tolist() == [0, 1, 1]
    ids = torch.tensor([0, 1, 1])
    assert gikernels.group_stats(torch.arange(3.0), ids, 2).mean.tolist() == [0, 1.5]


def test_what_the_compiler_said_is_kept(fresh, tmp_path):
    cxx = tmp_path / "broken"
    cxx.write_text("#!/bin/sh\necho boom: line 7 >&2\nexit 3\n")
    cxx.chmod(0o755)
    fresh.setenv("CXX", str(cxx))
    available, reason = build.status("cpp")
    assert not available and "failed with code 3" in reason and "boom: line 7" in reason
    assert [p.suffix for p in build.cache_dir().iterdir()] == [".lock"]  # nothing half made


@COMPILER
def test_a_cache_that_cannot_be_written(fresh, tmp_path):
    (tmp_path / "file").touch()
    fresh.setenv("GIKERNELS_CACHE", str(tmp_path / "file" / "cache"))
    available, reason = build.status("cpp")
    assert not available and str(tmp_path / "file") in reason and "GIKERNELS_CACHE" in reason


@COMPILER
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-99]])
def test_a_cached_library_that_was_cut_is_built_again(fresh, quick, damage):
    """To load half of one ends the process by SIGBUS, without a word."""
    fresh.setenv("CXX", quick)
    path = build.build("cpp")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert build.build("cpp") == path and path.read_bytes() == whole
    assert build.status("cpp") == (True, str(path))


@COMPILER
def test_a_library_of_another_user_is_not_loaded(fresh, quick):
    fresh.setenv("CXX", quick)
    path = build.build("cpp")
    fresh.setattr(build.os, "getuid", lambda: 4321)
    os.chown(path, 1234, -1) if os.geteuid() == 0 else None
    available, reason = build.status("cpp")
    assert not available and f"{path} belongs to another user" in reason


@COMPILER
def test_a_link_in_place_of_the_lock_is_not_followed(fresh, quick, tmp_path):
    fresh.setenv("CXX", quick)
    path = build.build("cpp")
    path.unlink()
    (tmp_path / "precious").write_text("kept")
    path.with_suffix(".lock").unlink()
    path.with_suffix(".lock").symlink_to(tmp_path / "precious")
    available, reason = build.status("cpp")
    assert not available and "GIKERNELS_CACHE" in reason
    assert (tmp_path / "precious").read_text() == "kept"


def test_where_there_is_no_home_that_is_said(monkeypatch):
    def gone(path):
        raise RuntimeError("Could not determine home directory.")

    for variable in ("GIKERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "expanduser", gone)
    with pytest.raises(build.BuildError, match=r"home directory.*GIKERNELS_CACHE"):
        build.cache_dir()


def test_where_the_cache_is(monkeypatch):
    for variable in ("GIKERNELS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    assert build.cache_dir() == Path("/nowhere/.cache/gikernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert build.cache_dir() == Path("/elsewhere/gikernels")
    monkeypatch.setenv("GIKERNELS_CACHE", "/here")
    assert build.cache_dir() == Path("/here")


@COMPILER
def test_a_shipped_library_needs_no_compiler(fresh, quick, tmp_path):
    fresh.setenv("CXX", quick)
    shipped = build.build("cpp", into=tmp_path / "lib")
    fresh.setattr(build, "SHIPPED", tmp_path / "lib")
    fresh.setenv("CXX", "no-such-compiler")
    assert build.status("cpp") == (True, str(shipped))
    fresh.setattr(build, "CPP_FLAGS", (*build.CPP_FLAGS, "-g"))  # no longer of these sources
    assert build.shipped("cpp", ()) is None


@COMPILER
def test_a_shipped_library_that_does_not_load_is_built_here(fresh, quick, tmp_path):
    """Another C library, say. Where that fails too, both reasons are told."""
    fresh.setattr(build, "SHIPPED", tmp_path / "lib")
    fresh.setenv("CXX", quick)
    shipped = build.build("cpp", into=tmp_path / "lib")
    shipped.write_bytes(b"not a library")
    available, path = build.status("cpp")
    assert available and Path(path).parent == build.cache_dir()
    build._load_once.cache_clear()
    fresh.setenv("CXX", "no-such-compiler")
    available, reason = build.status("cpp")
    assert not available and shipped.name in reason and "no-such-compiler" in reason


def test_a_shipped_cuda_library_must_serve_every_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "SHIPPED", tmp_path)
    library = tmp_path / f"cuda-{build._hash(*build._recipe('cuda'))}-sm80-sm90.so"
    library.touch()
    for archs, served in (((90,), True), ((80, 90), True), ((86,), True), ((100,), False)):
        assert (build.shipped("cuda", archs) == library) is served, archs


@COMPILER
def test_the_command_line(quick, tmp_path):
    command = [sys.executable, "-W", "error", "-m", "gikernels.build"]
    cache = tmp_path / "cache"
    environment = {
        **os.environ,
        "GIKERNELS_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "CXX": quick,
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    path = done.stdout.splitlines()[0].removeprefix("cpp: ")
    assert Path(path).parent == cache and Path(path).exists()


@COMPILER
def test_an_installed_package_brings_its_library(quick, tmp_path):
    """And its sources. One for every Python of this platform; nothing is left to compile."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("gikernels", "trainer", "csrc"):
        shutil.copytree(
            ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    pip += ["--no-index", "--target", str(site), str(source)]
    environment = {**os.environ, "CXX": quick}
    done = subprocess.run(pip, env=environment, capture_output=True, text=True)
    if "setuptools" in done.stderr and done.returncode:
        pytest.skip("no setuptools new enough to build with")
    assert done.returncode == 0, done.stderr
    out = python(
        "import gikernels; print(gikernels.__file__, *gikernels.backends()['cpp'])",
        tmp_path,
        CXX="no-such-compiler",
        PYTHONPATH=str(site),
        GIKERNELS_CACHE=str(tmp_path / "cache"),
    )
    package, available, library = out.split()
    assert package == str(site / "gikernels" / "__init__.py") and available == "True", out
    assert Path(library).parent == site / "gikernels" / "lib"
    assert [file.suffix for file in Path(library).parent.iterdir()] == [".so"]
    assert (site / "gikernels" / "csrc" / "partition.cu").is_file()
    (about,) = site.glob("gikernels-*.dist-info/WHEEL")
    assert "Tag: py3-none-linux_" in about.read_text()
