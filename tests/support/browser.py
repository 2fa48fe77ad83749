"""ComfyUI's front end in a browser, as a test sees it."""

import json
from typing import Any
from urllib.parse import urlsplit

LAUNCH_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


class ComfyPage:
    """One browser page with ComfyUI ready. `page` is playwright's; `problems` lists errors that the page reported."""

    def __init__(self, browser, server, vue: bool):
        self.server, self.vue = server, vue
        server.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": vue})
        self.context = browser.new_context(viewport={"width": 1600, "height": 1000})
        self.context.route("**/*", self._only_local)
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(server.url)
        self.page.wait_for_function("() => window.app?.graph && window.app?.extensionManager", timeout=60_000)
        self.page.wait_for_selector("canvas", timeout=60_000)

    @staticmethod
    def _only_local(route) -> None:
        local = urlsplit(route.request.url).hostname in ("127.0.0.1", "localhost", None)
        route.continue_() if local else route.abort()

    def load(self, workflow: dict) -> None:
        """Open a UI workflow, as dropping its file on the page does."""
        self.page.evaluate("async (text) => { await app.loadGraphData(JSON.parse(text)) }", json.dumps(workflow))

    def call(self, script: str, argument: Any = None) -> Any:
        """Run JavaScript in the page (an expression or a function) and return its value."""
        return self.page.evaluate(script, argument)

    def node_types_missing(self) -> list[str]:
        """Types of the nodes in the open workflow that the front end does not know."""
        return self.call("() => app.graph.nodes.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)")

    def prompt(self) -> dict:
        """The API prompt that the front end would send now."""
        return self.call("async () => (await app.graphToPrompt()).output")

    def queue(self, seconds: float = 120):
        """Queue the open workflow as the Run button does, and wait. Returns support.server.Result."""
        with self.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as got:
            self.call("async () => { await app.queuePrompt(0) }")
        return self.server.wait(got.value.json()["prompt_id"], seconds)

    def screenshot(self, path) -> None:
        """Write what the page shows as PNG."""
        self.page.screenshot(path=str(path))

    def close(self) -> None:
        self.context.close()
