"""What is shipped: every sub-package is in the wheel, and the algorithms do not know Lightning."""

import ast
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed here")
    folder = tmp_path_factory.mktemp("build")
    # A copy, so that no build output is left in the checkout.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("autotune", "callbacks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", "."]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    (file,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def sources(folder):
    return [file for file in (ROOT / folder).rglob("*.py") if "__pycache__" not in file.parts]


def test_every_module_is_in_the_wheel(wheel):
    wanted = {file.relative_to(ROOT).as_posix() for file in sources("autotune")}
    wanted |= {f"autotune/{file.relative_to(ROOT).as_posix()}" for file in sources("callbacks")}
    assert len(wanted) > 30
    assert wanted - set(wheel) == set()
    assert {name for name in wheel if name.endswith(".py")} - wanted == set()


def test_marker_and_metadata(wheel):
    assert "autotune/py.typed" in wheel
    metadata = next(content for name, content in wheel.items() if name.endswith("METADATA")).decode()
    assert "Name: lightning-autotune" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    top = next(content for name, content in wheel.items() if name.endswith("top_level.txt")).decode().split()
    assert top == ["autotune"]


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("file", sources("autotune"), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_algorithms_do_not_import_lightning(file):
    banned = ("lightning", "pytorch_lightning", "autotune.callbacks", "callbacks")
    found = [
        name for name in imports(file) if name.split(".")[0] in banned[:2] + banned[3:] or name.startswith(banned[2])
    ]
    assert not found


def test_importing_the_algorithms_loads_no_lightning():
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in sources("autotune")
        if "report" not in file.parts and file.name != "__main__.py"
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('lightning', 'pytorch_lightning')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_source_file_keeps_to_the_house():
    for file in sources("autotune") + sources("callbacks"):
        text = file.read_text(encoding="utf-8")
        assert ast.get_docstring(ast.parse(text)) or not text.strip(), f"{file} has no docstring"
        if file.parent.name == "callbacks" or "_trainer" in file.parts:
            assert "from callbacks" not in text
