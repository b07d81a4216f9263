"""What `mkdocs build` needs beside the pages: the plots of benchmarks/results, which pages name as GitHub finds them."""

from __future__ import annotations

from pathlib import Path

from mkdocs.structure.files import File

PLOTS = "../benchmarks/results/plots/"


def on_files(files, config):
    """Adds the plots as files of the site."""
    for path in sorted((Path(config.docs_dir) / PLOTS).glob("*.svg")):
        files.append(File.generated(config, f"plots/{path.name}", abs_src_path=str(path.resolve())))
    return files


def on_page_markdown(markdown, **_):
    """Points a page's pictures to the site's copies."""
    return markdown.replace(f"]({PLOTS}", "](plots/")
