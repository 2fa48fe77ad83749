"""The sidebar tab Attention in the browser, and a server's answers to it that no machine of ours gives."""

import json
import math
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from .browser import ComfyPage
from .browser_nodes import Desk

TAB = ".attune-tab-button"
MACHINE = {
    "version": "0.1.0",
    "comfyui": "0.30.0",
    "off": False,
    "lines": [
        "NVIDIA GeForce RTX 5090, 31.4 GiB, sm120, driver 580.65",
        "PyTorch 2.11.0+cu130, CUDA 13.0, Triton 3.6.0, Python 3.12.9, Windows 11",
        "ComfyUI's own attention: pytorch (--use-pytorch-cross-attention)",
        "Without a node: ComfyUI's own (pytorch). First choice of auto: flash2.",
    ],
    "default": {},
    "remarks": ["The driver is older than what CUDA 13.0 was made for."],
}
SHAPE = "4,096 tokens, 8 heads of 128, bfloat16"
PIP = 'pip install "https://example.org/sageattention-2.2.0+cu130torch2.11-cp312-cp312-win_amd64.whl" --no-deps'


def kernel(name: str, outcome: str, **more: Any) -> dict[str, Any]:
    """A row of GET /attune/kernels."""
    empty = {"detail": "", "error": None, "allowed": None, "milliseconds": None, "timed": "", "cause": "", "cure": None}
    about = {"name": name, "title": f"{name}, in full", "package": "x", "precision": "exact", "status": "available"}
    return {**about, "reasons": [], "verdict": outcome, "outcome": outcome, "can_run_here": True, **empty, **more}


def works(name: str, milliseconds: float, error: float = 0.0022, allowed: float = 0.015) -> dict[str, Any]:
    return kernel(name, "works", milliseconds=milliseconds, error=error, allowed=allowed, timed=SHAPE)


KERNELS = [
    works("sdpa", 0.82),
    works("sdpa_flash", 0.81),
    works("flash2", 0.74),
    works("sage3", 0.21, 0.041, 0.09),
    kernel(
        "sage2_fp8_cuda",
        "cannot import",
        cause="ImportError: DLL load failed while importing _fused: the wheel was built for PyTorch 2.8, here is 2.11.",
        cure={"text": "Install the wheel that fits:", "command": PIP, "source": "https://example.org"},
    ),
    kernel(
        "flash4",
        "wrong numbers",
        error=0.31,
        allowed=0.02,
        cause="Its results differ from exact attention by 0.31, and 0.02 is allowed.",
        cure={"text": "Nothing to type: the pack does not use it. Report it to its authors.", "command": ""},
    ),
    kernel("attune_int8", "crashed", cause="Its process ended with signal 11.", cure=None),
    kernel("kitchen_int8", "open", cause="It has not been tried yet."),
    kernel(
        "xformers",
        "not installed",
        cause="The package xformers is not installed.",
        cure={"text": "Install it:", "command": "pip install xformers --no-deps", "source": ""},
    ),
    kernel("flash3", "unsupported", cause="needs sm90, this is sm120", cure={"text": "No cure.", "command": ""}),
    kernel("sub_quad", "", package=""),
]  # fmt: skip


def cells(steps: range, blocks: int) -> list[list[Any]]:
    """A sampling: exact at both ends and in the first and last block, sage3 between; cross attention on sdpa."""
    found: list[list[Any]] = []
    for step in steps:
        for block in range(blocks):
            inside = 2 <= step < 18 and 0 < block < blocks - 1
            found.append([step, block, "self", 1 if inside else 0, 2])
            found.append([step, block, "cross", 2, 2])
    return found


def live(step: int, steps: int = 20, blocks: int = 40, **more: Any) -> dict[str, Any]:
    """The event `attune.live` after a step; with `full=True` it tells everything until then."""
    new = range(step + 1) if more.get("full") else range(step, step + 1)
    share = {"flash2": 0.3, "sage3": 0.6, "sdpa": 0.1}
    calls = {"flash2": 160, "sage3": 72 * step, "sdpa": 80 * (step + 1)}
    error = {"flash2": None, "sage3": 0.0412, "sdpa": None}
    times = {
        name: {"calls": calls[name], "seconds": part * (step + 1), "share": part, "error_l1": error[name]}
        for name, part in share.items()
    }
    about = {"run": 1, "prompt_id": "p", "sampler_node": "3", "model": "Wan 2.2 14B", "status": "running"}
    where = {"steps": steps, "first_step": 0, "step": step, "blocks": blocks, "doubles": 0}
    names = {"kinds": ["self", "cross"], "kernels": ["flash2", "sage3", "sdpa"]}
    event = {**about, **where, **names, "cells": cells(new, blocks), "times": times, "events": [], "full": False}
    return {**event, "forwards": 2 * step, "repeated": 0, "notes": [], "steps_left_out": 0, **more}


DEMOTED = {
    "id": 0, "kind": "demotion", "text": "sage3 gave NaN in self attention", "kernel": "sage3", "reason": "NaN",
    "block": 23, "call_kind": "self", "step": 7, "count": 1,
}  # fmt: skip
REPEATED = {**DEMOTED, "id": 1, "kind": "repeat", "text": "The step was done again on exact attention", "block": None}


