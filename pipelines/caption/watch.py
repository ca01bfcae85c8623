"""Watching a run from its driver: the line on the terminal and the contact sheet, both from what `Tally` holds."""

from __future__ import annotations

import base64
import html
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines.caption.tally import Example, Live
from pipelines.files import write_text
from pipelines.progress import Progress

SHEET = "contact_sheet.html"
"""The contact sheet: random pictures of a run with their old and new captions, in one HTML file that a browser
refreshes by itself."""
_POLL_SECONDS = 0.5
_SHEET_SECONDS = 15.0

_PAGE = """<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="30">
<title>captune: contact sheet</title>
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


class Watch:
    """Shows a run while the main thread waits for Ray Data.

    Args:
        tally: handle of the `Tally` actor.
        done: rows that an earlier run finished.
        sheet: where the contact sheet goes.
    """

    def __init__(self, tally: Any, progress: Progress, done: int, sheet: Path) -> None:
        self._tally, self._progress, self._done, self._sheet = tally, progress, done, sheet
        self._live = Live()
        self._drawn = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def stopped(self) -> str:
        """Why a guard stopped the run; empty when none did. Asked anew: the run ends faster than the next look
        comes.
        """
        self._live = self._ask("live") or self._live
        return self._live.stop

    def __enter__(self) -> Watch:
        if self._done:
            self._progress.start_at(self._done)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        self._draw()
        self._progress.close()

    def _poll(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            self._look()
            if time.monotonic() - self._drawn > _SHEET_SECONDS:
                self._draw()

    def _look(self) -> None:
        live = self._ask("live")
        if live is None:
            return
        self._live = live
        fresh = min(self._done + live.rows, self._progress.total or 0) - self._progress.done
        # silence would look like a hang: a replica takes a while to load, and nothing comes back before
        self._progress.update(max(fresh, 0), live.notes() if live.rows else "starting the model")

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if (examples := self._ask("sheet")) and self._sheet.parent.is_dir():
            write_sheet(self._sheet, examples, self._progress.line())

    def _ask(self, what: str) -> Any:
        """None while the tally's process is dead and being started again: a run must not end because nobody counts."""
        import ray

        try:
            return ray.get(getattr(self._tally, what).remote(), timeout=30)
        except (ray.exceptions.RayError, TimeoutError):
            return None


def write_sheet(path: Path, examples: list[Example], notes: str) -> None:
    """Write the page; a reader sees the old one or the new one, never half of it."""
    page = _PAGE.format(
        title=f"{len(examples)} random captions, {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC",
        notes=html.escape(notes),
        figures="\n".join(_figure(*example) for example in examples),
    )
    write_text(path, page)


def _figure(jpeg: bytes, before: str, after: str | None) -> str:
    text = html.escape(after) if after is not None else '<span class="none">no caption</span>'
    picture = base64.b64encode(jpeg).decode()
    return (
        f'<figure><img src="data:image/jpeg;base64,{picture}" alt=""><figcaption>{text}'
        f"<del>{html.escape(before)}</del></figcaption></figure>"
    )
