"""A headless Chromium of this system, over its DevTools pipe: no package, no download.

with Browser() as browser:
    browser.open(path.as_uri())
    assert browser.value("document.title") == ...
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WITHOUT = "no Chromium here: apt-get install chromium"


class Browser:
    """One page. `console` has what it said, errors of its scripts included."""

    def __init__(self, width=1280, height=900, dark=False):
        self.width, self.height, self.dark = width, height, dark
        self.console, self.requests, self.count, self.buffer = [], [], 0, b""

    def __enter__(self):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        pipes = [*os.pipe(), *os.pipe()]
        theirs, self.write, self.read, ours = (
            fcntl.fcntl(p, fcntl.F_DUPFD_CLOEXEC, 10) for p in pipes
        )
        for each in pipes:
            os.close(each)
        flags = [
            "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self.profile.name}",
            "--no-first-run", "--disable-gpu", "--no-sandbox", "--disable-extensions",
            "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars",
        ]  # fmt: skip
        # its ends of the pipes have to be 3 and 4
        line = f'exec "$0" "$@" 3<&{theirs} 4>&{ours} {theirs}<&- {ours}>&-'
        self.process = subprocess.Popen(
            ["bash", "-c", line, PATH, *flags, "about:blank"],
            pass_fds=(theirs, ours),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs), os.close(ours)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.size(self.width, self.height)
        if self.dark:
            feature = {"name": "prefers-color-scheme", "value": "dark"}
            self.send("Emulation.setEmulatedMedia", features=[feature])
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.read), os.close(self.write)
        self.profile.cleanup()

    session = None
    showing, loaded = "", False  # which document, and whether it is whole

    def send(self, method, **params):
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 60
        while True:
            answer = self.next(until)
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.heard(answer)

    def next(self, until):
        while b"\0" not in self.buffer:
            ready = select.select([self.read], [], [], max(0, until - time.monotonic()))[0]
            assert ready, "Chromium does not answer"
            data = os.read(self.read, 1 << 20)
            assert data, "Chromium has ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def heard(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.console.append(params["exceptionDetails"])
        elif method == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.console.append([each.get("value") for each in params["args"]])
        elif method == "Page.frameNavigated" and "parentId" not in params["frame"]:
            self.showing, self.loaded = params["frame"]["loaderId"], False
        elif method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])

    def open(self, url):
        """Until it has loaded, and not the page before; returns the seconds that took."""
        began = time.perf_counter()
        asked = self.send("Page.navigate", url=url)["loaderId"]
        until = time.monotonic() + 60
        while not (self.loaded and self.showing == asked):
            self.heard(self.next(until))
        return time.perf_counter() - began

    def value(self, expression):
        said = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def until(self, expression, seconds=30):
        end = time.monotonic() + seconds
        while not (found := self.value(expression)):
            assert time.monotonic() < end, f"never: {expression}; {self.console}"
            time.sleep(0.05)
        return found

    def mouse(self, kind, x, y, **more):
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def size(self, width, height):
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip

    def screenshot(self, path):
        data = self.send("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))