def past(number: int, seconds: float, fast: bool = True) -> dict[str, Any]:
    """An answer of GET /attune/runs/{number}."""
    event = live(19, full=True)
    kernels = {
        name: {"calls": one["calls"], "seconds": one["seconds"] * (1 if fast else 1.4), "share": one["share"],
               "error": one["error_l1"] and {"samples": 3, "mean_l1": one["error_l1"]}}
        for name, one in event["times"].items()
    }  # fmt: skip
    stage = {"first_step": 0, "steps": 20, "steps_in_all": 20}
    told = [{key: value for key, value in one.items() if key != "id"} for one in (DEMOTED, REPEATED)] if fast else []
    return {
        "run": number, "status": "finished", "model": "Wan 2.2 14B", "seconds": seconds, "stage": stage, "blocks": 40,
        "doubles": 0, "timed": True, "kernels": kernels, "kernel_names": event["kernels"],
        "cells": event["cells"] if fast else [[step, block, kind, 2, 2] for step, block, kind, _, _ in event["cells"]],
        "events": told, "events_left_out": 0, "notes": [], "left_out": [], "steps_left_out": 0,
    }  # fmt: skip


def listed(number: int) -> dict[str, Any]:
    """A row of GET /attune/runs."""
    observed = {"sage3": 1152, "sdpa": 800, "flash2": 448}
    return {"run": number, "prompt_id": "p", "workflow_id": None, "model": "Wan 2.2 14B", "status": "finished",
            "observed": observed, "notes": [], "nodes": {}, "sampler_node": "3"}  # fmt: skip


class Fake:
    """Stands in for the pack's routes. `answers`: path → JSON, or (status, JSON); `asked`: (path, body) of POSTs."""

    def __init__(self, comfy: ComfyPage):
        self.comfy = comfy
        self.answers: dict[str, Any] = {
            "/attune/machine": MACHINE,
            "/attune/kernels": {"kernels": KERNELS},
            "/attune/runs": {"runs": []},
            "/attune/last-prompt": {"prompt": None},
            "/attune/probe": {"running": False, "waiting": False, "done": 0, "total": 0},
            "/attune/watch": {"live": True, "seconds": 30},
            "/attune/bundle": "the bundle\n",
        }
        self.asked: list[tuple[str, Any]] = []
        comfy.page.route("**/api/attune/**", self._answer)

    def _answer(self, route) -> None:
        path = urlsplit(route.request.url).path.removeprefix("/api")
        if route.request.method == "POST":
            self.asked.append((path, json.loads(route.request.post_data)))
            path = f"POST {path}" if f"POST {path}" in self.answers else path
        answer = self.answers.get(path, (404, {"error": "there is no such thing"}))
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        text = body if isinstance(body, str) else json.dumps(body)
        route.fulfill(status=status, body=text, content_type="application/json")

    def send(self, event: str, data: dict[str, Any]) -> None:
        """Let the page hear a message, as from the websocket."""
        self.comfy.call("([name, detail]) => app.api.dispatchEvent(new CustomEvent(name, { detail }))", [event, data])


class Panel:
    """The tab on a page. `root` is what is in it; roles and texts inside are found as on any page."""

    def __init__(self, desk: Desk):
        self.desk, self.comfy, self.page = desk, desk.comfy, desk.page

    def open(self) -> None:
        """Click the tab's button and wait until the sections are there."""
        self.page.locator(TAB).click()
        self.section("kernels").wait_for()
        self.page.mouse.move(900, 700)  # off the button, or its tooltip covers the panel

    def close(self) -> None:
        """Click it again, where the tab is open."""
        if self.section("kernels").count():
            self.page.locator(TAB).click()
            self.section("kernels").wait_for(state="detached")

    def section(self, name: str):
        """One of machine, tools, live, runs and kernels."""
        return self.page.locator(f"[data-section={name}]")

    def button(self, name: str):
        return self.page.get_by_role("button", name=name, exact=True)

    def until(self, true: Callable[[], Any], seconds: float = 60) -> None:
        """Let the page go on until `true()` is."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, "this never came about"
            self.page.wait_for_timeout(20)

    def width(self, pixels: int) -> None:
        """Make the sidebar so wide, as dragging its edge does."""
        edge = self.page.locator(".p-splitter-gutter").first
        box, panel = edge.bounding_box(), self.page.locator(".side-bar-panel").first.bounding_box()
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 400)
        self.page.mouse.down()
        self.page.mouse.move(panel["x"] + pixels, box["y"] + 400, steps=4)
        self.page.mouse.up()
        self.page.wait_for_timeout(150)

    def theme(self, name: str) -> None:
        """ "dark" or "light"."""
        self.comfy.call("(id) => app.extensionManager.setting.set('Comfy.ColorPalette', id)", name)
        self.page.wait_for_timeout(300)

    def map_colours(self) -> dict[str, int]:
        """How many pixels of the map have which colour."""
        return self.comfy.call(
            """() => {
                const canvas = document.querySelector('.side-bar-panel')
                const found = [];
                const look = (node) => {
                    for (const one of node.querySelectorAll('*')) {
                        if (one.tagName === 'CANVAS' && one.closest('.plot')) found.push(one);
                        if (one.shadowRoot) look(one.shadowRoot);
                    }
                };
                look(canvas);
                const of = found[0];
                const { data } = of.getContext('2d').getImageData(0, 0, of.width, of.height);
                const counts = {};
                for (let i = 0; i < data.length; i += 4) {
                    if (data[i + 3] < 255) continue;
                    const code = [0, 1, 2].map(j => data[i + j].toString(16).padStart(2, '0')).join('');
                    counts['#' + code.toUpperCase()] = (counts['#' + code.toUpperCase()] ?? 0) + 1;
                }
                return counts;
            }"""
        )


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG's contrast of two sRGB colours of 0 to 255: 1 to 21."""

    def light(colour: tuple[float, ...]) -> float:
        parts = [value / 255 for value in colour[:3]]
        linear = [part / 12.92 if part <= 0.03928 else math.pow((part + 0.055) / 1.055, 2.4) for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
