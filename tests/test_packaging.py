"""The distribution: what pyproject lists is what the folders hold, and a wheel works where there is no checkout."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("integrations", "plugins", "retrieval")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def folders_with_modules() -> set[str]:
    files = (path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
    return {"freedraft." + ".".join(path.parent.relative_to(ROOT).parts) for path in files}


def shipped_files() -> set[str]:
    files = (path for floor in FLOORS for path in (ROOT / floor).rglob("*") if path.is_file())
    built = {".pyc", ".nbi", ".nbc"}
    return {f"freedraft/{path.relative_to(ROOT)}" for path in files if path.suffix not in built}


def test_every_folder_is_listed():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders_with_modules()


def test_every_package_has_an_init_and_every_floor_is_typed():
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        assert (ROOT / package.removeprefix("freedraft.").replace(".", "/") / "__init__.py").is_file()
    for floor in FLOORS:
        assert (ROOT / floor / "py.typed").is_file()
    # The root is a namespace package, which other distributions may share.
    assert not (ROOT / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of the sources so that nothing is left in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    for name in (*FLOORS, "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    out = tmp_path_factory.mktemp("wheel")
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=copy, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_what_the_folders_hold(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert inside == shipped_files()


def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    libraries = next(path for path in sys.path if path.endswith("site-packages"))
    # -S: no .pth files, so no editable install in the way.
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path / "site")!r}, {libraries!r}]
from importlib.metadata import distribution
import freedraft.plugins.suffix_automaton as module
assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
found = distribution("freedraft")
for entry in found.entry_points:
    if entry.group == "freedraft.drafters":
        assert entry.load().Settings, entry
from freedraft.integrations.cli import main
sys.argv = ["freedraft", "--version"]
main()
"""
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.strip() == f"freedraft {PROJECT['project']['version']}", ran.stderr


def test_floors_only_import_downwards():
    below = {"retrieval": ("plugins", "integrations"), "plugins": ("integrations",)}
    for floor, above in below.items():
        for path in (ROOT / floor).rglob("*.py"):
            source = path.read_text()
            for higher in above:
                assert f"freedraft.{higher}" not in source, f"{path.relative_to(ROOT)} knows of {higher}"


def test_importing_a_drafter_loads_no_runtime():
    code = (
        "import sys; from freedraft.plugins.registry import drafter_class, drafter_names; "
        "[drafter_class(name) for name in drafter_names() if drafter_class(name).__module__.startswith('freedraft.')]; "
        "print(sorted({'torch', 'transformers', 'vllm', 'ray'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
