"""Firefox without a driver: it speaks WebDriver BiDi by itself, JSON in messages of a websocket."""

import json
import re
import shutil
import subprocess
import time

import websocket

ARROW_LEFT = "\ue012"
ADDRESS = re.compile(r"WebDriver BiDi listening on (ws://\S+)")
SETTINGS = {
    "network.proxy.type": 1,  # a proxy that nobody runs: Firefox itself reaches nothing; this machine needs none
    "network.proxy.ssl": "127.0.0.1", "network.proxy.ssl_port": 9,
    "network.proxy.http": "127.0.0.1", "network.proxy.http_port": 9,
    "datareporting.policy.dataSubmissionEnabled": False, "browser.shell.checkDefaultBrowser": False,
}  # fmt: skip
WAIT = 120  # seconds; two slow cores may be shared


class Firefox:
    """One window.

    Args:
        profile: an empty folder.
    """

    def __init__(self, profile):
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in SETTINGS.items()]
        (profile / "user.js").write_text("\n".join(lines))
        command = [shutil.which("firefox"), "--headless", "--no-remote", "--remote-debugging-port", "0"]
        self.log = (profile / "firefox.log").open("w+")
        self.process = subprocess.Popen([*command, "--profile", profile], stdout=self.log, stderr=self.log)
        self.socket, self.events, self.number = None, [], 0
        try:
            self.socket = websocket.create_connection(f"{self._address()}/session", WAIT, suppress_origin=True)
            self.call("session.new", capabilities={})
            self.context = self.call("browsingContext.getTree")["contexts"][0]["context"]
            self.call("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])
        except BaseException:
            self.close()
            raise

    def _address(self):
        end = time.monotonic() + WAIT
        while time.monotonic() < end and self.process.poll() is None:
            self.log.seek(0)
            if found := ADDRESS.search(self.log.read()):
                return found[1]
            time.sleep(0.1)
        raise TimeoutError("Firefox did not say where it listens")

    def call(self, method, **params):
        """The result of a command; what happens meanwhile is added to `events`."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message["type"] == "event":
                self.events.append((message["method"], message["params"]))
            elif message["id"] == self.number:
                assert message["type"] == "success", message
                return message["result"]

    def open(self, url):
        self.call("browsingContext.navigate", context=self.context, url=url, wait="complete")

    def _evaluate(self, expression):
        target = {"context": self.context}
        found = self.call("script.evaluate", expression=expression, target=target, awaitPromise=True)
        assert found["type"] == "success", found
        return found["result"]

    def evaluate(self, expression):
        """The value of an expression, which JSON can state."""
        return json.loads(
            self._evaluate(f"Promise.resolve({expression}).then((x) => JSON.stringify(x ?? null))")["value"]
        )

    def wait(self, expression):
        """Wait until an expression is true."""
        end = time.monotonic() + WAIT
        while not self.evaluate(f"Boolean({expression})"):
            assert time.monotonic() < end, expression
            time.sleep(0.05)

    def press(self, value):
        """Press and release a key, a character of the standard's table."""
        strokes = [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        actions = [{"type": "key", "id": "keyboard", "actions": strokes}]
        self.call("input.performActions", context=self.context, actions=actions)

    def choose(self, selector, file):
        """Choose a file in an input element."""
        node = self._evaluate(f"document.querySelector({json.dumps(selector)})")
        self.call("input.setFiles", context=self.context, element={"sharedId": node["sharedId"]}, files=[str(file)])

    def close(self):
        if self.socket:
            self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        self.log.close()
