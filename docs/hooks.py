"""What MkDocs does beyond its settings: links to files outside docs/.

On GitHub, and to the tests, they are relative links to files of the repository. Of these the site
holds pictures only. Links to others lead to ``extra.source_url`` here. If that is not set, the
link's text stays, with the file's path as its title.
"""

import html
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)\s]+)\)")
PICTURE = ".png"
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2\s*?$", re.M | re.S)


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures that are kept where they are made."""
    for picture in sorted(ROOT.glob("benchmarks/*.png")) + sorted(ROOT.glob("dashboards/**/*.png")):
        uri = f"pictures/{picture.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, uri, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links that leave docs/, outside of code.

    Raises:
        FileNotFoundError: If one leads to no file; it ends the build.
    """
    directory = Path(config["docs_dir"], page.file.src_uri).parent

    def rewritten(link: "re.Match[str]") -> str:
        text, target = link.groups()
        name, _, anchor = target.partition("#")
        file = Path(os.path.normpath(directory / name))
        if file.is_relative_to(config["docs_dir"]):
            return link[0]
        if not file.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which is not there")
        path = file.relative_to(ROOT).as_posix()
        if file.suffix == PICTURE:
            up = "../" * page.file.src_uri.count("/")
            return f"[{text}]({up}pictures/{path})"
        if url := config["extra"].get("source_url"):
            return f"[{text}]({url.rstrip('/')}/{path})"
        where = f"{path}: {anchor}" if anchor else path
        return f'<span title="{html.escape(where)}">{html.escape(text.strip("`"))}</span>'

    parts: list[str] = []
    end = 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(rewritten, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(rewritten, markdown[end:])])
