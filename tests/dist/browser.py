"""TensorBoard as a person has it: the server, its data by HTTP, and its pages in a real browser."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Everything a page shows, shadow roots included, in which TensorBoard hides most of it.
ALL_TEXT = """
const parts = [];
(function walk(node) {
  for (const child of node.childNodes) {
    if (child.nodeType === Node.TEXT_NODE) parts.push(child.textContent);
    else if (!['SCRIPT', 'STYLE', 'TEMPLATE'].includes(child.nodeName)) walk(child);
  }
  if (node.shadowRoot) walk(node.shadowRoot);
})(document.body);
return parts.join(' ').replace(/\\s+/g, ' ');
"""


class Server:
    """A TensorBoard over a folder of runs."""

    def __init__(self, port: int) -> None:
        self.address = f"http://localhost:{port}"

    def data(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.address}/data/{path}", timeout=20) as answer:
            return json.load(answer)


@contextlib.contextmanager
def tensorboard(folder: Path, *options: str) -> Iterator[Server]:
    """Serve `folder` until the block ends; ready when it answers and has read its files."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "localhost",
         "--port", str(port), "--reload_interval", "1", *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        server, deadline = Server(port), time.monotonic() + 90
        while True:
            with contextlib.suppress(OSError):
                if server.data("plugin/scalars/tags"):
                    break
            assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
            assert time.monotonic() < deadline, "TensorBoard does not answer"
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]


@contextlib.contextmanager
def browser(width: int = 1280, height: int = 900) -> Iterator[Any]:
    """Headless Chromium. Skips where there is none."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     f"--window-size={width},{height}"):
        options.add_argument(argument)
    page = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    try:
        yield page
    finally:
        page.quit()


def wait_for(page: Any, words: list[str], seconds: float = 60) -> str:
    """The page's text, once it has all `words`."""
    deadline = time.monotonic() + seconds
    while True:
        text = str(page.execute_script(ALL_TEXT))
        missing = [word for word in words if word not in text]
        if not missing:
            return text
        assert time.monotonic() < deadline, f"the page lacks {missing}: {text[-3000:]}"
        time.sleep(0.3)
