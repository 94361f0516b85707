"""What runs elsewhere says what is true here: workflows, the image, the nodes' compose file."""

import re
from pathlib import Path

import pytest
import yaml

from tests.dist.__main__ import PYTHONS

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(path):
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        yield from job["steps"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflows_commands_are_there(path):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    said = "\n".join(step.get("run", "") for step in steps(path))
    for words in re.findall(r"^make ([\w -]*[\w-])", said, re.MULTILINE):
        assert set(words.split()) - {"PYTHON", "ARGS"} <= set(targets), words
    for module in re.findall(r"-m ((?:bench|tests|gikernels|trainer)[\w.]*)", said):
        place = ROOT / module.replace(".", "/")
        assert (place / "__main__.py").is_file() or place.with_suffix(".py").is_file(), module


def test_every_python_that_is_promised_is_tested():
    project = (ROOT / "pyproject.toml").read_text()  # 3.10 has no tomllib
    assert tuple(re.findall(r'"Programming Language :: Python :: ([\d.]+)"', project)) == PYTHONS
    for name, job in (("tests", "unit"), ("wheels", "try")):
        path = ROOT / ".github" / "workflows" / f"{name}.yml"
        matrix = yaml.safe_load(path.read_text())["jobs"][job]["strategy"]["matrix"]
        assert tuple(matrix["python"]) == PYTHONS, name


def test_the_image_is_made_of_what_there_is_and_not_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    assert sources and set(sources) == allowed
    assert all((ROOT / source).exists() for source in sources)
    (user,) = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert user.split(":")[0] not in ("0", "root")
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert set(compose["services"]) == {"doctor", "train"}
