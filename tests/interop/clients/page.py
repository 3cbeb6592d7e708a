"""Drives a headless Chromium over its DevTools protocol: opens the page, gives it images.

    python page.py CHROMIUM URL FOLDER IMAGE...

Prints what the page said as JSON, and leaves FOLDER/page.png, a picture of it.
"""

import base64
import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import websocket

chromium, url, folder, *images = sys.argv[1:]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-port=0",
)
SECONDS = 60.0
OPTIONS = "[...document.querySelectorAll('#model option')].map(option => option.value)"


def is_error(event: dict) -> bool:
    """Whether a browser's event is an exception, or an error in the console."""
    level = event["params"].get("entry", {}).get("level")
    return event["method"] == "Runtime.exceptionThrown" or level == "error"


class Page:
    """One page of the browser."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(
            address, timeout=SECONDS, suppress_origin=True, max_size=None
        )
        self._last = 0
        self.events: list[dict] = []

    def call(self, method: str, **params: object) -> dict:
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._last:
                if "error" in message:
                    raise SystemExit(f"{method}: {message['error']}")
                return message["result"]
            self.events.append(message)

    def value(self, expression: str) -> object:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    def until(self, expression: str) -> object:
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if found := self.value(expression):
                return found
            time.sleep(0.05)
        raise SystemExit(
            f"never true: {expression}; the page is {self.value('document.body.innerText')}"
        )


def devtools(profile: Path) -> str:
    """The address of the browser's first page."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            port = (profile / "DevToolsActivePort").read_text().splitlines()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                pages = [page for page in json.load(answer) if page["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
        except (OSError, IndexError):
            pass
        time.sleep(0.05)
    raise SystemExit("chromium did not start")


profile = Path(folder) / "profile"
browser = subprocess.Popen(
    [chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
)
try:
    page = Page(devtools(profile))
    for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
        page.call(f"{domain}.enable")
    page.call("Page.navigate", url=url)
    page.until("document.querySelectorAll('#model option').length")
    found = {
        "browser": page.call("Browser.getVersion")["product"],
        "models": sorted(
            page.value("[...document.querySelectorAll('#model option')].map(o => o.value)")
        ),
        "chosen": page.value("document.getElementById('model').value"),
        "verdicts": [],
    }
    for image in images:
        page.value("document.getElementById('verdict').textContent = ''")
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        node = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        page.call("DOM.setFileInputFiles", nodeId=node, files=[image])
        text = page.until(
            "/p = /.test(document.getElementById('verdict').textContent)"
            " && document.getElementById('verdict').textContent"
        )
        found["verdicts"].append(
            {
                "text": text,
                "pictures": page.until("document.querySelectorAll('#image img').length"),
            }
        )
    picture = page.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
    (Path(folder) / "page.png").write_bytes(base64.b64decode(picture))
    found["origins"] = sorted(
        {
            "{0.scheme}://{0.netloc}".format(urlsplit(event["params"]["request"]["url"]))
            if not event["params"]["request"]["url"].startswith(("data:", "blob:"))
            else ""
            for event in page.events
            if event.get("method") == "Network.requestWillBeSent"
        }
    )
    found["errors"] = [event["params"] for event in page.events if is_error(event)]
    print(json.dumps(found))
finally:
    browser.terminate()
    browser.wait(30)
