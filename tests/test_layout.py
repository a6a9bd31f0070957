"The repository's own shape: copies that must be equal, what the wheel is built from, what the docs can render."
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
IMPORTS = (ast.Import, ast.ImportFrom)


def settings():
    config = ConfigParser()
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


@pytest.mark.parametrize("source, copy", [("_quarto.yml", "nbs/_quarto.yml"),
                                          ("nbs/20_train.ipynb", "qlora_nb/assets/20_train.ipynb")])
def test_copies_are_identical(source, copy):
    assert (ROOT / source).read_bytes() == (ROOT / copy).read_bytes()


def sets_environment(node):
    return ast.unparse(node).startswith("os.environ")


def test_requirements_pin_what_settings_ask_for():
    "Each requirement of settings.ini has an exact pin that satisfies it."
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {canonicalize_name(Requirement(line).name): str(Requirement(line).specifier) for line in lines}
    assert all(re.fullmatch(r"==[\w.]+", pin) for pin in pins.values())
    for line in (settings()["requirements"] + settings()["dev_requirements"]).split():
        need = Requirement(line)
        assert need.specifier.contains(pins[canonicalize_name(need.name)].removeprefix("==")), line


def test_pins_accept_the_oldest_python():
    "Debian 12 has 3.11.2, and a package may ask for 3.11.5."
    from importlib.metadata import distributions
    from packaging.specifiers import SpecifierSet
    oldest = settings()["min_python"] + ".2"
    asks = {d.metadata["Name"]: d.metadata.get("Requires-Python") or "" for d in distributions()}
    assert not {name: ask for name, ask in asks.items() if not SpecifierSet(ask).contains(oldest)}


def test_import_is_light():
    "`import qlora_nb` loads no heavy library and takes its version from settings.ini."
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys, qlora_nb; print(qlora_nb.__version__, {heavy} & set(sys.modules) or '')"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.strip() == settings()["version"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_title_cell_holds_only_title_and_promise(path):
    "nbdev turns that whole cell into the page's title and description, so any prose in it would be lost from the docs."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    title = next("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    bare = re.fullmatch(r"# [^\n]+(\n\n> [^\n]+)?", title.strip())
    assert bare, f"a title and a one-line promise; the rest goes into a cell of its own:\n{title}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_stand_in_cells_of_their_own(path):
    "The docs build runs each cell that imports: one that also computes would run there, without what came before."
    mixed = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or re.search(r"^#\| *(export|eval: *false)", source, re.MULTILINE):
            continue
        tree = ast.parse(re.sub(r"^(%|!)", "# ", source, flags=re.MULTILINE))
        imports = any(isinstance(node, IMPORTS) for node in ast.walk(tree))
        if imports and not all(isinstance(node, IMPORTS) or sets_environment(node) for node in tree.body):
            mixed.append(source)
    assert not mixed, "split these cells, imports first:\n\n" + "\n\n".join(mixed)
