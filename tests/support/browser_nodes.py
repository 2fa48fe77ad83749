"""What a user does with the nodes of a workflow in the browser, and what they see on them."""

import itertools
import os
import uuid
from pathlib import Path

from .browser import ComfyPage
from .server import Result
from .workflows import nodes_of, read

SMALL = {"width": 64, "height": 64, "length": 5, "steps": 2}
STEPS = {110: 2, 111: 1}  # the nodes that hold the number of steps, and of those of the first stage
SEEDS = itertools.count(1000)
SETTLE = 400  # milliseconds that the page has for laying out what it was told

# The node with id `id` in the graph that is open, also where ids are numbers (front ends before 1.47).
FIND = "const node = app.canvas.graph.nodes.find(n => String(n.id) === String(id));"
FACE = "const face = node.widgets?.find(w => w.name === 'attune_status')?.element;"


class Desk:
    """A ComfyUI page with workflows on it. Node ids are those of the graph that is open, a subgraph included."""

    def __init__(self, comfy: ComfyPage, pictures: Path):
        self.comfy, self.page, self.server = comfy, comfy.page, comfy.server
        self.pictures = Path(os.environ.get("ATTUNE_SCREENSHOTS") or pictures)
        self.problems: list[str] = comfy.problems
        self.page.on("console", self._console)
        self.listen()

    def _console(self, message) -> None:
        where = (message.location or {}).get("url", "") + message.text
        if message.type in ("error", "warning") and ("/extensions/ComfyUI-Attune/" in where or "Attune:" in where):
            self.problems.append(f"{message.type}: {message.text}")

    def listen(self) -> None:
        """Note which prompts have ended, as this page hears it; again after a reload."""
        self.comfy.call(
            """() => {
                app.canvas.maximumFps = 15; // nobody watches, and drawing costs the processor
                window.endedPrompts = new Set();
                for (const name of ["execution_success", "execution_error", "execution_interrupted"])
                    app.api.addEventListener(name, (event) => window.endedPrompts.add(event.detail.prompt_id));
            }"""
        )

    def reload(self) -> None:
        """Press F5."""
        self.server.post("/settings", {"Comfy.VueNodes.Enabled": self.comfy.vue})  # another page may have changed it
        self.page.reload()
        self.page.wait_for_function("() => window.app?.graph?.nodes?.length && window.app.extensionManager")
        self.listen()
        self.settle()

    def open(self, name: str, keep_id: bool = False, change=None) -> dict:
        """Open a workflow of workflows/ in a tab of its own, lowered to the smallest size; returns what was opened.

        Every call gives the workflow another id, unless `keep_id`, and other seeds, so that the server has nothing of
        it in its cache. `change(nodes by id)` may edit it before.
        """
        workflow = read(name)
        if not keep_id:
            workflow["id"] = str(uuid.uuid4())
        for node in workflow["nodes"]:
            if "KSampler" in node["type"]:
                node["widgets_values"][0 if node["type"] == "KSampler" else 1] = next(SEEDS)
        if change:
            change(nodes_of(workflow))
        self.comfy.load(workflow)
        self.shrink()
        self.settle()
        return workflow

    def shrink(self) -> None:
        """Lower the sizes of the open workflow through its widgets."""
        self.comfy.call(
            """([small, steps]) => {
                for (const node of app.graph.nodes)
                    for (const widget of node.widgets ?? []) {
                        const value = widget.name === "value" ? steps[node.id] : small[widget.name];
                        if (value !== undefined && widget.value > value) widget.value = value;
                    }
            }""",
            [SMALL, {str(key): value for key, value in STEPS.items()}],
        )

    def set(self, node: int | str, **widgets) -> None:
        """Give widgets of a node other values."""
        self.comfy.call(
            "([id, values]) => {"
            + FIND
            + "for (const w of node.widgets) if (w.name in values) w.value = values[w.name]}",
            [node, widgets],
        )

    def settle(self) -> None:
        self.page.wait_for_timeout(SETTLE)

    def look_at(self, *nodes: int | str) -> None:
        """Zoom and move the canvas so that these nodes fill the view."""
        self.comfy.call(
            """(ids) => {
                const nodes = app.canvas.graph.nodes.filter(n => ids.includes(String(n.id)));
                const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1])) - 30;
                const right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
                const bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
                const { ds } = app.canvas;
                ds.scale = Math.min(1.4, 1250 / (right - left), 700 / (bottom - top));
                ds.offset[0] = 200 / ds.scale - left;
                ds.offset[1] = 150 / ds.scale - top;
                app.canvas.setDirty(true, true);
            }""",
            [str(node) for node in nodes],
        )
        self.settle()

    def click(self, node: int | str, *, keys: tuple[str, ...] = (), double: bool = False) -> None:
        """Click a node's title."""
        x, y = self.comfy.call(
            "(id) => {" + FIND + "const { ds, canvas } = app.canvas; const box = canvas.getBoundingClientRect();"
            "return [box.left + (node.pos[0] + ds.offset[0] + 120) * ds.scale,"
            "        box.top + (node.pos[1] + ds.offset[1] - 15) * ds.scale] }",
            node,
        )
        for key in keys:
            self.page.keyboard.down(key)
        (self.page.mouse.dblclick if double else self.page.mouse.click)(x, y)
        for key in keys:
            self.page.keyboard.up(key)

    def press(self, keys: str) -> None:
        """Press keys over the canvas, such as "Control+b"."""
        self.page.keyboard.press(keys)
        self.page.wait_for_timeout(100)

    def mode(self, node: int | str) -> int:
        """0 active, 2 muted, 4 bypassed."""
        return self.comfy.call("(id) => {" + FIND + "return node.mode }", node)

    def press_run(self) -> str:
        """Press the Run button; returns the prompt id once the server has taken the prompt."""

        def queued(answer) -> bool:
            return answer.url.endswith("/prompt") and answer.request.method == "POST"

        with self.page.expect_response(queued, timeout=20_000) as got:
            self.page.get_by_test_id("queue-button").first.click()
        answer = got.value.json()
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def run(self) -> Result:
        """Press the Run button and wait until the page knows that the prompt has ended."""
        prompt = self.press_run()
        self.wait(prompt)
        return self.server.wait(prompt)

    def wait(self, prompt: str) -> None:
        """Wait until the page knows that this prompt has ended, and has laid out what it shows of it."""
        self.page.wait_for_function("(id) => window.endedPrompts.has(id)", arg=prompt, timeout=120_000)
        self.settle()

    def shows(self, node: int | str) -> str:
        """The text on a node's face as a user reads it; "" where there is none, or where it is out of view."""
        return self.comfy.call(
            "(id) => {" + FIND + FACE + "const text = face?.shadowRoot.querySelector('[role=status]');"
            "return text?.checkVisibility() && text.offsetHeight ? text.innerText.trim() : '' }",
            node,
        )

    def chips(self, node: int | str) -> list[str]:
        """The kernels on a node's face; one that warns ends with "!"."""
        return self.comfy.call(
            "(id) => {" + FIND + FACE + "return [...face?.shadowRoot.querySelectorAll('.kernel') ?? []]"
            ".map(k => k.querySelector('.chip').innerText + (k.matches('.warn') ? '!' : '')) }",
            node,
        )

    def size(self, node: int | str) -> tuple[float, float]:
        """Width and height of a node on the canvas."""
        return tuple(self.comfy.call("(id) => {" + FIND + "return [node.size[0], node.size[1]] }", node))

    def saved(self) -> dict:
        """The open workflow as it would be saved, without where the view stands."""
        workflow = self.comfy.call("() => app.graph.serialize()")
        workflow.get("extra", {}).pop("ds", None)
        return workflow

    def tabs(self) -> list[str]:
        """Paths of the open workflows, in order."""
        return self.comfy.call("() => app.extensionManager.workflow.openWorkflows.map(w => w.path)")

    def tab(self) -> str:
        """Path of the workflow that is open."""
        return self.comfy.call("() => app.extensionManager.workflow.activeWorkflow.path")

    def switch_to(self, path: str) -> None:
        """Click the tab of the workflow with that path."""
        at = self.tabs().index(path)
        self.page.locator(".workflow-tab").nth(at).click()
        self.page.mouse.move(800, 800)  # or the tab's preview covers what is below it
        self.page.wait_for_function(
            "(path) => app.extensionManager.workflow.activeWorkflow.path === path", arg=path, timeout=10_000
        )
        self.settle()

    def screenshot(self, name: str) -> None:
        renderer = "vue" if self.comfy.vue else "canvas"
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.comfy.screenshot(self.pictures / f"{name}-{renderer}.png")
