"Builds the package from settings.ini, which nbdev reads too, so that each fact stands in one place."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).resolve().parent
config = ConfigParser()
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
package = here / cfg["lib_path"]


def data_files() -> list:
    "What ships beside the modules: YAML groups, model shapes, the tiny model, the notebook that papermill runs."
    found = [p for folder in ("conf", "assets") for p in (package / folder).rglob("*")]
    hidden = ("__pycache__", ".ipynb_checkpoints")
    return sorted(p.relative_to(package).as_posix() for p in found if p.is_file() and not set(hidden) & set(p.parts))


suffix = "_requirements"
extras = {key.removesuffix(suffix): cfg[key].split() for key in cfg if key.endswith(suffix)}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    python_requires=f">={cfg['min_python']}",
    packages=[cfg["lib_path"]],
    package_data={cfg["lib_path"]: data_files()},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    # The second entry lets nbdev link names in the docs to where they are explained.
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["qlora_nb=qlora_nb._modidx:d"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Natural Language :: English",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
