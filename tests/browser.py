"""A headless Chromium, driven over a pipe in its own protocol: https://chromedevtools.github.io/devtools-protocol/."""

import json
import os
import select
import shutil
import subprocess

PATIENCE = 60  # seconds
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def find_chromium():
    """Its path; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One browser with one page. ``events`` holds what it told of that page.

    Args:
        folder: an empty one, for its profile.
    """

    def __init__(self, folder):
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # The protocol's descriptors are 3 and 4. The shell gives them their numbers.
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, find_chromium(), *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.output, self.input = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb")
        self.events, self.number, self.session, self.rest = [], 0, None, b""
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        """One command, and its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.output.write(json.dumps(message).encode() + b"\0")
        self.output.flush()
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event):
        """Read until it was told."""
        while not any(told.get("method") == event for told in self.events):
            self.events.append(self._read())

    def open(self, address, width=1280, height=900, dark=False):
        """Load a page anew, on a screen of this size."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.call("Page.navigate", url=address)
        self.wait_for("Page.loadEventFired")

    def run(self, script):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key, code=9):
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def close(self):
        self.output.close()
        try:
            self.process.wait(timeout=10)  # it ends with its pipe
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.input.close()

    def _read(self):
        while b"\0" not in self.rest:
            there, _, _ = select.select([self.input], [], [], PATIENCE)
            assert there, f"the browser said nothing in {PATIENCE} s"
            piece = os.read(self.input.fileno(), 1 << 16)
            assert piece, "the browser has ended"
            self.rest += piece
        answer, _, self.rest = self.rest.partition(b"\0")
        return json.loads(answer)
