"""Adds to the site the files outside docs/ that its pages link to.

A page links to such a file by its place in the repository (``../CONTRIBUTING.md``): the link works on a code host
too. MkDocs sees only docs/. This hook adds the file under the same path to the site, and rewrites the link in the page.
A folder becomes a page that lists its files.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")
# Pages that the navigation names and that lie outside docs/
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")


def repository_uri(uri: str) -> str:
    """Where the source of a page of the site lies in the repository."""
    return f"docs/{uri}" if (ROOT / "docs" / uri).exists() else uri


def site_uri(uri: str, link: str) -> str | None:
    """The page or file of the site that a page's link leads to; None if the repository has no such file."""
    target = normpath(join(dirname(repository_uri(uri)), link))
    if target.startswith("..") or not (ROOT / target).exists():
        return None
    if (ROOT / target).is_dir():
        target = join(target, "index.md")
    return target.removeprefix("docs/")


def make_file(config: Any, uri: str) -> File:
    source = ROOT / uri
    if source.exists():
        return File.generated(config, uri, abs_src_path=str(source))
    names = sorted(path.name for path in source.parent.iterdir() if path.is_file())
    listing = "\n".join(f"- [{name}]({name})" for name in names)
    return File.generated(config, uri, content=f"# {dirname(uri)}\n\n{listing}\n")


def on_files(files: Files, config: Any) -> None:
    """Adds ``PAGES``, then every file that a page links to, until no page names a new one."""
    for uri in PAGES:
        files.append(make_file(config, uri))
    pages = list(files.documentation_pages())
    while pages:
        page = pages.pop()
        for link in LINK.findall(page.content_string):
            uri = site_uri(page.src_uri, link)
            if uri is not None and uri not in files.src_uris:
                file = make_file(config, uri)
                files.append(file)
                if file.is_documentation_page():
                    pages.append(file)


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Rewrites each link to a file of the repository into one to its copy on the site."""

    def rewrite(link: re.Match[str]) -> str:
        uri = site_uri(page.file.src_uri, link[0])
        return link[0] if uri is None else relpath(uri, dirname(page.file.src_uri) or ".")

    return LINK.sub(rewrite, markdown)
