"""The wheel and the sdist: built without a network, with what belongs in them and nothing else."""

from __future__ import annotations

import email
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from pathlib import Path

import pytest

from mics.errors import EXTRAS
from mics.version import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"torch_mics-{__version__}"

pytestmark = [pytest.mark.slow, pytest.mark.extra]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, made of what git knows: no rest of an earlier build is in them."""
    pytest.importorskip("build")
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in files.stdout.splitlines():
        if name.startswith("src/") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl")


def metadata(built: Path) -> Message:
    return email.message_from_bytes(wheel(built).read(f"{NAME}.dist-info/METADATA"))


def test_the_wheel_has_every_file_of_the_package_and_no_other(built: Path) -> None:
    names = {name for name in wheel(built).namelist() if ".dist-info/" not in name}
    package = ROOT / "src" / "mics"
    of = {f"mics/{f.relative_to(package)}" for f in package.rglob("*.py")}
    data = {f"mics/{f.relative_to(package)}" for f in package.rglob("*.toml")}
    assert len(data) >= 4
    assert names == of | data | {"mics/py.typed"}


def test_the_metadata_say_what_pyproject_does(built: Path) -> None:
    said = metadata(built)
    assert (said["Name"], said["Version"]) == ("torch-mics", __version__)
    assert said["Requires-Python"] == PROJECT["requires-python"]
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Description-Content-Type"] == "text/markdown"
    assert said.get_all("Classifier") == PROJECT["classifiers"]
    assert len(said.get_all("Project-URL") or []) == len(PROJECT["urls"])
    assert {"all", *EXTRAS} <= set(said.get_all("Provides-Extra") or [])
    alone = [line for line in said.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert alone == ["torch>=2.11"]
    entry_points = wheel(built).read(f"{NAME}.dist-info/entry_points.txt").decode()
    assert "mics = mics.__main__:main" in entry_points


def test_the_sdist_builds_the_same_and_has_the_licence(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "src/mics/py.typed"} <= names


def test_twine_finds_nothing_to_say(built: Path) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
