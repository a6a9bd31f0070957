"The package as others get it: which module imports which, what importing costs, the wheel in an environment of its own."
import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "qlora_nb"
NUMBER = {}
for notebook in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
    source = "".join(c for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] for c in [*cell["source"], "\n"])
    NUMBER[re.search(r"#\| default_exp (\w+)", source)[1]] = int(notebook.name[:2])


def imports(path, inside=True):
    "Every module that a file imports, at the top and, unless left out, inside a function."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if inside else tree.body:
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("module", NUMBER)
def test_imports_only_lower_numbers(module):
    for name in imports(PACKAGE / f"{module}.py"):
        if name.startswith("qlora_nb."):
            assert NUMBER[name.split(".")[1]] < NUMBER[module], f"{module} imports {name}"


def test_evaluation_and_serve_are_strangers():
    assert "qlora_nb.evaluation" not in imports(PACKAGE / "serve.py")
    assert "qlora_nb.serve" not in imports(PACKAGE / "evaluation.py")


@pytest.mark.parametrize("module", NUMBER)
def test_no_development_tool_is_imported(module):
    "But for IPython by the live plot, inside a function: where it draws there is a kernel, and with it IPython."
    tools = {"fastcore", "nbdev", "execnb", "IPython"}
    found = {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py")} & tools
    assert found == ({"IPython"} if module == "display" else set())
    assert not {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py", inside=False)} & tools


def test_budget_needs_only_the_standard_library():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from qlora_nb.vram_budget import load_shape, predict; print(predict(load_shape('mistral-7b')))"
    shown = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert shown.stdout.startswith("Budget(mistral-7b"), shown.stderr


@pytest.mark.parametrize("code", ["import qlora_nb", "import qlora_nb.vram_budget", "import qlora_nb.config",
                                  "import contextlib, sys; sys.argv = ['qlora', '--help']\nfrom qlora_nb.cli import main\n"
                                  "with contextlib.suppress(SystemExit): main()"])
def test_no_torch_is_loaded(code):
    loaded = "import sys; print('loaded:', {'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", f"{code}\n{loaded}"], capture_output=True, text=True, check=True, cwd="/").stdout
    assert "loaded: set()" in shown


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from this tree."
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(out.glob("*.whl"))


def test_wheel_in_a_clean_environment(wheel, tmp_path):
    "Installed in an environment that has its dependencies but neither this repository nor the development tools."
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, capture_output=True)
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
                          capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = ("import sys, importlib\nfor tool in ('fastcore', 'nbdev', 'execnb', 'jupyterlab', 'pytest'): sys.modules[tool] = None\n"
            f"for m in {list(NUMBER)}: print(importlib.import_module('qlora_nb.' + m).__file__)")
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert all(line.startswith(str(tmp_path)) for line in shown.stdout.splitlines())
    listed = subprocess.run([python, "-c", "from qlora_nb.config import compose; from qlora_nb.cli import notebook_path; "
                             "from qlora_nb.model import load_base; load_base('tiny'); print(compose(['model=tiny']).model.path, notebook_path().exists())"],
                            capture_output=True, text=True, cwd=tmp_path)
    assert listed.stdout.split() == ["tiny", "True"], listed.stderr


def test_the_help_desk_is_the_same_elsewhere(tmp_path):
    "The same rows from another interpreter path, home, user, locale and time zone."
    from qlora_nb.tiny_base import helpdesk_rows
    venv.create(tmp_path / "else", with_pip=False, symlinks=True)
    code = (f"import sys; sys.path += [{str(ROOT)!r}, {sysconfig.get_paths()['purelib']!r}]\n"
            "import json; from qlora_nb.tiny_base import build_rows; print(json.dumps(build_rows()))")
    other = {"HOME": str(tmp_path), "USER": "someone", "LOGNAME": "someone", "LC_ALL": "C", "TZ": "Asia/Tokyo", "COLUMNS": "40"}
    done = subprocess.run([tmp_path / "else" / "bin" / "python", "-c", code], capture_output=True, text=True, cwd=tmp_path,
                          env={"PATH": os.environ["PATH"], **other})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == helpdesk_rows()


@pytest.mark.slow
def test_wheel_with_its_own_dependencies(wheel, tmp_path):
    "The same from the package index, torch first; then the help page and a budget."
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    for packages in (["torch==2.13.0"], [wheel]):
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, capture_output=True)
    subprocess.run([python, "-c", f"import importlib\nfor m in {list(NUMBER)}: importlib.import_module('qlora_nb.' + m)"],
                   check=True, cwd=tmp_path)
    subprocess.run([python.with_name("qlora"), "budget", "tiny"], check=True, cwd=tmp_path)
