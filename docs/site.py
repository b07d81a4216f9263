"""What `mkdocs build` needs beside the pages: the plots, which pages name as GitHub finds them, and plain marks in the API."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.structure.files import File

PLOTS = "../benchmarks/results/plots/"
# Docstrings are written for reStructuredText, too: "::" before a block, ":class:" before a name.
MARKS = re.compile(r"<p>::</p>\n?|:(?:class|func|meth|mod):(?=<code>)|(?<=:):(?=</p>)")


def on_files(files, config):
    """Adds the plots as files of the site."""
    for path in sorted((Path(config.docs_dir) / PLOTS).glob("*.svg")):
        files.append(File.generated(config, f"plots/{path.name}", abs_src_path=str(path.resolve())))
    return files


def on_page_markdown(markdown, **_):
    """Points a page's pictures to the site's copies."""
    return markdown.replace(f"]({PLOTS}", "](plots/")


def on_page_content(html, page, **_):
    """Leaves reStructuredText's marks out of the API page."""
    return MARKS.sub("", html) if page.file.src_uri == "api.md" else html
