"""README.md and the docs site, from the notebooks.

    .venv/bin/python .ci/docs.py readme     README.md from nbs/index.ipynb
    .venv/bin/python .ci/docs.py site       _docs/: with quarto where it is on PATH, else with pandoc

nbdev does what comes before either: it documents each exported function, follows the links, leaves out what is hidden.
"""
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import pypandoc
import yaml
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(__file__).resolve().parent / "site"
NBS, README, DOCS = ROOT / "nbs", ROOT / "README.md", ROOT / "_docs"
MADE = "<!-- Made from nbs/index.ipynb by `make prepare`: edit that notebook, not this file. -->"
# Pandoc's own Markdown with what Jupyter and quarto accept besides.
DIALECT = "markdown-implicit_figures+lists_without_preceding_blankline+autolink_bare_uris"
DIRECTIVE = re.compile(r"^#\|\s*([\w-]+):?[ \t]*(.*)$\n?", re.MULTILINE)


# ---------------------------------------------------------------- a notebook as one Markdown text


def directives(source):
    "The `#| key: value` lines of a cell, and the cell without them."
    return dict(DIRECTIVE.findall(source)), DIRECTIVE.sub("", source).strip("\n")


def fenced(text, kind):
    "A code block whose fence is longer than any fence inside it."
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", text))])
    return f"{ticks}{kind}\n{text.rstrip()}\n{ticks}"


def saved_image(data, suffix, folder, number):
    "Write an image output into `folder` and return the Markdown that shows it."
    folder.mkdir(parents=True, exist_ok=True)
    name = f"output-{number}.{suffix}"
    (folder / name).write_bytes(data)
    return f"![]({folder.name}/{name})"


def output_markdown(output, options, images):
    "One output of a code cell; `images` numbers and saves its pictures."
    joined = lambda o: "".join(o) if isinstance(o, list) else o
    if output["output_type"] == "error":
        return fenced("\n".join(output["traceback"]), " {.output}")
    if output["output_type"] == "stream":
        text = joined(output["text"])
        return text if options.get("output") == "asis" else fenced(text, " {.output}")
    data = {kind: joined(value) for kind, value in output["data"].items() if "json" not in kind}
    if "text/markdown" in data:
        return data["text/markdown"]
    if "text/html" in data:
        return fenced(data["text/html"], "{=html}")
    if "image/svg+xml" in data:
        return images(data["image/svg+xml"].encode(), "svg")
    for suffix in ("png", "jpeg"):
        if f"image/{suffix}" in data:
            return images(base64.b64decode(data[f"image/{suffix}"]), suffix)
    return fenced(data.get("text/plain", ""), " {.output}")


def cell_markdown(cell, images):
    "A cell as Markdown: prose as it stands, code and outputs fenced, hidden parts left out."
    source = "".join(cell.get("source") or [])
    if cell["cell_type"] == "markdown":
        return [source]
    if cell["cell_type"] != "code":
        return []
    options, code = directives(source)
    hidden = options.get("include") == "false" or "hide" in options or "default_exp" in options
    if hidden:
        return []
    parts = [fenced(code, "python")] if code and options.get("echo") != "false" else []
    shown = [] if options.get("output") == "false" else cell.get("outputs", [])
    return parts + [output_markdown(output, options, images) for output in shown]


def notebook_markdown(notebook, images):
    "All cells, a blank line between."
    parts = [part for cell in notebook["cells"] for part in cell_markdown(cell, images)]
    return "\n\n".join(part.strip("\n") for part in parts if part.strip()) + "\n"


# ---------------------------------------------------------------- links, on pandoc's syntax tree


def mapped_links(node, change):
    "The same syntax tree with `change` applied to the target of every link and image."
    if isinstance(node, list):
        return [mapped_links(child, change) for child in node]
    if not isinstance(node, dict):
        return node
    if node.get("t") in ("Link", "Image"):
        attributes, text, (url, title) = node["c"]
        return {"t": node["t"], "c": [attributes, mapped_links(text, change), [change(url), title]]}
    return {key: mapped_links(value, change) for key, value in node.items()}


def convert(text, source, target, change, *options):
    "Markdown to another format, its links changed on the way."
    tree = json.loads(pypandoc.convert_text(text, "json", format=source))
    tree["blocks"] = mapped_links(tree["blocks"], change)
    return pypandoc.convert_text(json.dumps(tree), target, format="json", extra_args=list(options))


def is_local(url):
    return not re.match(r"[a-z][a-z0-9+.-]*:|#|/", url, re.IGNORECASE)


# ---------------------------------------------------------------- README.md


def readme_link(url):
    "A link that stands in nbs/index.ipynb, as seen from the root of the repository."
    return os.path.normpath("nbs/" + url).replace(os.sep, "/") if is_local(url) else url


def no_images(data, suffix):
    sys.exit("docs: nbs/index.ipynb has an image in an output, which README.md cannot hold;"
             " save it under nbs/images/ and show it from a Markdown cell")


