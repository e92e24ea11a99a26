"""What lies outside `docs/` and is linked from there comes with the site: pictures, tables, sources.

Pages of the repository link to files as they lie, so that they can be read there, too.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")
FOLDER = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to."""
    sources = [DOCS / page.src_uri for page in files.documentation_pages()]
    linked = ((source.parent / target).resolve() for source in sources for target in _list_links(source))
    for path in dict.fromkeys(linked):
        if path.is_file() and not path.is_relative_to(DOCS):
            files.append(File.generated(config, _uri(path), abs_src_path=str(path)))
    return files


def _list_links(source: Path) -> list[str]:
    return LINK.findall(source.read_text())


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to these files where they lie in the site. Folders are no pages: their names stay."""
    folder = (DOCS / page.file.src_uri).parent

    def rename(match: re.Match[str]) -> str:
        path = (folder / match[1]).resolve()
        if path.is_relative_to(DOCS) or not path.is_file():
            return match[1]
        return os.path.relpath(_uri(path), PurePosixPath(page.file.src_uri).parent)

    def drop(match: re.Match[str]) -> str:
        return match[1] if (folder / match[2]).resolve().is_dir() else match[0]

    return LINK.sub(rename, FOLDER.sub(drop, markdown))


def _uri(path: Path) -> str:
    """Sources are shown as text, and are no pages."""
    name = path.relative_to(ROOT).as_posix()
    return f"files/{name}" if path.suffix in {".png", ".csv", ".json"} else f"files/{name}.txt"
