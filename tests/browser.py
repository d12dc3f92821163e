"""Pages as a browser lays them out: how wide each becomes in a window of some width."""

import functools
import html
import json
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="chromium is missing: apt-get install chromium")
# Frames may be narrower than any window, and a page may look into those from its own server.
FRAMES = """<!doctype html><title>frames</title><pre></pre><script>
const found = {};
(async () => {
  for (const [page, width] of ASKED) {
    const frame = document.createElement("iframe");
    frame.width = width;
    frame.height = 900;
    frame.src = page;
    await new Promise((done) => { frame.onload = done; document.body.append(frame); });
    await new Promise((done) => setTimeout(done, 300));
    found[`${page} ${width}`] = frame.contentDocument.documentElement.scrollWidth;
    frame.remove();
  }
  document.querySelector("pre").textContent = JSON.stringify(found);
})();
</script>"""


class Quiet(SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


def too_wide(folder: Path, pages: list[str], widths: tuple[int, ...]) -> dict[str, int]:
    """`PAGE WIDTH` -> the width it takes, of each page of a folder that is wider than a window of that width."""
    asked = [(page, width) for page in pages for width in widths]
    (folder / "frames.html").write_text(FRAMES.replace("ASKED", json.dumps(asked)), encoding="utf-8")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
        address = f"http://127.0.0.1:{server.server_port}/frames.html"
        budget = f"--virtual-time-budget={2000 + 1500 * len(asked)}"
        profile = f"--user-data-dir={folder / '.profile'}"
        done = subprocess.run(
            [*command, budget, profile, "--dump-dom", address], capture_output=True, text=True, timeout=300
        )
    finally:
        server.shutdown()
        server.server_close()
    text = re.search(r"<pre>(.+?)</pre>", done.stdout, re.S)
    assert text, done.stderr[-2000:]
    found: dict[str, int] = json.loads(html.unescape(text[1]))
    assert len(found) == len(asked)
    return {name: width for name, width in found.items() if width > int(name.split()[-1])}