def readme():
    "The text of README.md."
    notebook = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))
    body = notebook_markdown(notebook, no_images)
    body = re.sub(r'(\bsrc(?:set)?=")([^"]+)', lambda m: m[1] + readme_link(m[2]), body)  # in raw HTML
    text = convert(body, "gfm", "gfm", readme_link, "--wrap=preserve")
    return f"{MADE}\n\n{text.strip()}\n"


# ---------------------------------------------------------------- the site, with pandoc


def processed_notebooks():
    "What nbdev makes of each notebook, as {notebook name: notebook}, the index first."
    from nbdev.serve import proc_nbs
    os.environ["PYTHONWARNINGS"] = "ignore:Found cells containing imports"  # such as os.environ beside an import
    try:
        folder = proc_nbs(n_workers=2)
    except Exception as error:  # whatever the code of a notebook raised
        why = re.search(r"^[\w.]*(Error|Exception|Interrupt)\b.*", str(error.__cause__), re.MULTILINE)
        sys.exit(f"docs: {error}\n\n{why[0] if why else error.__cause__}")
    names = sorted((path.name for path in NBS.glob("[!._]*.ipynb")), key=lambda name: (name != "index.ipynb", name))
    return {name: json.loads((folder / name).read_text(encoding="utf-8")) for name in names}


def front_matter(notebook):
    "The title, description and output file that nbdev put into the first cell."
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "raw"]
    return yaml.safe_load("".join(cells[0]["source"]).strip().strip("-")) if cells else {}


def site_link(pages):
    "A function that turns links to notebooks, and to the published site, into links between the pages."
    published = get_config().doc_host + get_config().doc_baseurl + "/"

    def change(url):
        url = url.removeprefix(published)
        target, hash_, anchor = url.partition("#")
        if not is_local(url):
            return url
        if target in pages:
            return pages[target]["output-file"] + hash_ + anchor
        outside = os.path.normpath("nbs/" + target).replace(os.sep, "/")
        if target.startswith("../"):
            return f"{get_config().git_url}/blob/{get_config().branch}/{outside}{hash_}{anchor}"
        return url
    return change


def navigation(pages, current):
    "The list of pages, as HTML."
    def item(name, page):
        here = ' aria-current="page"' if name == current else ""
        return f'<li><a href="{page["output-file"]}"{here}>{escape(page["title"])}</a></li>'
    return "<ul>\n" + "\n".join(item(name, page) for name, page in pages.items()) + "\n</ul>"


def neighbours(pages, current):
    "Links to the page before and the page after, as HTML."
    names = list(pages)
    at, links = names.index(current), []
    for step, rel, arrow in ((-1, "prev", "← {}"), (1, "next", "{} →")):
        if 0 <= at + step < len(names):
            page = pages[names[at + step]]
            links.append(f'<a rel="{rel}" href="{page["output-file"]}">{arrow.format(escape(page["title"]))}</a>')
    return "\n".join(links)


def write_page(name, notebook, pages):
    "One notebook as one HTML file."
    page, counter = pages[name], iter(range(1, 10_000))
    images = lambda data, suffix: saved_image(data, suffix, DOCS / (Path(name).stem + "_files"), next(counter))
    variables = dict(title=escape(page["title"]), description=escape(page.get("description", "")),
                     site=escape(get_config().title), repository=get_config().git_url,
                     nav=navigation(pages, name), neighbours=neighbours(pages, name))
    options = [f"--variable={key}:{value}" for key, value in variables.items()]
    html = convert(notebook_markdown(notebook, images), DIALECT, "html5", site_link(pages), "--standalone",
                   f"--template={SITE / 'page.html'}", "--toc", "--toc-depth=2", "--mathml", "--wrap=preserve",
                   "--metadata=pagetitle:" + page["title"], *options)
    (DOCS / page["output-file"]).write_text(html, encoding="utf-8")


def site_with_pandoc():
    "The site from pandoc, a template and a style sheet; nothing on it needs a network."
    notebooks = processed_notebooks()
    fallback = lambda name: {"title": Path(name).stem, "output-file": Path(name).stem + ".html"}
    pages = {name: fallback(name) | front_matter(notebook) for name, notebook in notebooks.items()}
    shutil.rmtree(DOCS, ignore_errors=True)
    DOCS.mkdir()
    shutil.copy(SITE / "style.css", DOCS)
    if (NBS / "images").is_dir():
        shutil.copytree(NBS / "images", DOCS / "images")
    for name, notebook in notebooks.items():
        write_page(name, notebook, pages)
    return len(pages)


def site_with_quarto():
    "The site from quarto, through nbdev_docs, which must leave README.md alone."
    README.touch()
    subprocess.run([str(Path(sys.executable).parent / "nbdev_docs"), "--n_workers", "2"], cwd=ROOT, check=True)
    return len(list(DOCS.glob("*.html")))


def main():
    task = sys.argv[1:]
    if task == ["readme"]:
        README.write_text(readme(), encoding="utf-8", newline="\n")
    elif task == ["site"]:
        pages = site_with_quarto() if shutil.which("quarto") else site_with_pandoc()
        print(f"{pages} pages: {DOCS / 'index.html'}")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
