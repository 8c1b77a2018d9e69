"""Pictures of a run's report and of the page of `serve`, as docs and README show them.

    chatllama report runs/quickstart
    chatllama serve runs/quickstart --port 8123 &
    python docs/images/pages.py runs/quickstart http://127.0.0.1:8123

Chromium is asked through two pipes (its DevTools protocol); nothing else is needed.
"""

import base64
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ASK = """
const $ = (id) => document.getElementById(id);
$("tab-compare").click();
$("seed").value = "4";
$("model-a").value = "sft";
$("model-b").value = "policy";
$("compare-text").value = "Please write to Nora about the roses.";
$("compare-form").requestSubmit();
"""
JUDGE = """
for (const side of ["answer-a", "answer-b"])
  for (const button of document.getElementById(side).querySelectorAll("button")) button.click();
document.getElementById("reason").value = "on the right topic, and signed";
"""
ANSWERED = 'document.getElementById("vote-form").hidden === false'
SCORED = """document.getElementById("sides").innerText.split("log-ratio to").length > 2"""


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, folder: str) -> None:
        commands, self._out = os.pipe()
        self._in, answers = os.pipe()
        chromium = os.environ.get("CHATLLAMA_CHROMIUM") or shutil.which("chromium")
        assert chromium, "no chromium; set CHATLLAMA_CHROMIUM"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={folder}"]
        words = f"exec {shlex.join([chromium, *flags])} 3<&{commands} 4>&{answers} 2>/dev/null"
        self.process = subprocess.Popen(["bash", "-c", words], pass_fds=(commands, answers))
        self._number, self._read, self._session = 0, b"", None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def ask(self, method: str, **parameters: Any) -> Any:
        """The answer to a command of the protocol; events are left out."""
        self._number += 1
        told: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            told["sessionId"] = self._session
        os.write(self._out, json.dumps(told).encode() + b"\0")
        while True:
            while b"\0" not in self._read:
                self._read += os.read(self._in, 1 << 20)
            line, _, self._read = self._read.partition(b"\0")
            found = json.loads(line)
            if found.get("id") == self._number:
                return found["result"]

    def value(self, script: str) -> Any:
        """What a script gives in the page."""
        return self.ask("Runtime.evaluate", expression=script)["result"].get("value")

    def wait(self, condition: str, seconds: float = 120.0) -> None:
        """Waits until a script gives true."""
        deadline = time.monotonic() + seconds
        while not self.value(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.2)

    def open(self, url: str, width: int, height: int, scheme: str = "light") -> None:
        """Shows a page in a window of that size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        feature = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=feature)
        self.ask("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def save(self, name: str, whole: bool = False) -> None:
        """Writes what is seen, or the whole page, as NAME.png beside this file."""
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        (HERE / f"{name}.png").write_bytes(base64.b64decode(found["data"]))


def main(run: Path, server: str) -> None:
    """Writes report.png, serve-compare.png and serve-phone-dark.png."""
    with tempfile.TemporaryDirectory() as folder:
        browser = Browser(folder)
        browser.open((run / "report.html").absolute().as_uri(), 1100, 900)
        browser.save("report")
        for name, size in (
            ("serve-compare", (1000, 760, "light")),
            ("serve-phone-dark", (390, 1220, "dark")),
        ):
            browser.open(server, *size)
            browser.wait('document.querySelector("#compare-examples button") !== null')
            browser.value(ASK)
            browser.wait(ANSWERED)
            browser.value(JUDGE)
            browser.wait(SCORED)
            browser.save(name)
        browser.process.terminate()
        browser.process.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
