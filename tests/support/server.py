"""A real ComfyUI server for tests, and what a client does with it.

result = server.run(server.load("wan2.2_i2v_14b"))      # a UI workflow or an API prompt
result.runs                                              # GET /attune/runs, of this prompt only
result.files                                             # the files that output nodes wrote
"""

import copy
import json
import time
import urllib.error
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attune_devtools import comfyui
from attune_devtools.host import Host

from .loading import ROOT

WORKFLOWS = ROOT / "workflows"


class PromptRejectedError(Exception):
    """The server did not accept a prompt. `status` is the HTTP status, `node_errors` is the server's answer by node."""

    def __init__(self, status: int, answer: Any):
        super().__init__(f"HTTP {status}: {json.dumps(answer)[:2000]}")
        self.status, self.answer = status, answer
        self.node_errors = answer.get("node_errors", {}) if isinstance(answer, dict) else {}


class PromptFailedError(Exception):
    """A prompt ran into an error. `node_id`, `node_type`, `message` and `traceback` say where and which."""

    def __init__(self, error: dict):
        self.node_id, self.node_type = error.get("node_id"), error.get("node_type")
        self.message = error.get("exception_message", "")
        self.traceback = "".join(error.get("traceback", []))
        super().__init__(f"{self.node_type} {self.node_id}: {self.message}\n{self.traceback}")


@dataclass
class Result:
    """One finished prompt."""

    prompt_id: str
    history: dict
    base: Path
    runs: list[dict] = field(default_factory=list)

    @property
    def outputs(self) -> dict[str, dict]:
        """What the output nodes reported, by node id."""
        return self.history["outputs"]

    @property
    def files(self) -> list[Path]:
        """The files written to the output folder."""
        found = (item for output in self.outputs.values() for entry in output.values() for item in entry)
        named = (item for item in found if isinstance(item, dict) and item.get("type") == "output")
        return [self.base / "output" / item["subfolder"] / item["filename"] for item in named]

    @property
    def cached(self) -> set[str]:
        """Ids of the nodes that did not run again because nothing before them had changed."""
        messages = self.history["status"]["messages"]
        return {node for name, data in messages if name == "execution_cached" for node in data["nodes"]}


class Server(Host):
    """A Host with a client. Start one with `with Server.fresh(...) as server:`."""

    @classmethod
    def fresh(
        cls,
        python: Path,
        comfyui_folder: Path,
        base: Path,
        models: Path,
        flags=("--cpu",),
        packs=(),
        env=None,
        pack=ROOT,
    ):
        """A server, not started yet, on a new base directory `base`; `packs` are folders of further custom nodes.

        `pack` is where this pack lies, if it is not the checkout.
        """
        return cls(python, comfyui_folder, comfyui.make_base(base, models, tuple(packs), pack), flags, env=env)

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *exc) -> None:
        self.stop()

    def object_info(self) -> dict[str, dict]:
        """Every node the server knows, by id."""
        if not hasattr(self, "_object_info"):
            self._object_info = self.get("/object_info")
        return self._object_info

    def load(self, workflow: str | Path) -> dict:
        """The UI workflow of that name in workflows/, or in that file; a fresh copy each time."""
        path = workflow if isinstance(workflow, Path) else WORKFLOWS / f"{workflow}.json"
        return json.loads(path.read_text("utf-8"))

    def api(self, workflow: dict) -> dict:
        """The API prompt for a UI workflow: what the front end would send. An API prompt is returned as a copy."""
        if "nodes" not in workflow:
            return copy.deepcopy(workflow)
        from comfy_cli.workflow_to_api import convert_ui_to_api

        return convert_ui_to_api(copy.deepcopy(workflow), self.object_info())

    def submit(self, workflow: dict, client_id: str | None = None, workflow_ui: dict | None = None) -> str:
        """Queue a UI workflow or an API prompt and return the prompt id. Raises PromptRejectedError.

        As in the front end, the UI workflow goes along as `extra_pnginfo`; with an API prompt give it as `workflow_ui`.
        """
        shown = workflow_ui or (workflow if "nodes" in workflow else None)
        body = {"prompt": self.api(workflow), "client_id": client_id or uuid.uuid4().hex}
        body["extra_data"] = {"extra_pnginfo": {"workflow": shown}} if shown else {}
        try:
            return self.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            try:
                answer = json.loads(text)
            except ValueError:
                answer = text
            raise PromptRejectedError(error.code, answer) from None

    def wait(self, prompt_id: str, seconds: float = 180) -> Result:
        """Wait for a prompt. Raises PromptFailedError, or TimeoutError with the end of the server's log."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                for name, data in entry["status"]["messages"]:
                    if name == "execution_error":
                        raise PromptFailedError(data)
                return Result(prompt_id, entry, self.base, self.runs(prompt_id))
            if self.process is not None and self.process.poll() is not None:
                raise ConnectionError(f"the server died with code {self.process.returncode}:\n{self.output()[-3000:]}")
            time.sleep(0.02)
        raise TimeoutError(f"prompt {prompt_id} took over {seconds} s; the server's log ends:\n{self.output()[-3000:]}")

    def run(self, workflow: dict, seconds: float = 180, **submit: Any) -> Result:
        """submit() and wait()."""
        return self.wait(self.submit(workflow, **submit), seconds)

    def runs(self, prompt_id: str | None = None) -> list[dict]:
        """GET /attune/runs, oldest first; only those of `prompt_id` when given; empty where the pack is not there."""
        try:
            found = self.get("/attune/runs")["runs"]
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return []
        return [run for run in found if prompt_id is None or run["prompt_id"] == prompt_id]

    def interrupt(self) -> None:
        """Stop what is running, as the button in the front end does."""
        self.post("/interrupt", {})

    def forget(self) -> None:
        """Unload the models and empty the cache of node outputs before the next prompt."""
        self.post("/free", {"unload_models": True, "free_memory": True})


def find_nodes(prompt: dict, class_type: str) -> list[str]:
    """Ids of the nodes of that class in an API prompt, in order."""
    return [node for node, data in prompt.items() if data["class_type"] == class_type]


def shrink(prompt: dict, size: int = 64, length: int = 5, steps: int = 2) -> dict:
    """A copy of an API prompt with small pictures, few frames and `steps` steps per sampling stage, in place.

    Only numbers that stand in the prompt itself are lowered, never raised; links stay.
    """
    from attune_devtools.shrink import shrink as lower

    return lower(prompt, size, length, steps)[0]
