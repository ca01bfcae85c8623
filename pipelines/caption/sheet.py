"""The contact sheet: random pictures of a run with their old and new captions, in one HTML file that a browser refreshes by itself."""

from __future__ import annotations

import base64
import html
import time
from pathlib import Path

from pipelines.caption.tally import Example

SHEET = "contact_sheet.html"
_PAGE = """<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="30"><title>captune: contact sheet</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem; color: #222 }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1.2rem }}
figure {{ margin: 0 }} img {{ width: 100%; image-rendering: auto; border-radius: 4px }}
del {{ color: #888; display: block }} .none {{ color: #b00 }}
</style>
<h1>{title}</h1><p>{notes}</p>
<main>
{figures}
</main>
"""


def write_sheet(path: Path, examples: list[Example], notes: str) -> None:
    """Write the page; a reader sees the old one or the new one, never half of it."""
    page = _PAGE.format(
        title=f"{len(examples)} random captions, {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC",
        notes=html.escape(notes),
        figures="\n".join(_figure(*example) for example in examples),
    )
    part = path.with_suffix(".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)


def _figure(jpeg: bytes, before: str, after: str | None) -> str:
    text = html.escape(after) if after is not None else '<span class="none">no caption</span>'
    picture = base64.b64encode(jpeg).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{picture}" alt=""><figcaption>{text}'
        f"<del>{html.escape(before)}</del></figcaption></figure>"
    )
