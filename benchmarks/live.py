"""What it costs that browsers watch a run: the own time of the threads inside it, in a real ComfyUI.

    python benchmarks/live.py [--steps 20] [--rounds 5] [--json FILE]

Two stages of a tiny Wan model, `steps` steps each, are sampled while 0, 1 or 2 clients watch, in turn. The server is
told to count by a pack of its own, made for this: the time (of the thread, on one CPU thread) in everything that
host/live.py does, and in sending what it made. As a share of the run: of the sampling's wall time, in which a real
model does far more. What is told per second does not grow with the model's speed; what it costs to tell a model of 40
blocks is measured by itself, on a record made by hand. Run it from a checkout that `python3 dev.py test` has set up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# Runs in the server: counts, and gives the counts at /bench/live.
COUNTING = """
import sys, time
from aiohttp import web
from server import PromptServer

counts = {"looks": 0, "live": 0.0, "sends": 0, "sending": 0.0, "step_ends": 0.0}
server = PromptServer.instance
send_json = server.send_json

def counted(function, key, times=None):
    def call(*args, **kwargs):
        begin = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            counts[key] += time.thread_time() - begin
            if times:
                counts[times] += 1
    return call

def hook():  # once the pack is there, which may be loaded after this one
    live = next(module for name, module in sys.modules.items() if name.endswith(".host.live"))
    attachment = next(module for name, module in sys.modules.items() if name.endswith(".host.attachment"))
    for name in ("_tick", "_finish", "ended", "watch"):
        setattr(live.Live, name, counted(getattr(live.Live, name), "live", "looks" if name == "_tick" else None))
    counting = attachment._counting

    def timed(run, callback):
        inside = [0.0]

        def measured(*args, **kwargs):
            begin = time.thread_time()
            try:
                return callback(*args, **kwargs)
            finally:
                inside[0] += time.thread_time() - begin

        whole = counting(run, measured)

        def call(*args, **kwargs):
            begin, before = time.thread_time(), inside[0]
            try:
                return whole(*args, **kwargs)
            finally:
                counts["step_ends"] += time.thread_time() - begin - (inside[0] - before)

        return call

    attachment._counting = timed

    async def send(event, data, sid=None):
        begin = time.thread_time()
        await send_json(event, data, sid)
        if event == live.EVENT:
            counts["sending"] += time.thread_time() - begin
            counts["sends"] += 1

    server.send_json = send

@server.routes.get("/bench/live")
async def give(request):
    if server.send_json == send_json:
        hook()
    given = dict(counts)
    counts.update(dict.fromkeys(counts, 0))
    return web.json_response(given)

NODE_CLASS_MAPPINGS = {}
"""


def load() -> None:
    """The pack, devtools/ and what tests share, imported as the tests do it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.loading import load_package

    load_package("attune_devtools", ROOT / "devtools")
    load_package("comfyui_attune", ROOT)


class Client:
    """A page that shows the panel: a websocket, in a thread of its own."""

    def __init__(self, server: Any) -> None:
        self.id, self.loop, self.open = uuid.uuid4().hex, asyncio.new_event_loop(), threading.Event()
        self.address = f"{server.url.replace('http', 'ws')}/ws?clientId={self.id}"
        threading.Thread(target=self.loop.run_until_complete, args=(self._listen(),), daemon=True).start()
        self.open.wait(20)

    async def _listen(self) -> None:
        import aiohttp

        async with aiohttp.ClientSession() as session, session.ws_connect(self.address) as socket:
            async for _ in socket:
                self.open.set()


def measure(server: Any, watching: int, steps: int, clients: list[Client]) -> dict[str, float]:
    """One prompt with that many clients watching: seconds of its two runs, and seconds and counts of what is told."""
    from support.prompts import selector, two_stage

    for number, client in enumerate(clients):
        server.post("/attune/watch", {"client_id": client.id, "on": number < watching})
    prompt = two_stage(lambda p, m, stage: selector(p, m, str(20 + stage), "split"), steps=2 * steps, size=128)
    for key in ("12", "13"):
        prompt[key]["inputs"]["noise_seed"] = time.time_ns() % 2**31
    server.get("/bench/live")
    runs = server.run(prompt).runs
    time.sleep(0.3)  # the last word
    counts = server.get("/bench/live")
    return {**counts, "run": sum(server.get(f"/attune/runs/{run['run']}")["seconds"] for run in runs)}


def by_hand(blocks: int = 40, steps: int = 40) -> dict[str, float]:
    """Microseconds to tell one new step of a model of that many blocks, and all of `steps` steps, JSON included."""
    from comfyui_attune.attention.plan import Decision
    from comfyui_attune.attention.policy import Policy, Rule
    from comfyui_attune.attention.record import Record
    from comfyui_attune.host.following import Following
    from comfyui_attune.host.runs import RunInfo

    trail = (Decision("sdpa", "sdpa", "1"),)
    calls = {(trail, block, kind): 1 for block in range(blocks) for kind in ("self", "cross")}
    step, everything = [], []
    for _ in range(20):
        record = Record(Policy((Rule(("sdpa",), source="1"),)))
        record.sigmas = [float(number) for number in range(steps + 1)]
        run = RunInfo(1, "p", None, None, "12", "WAN21", record, {}, step_ends=[])
        one = Following(run)
        for number in range(steps):
            record.add(calls, forwards=1)
            run.step_ends = [*(run.step_ends or []), (number + 1, number + 1)]
            begin = time.thread_time()
            one.look()
            json.dumps(one.event(full=False))
            one.told()
            step.append(time.thread_time() - begin)
        begin = time.thread_time()
        told = one.event(full=True)
        json.dumps(told)
        everything.append(time.thread_time() - begin)
    return {
        "blocks": blocks,
        "steps": steps,
        "microseconds_for_a_step": round(statistics.median(step) * 1e6, 1),
        "microseconds_for_all": round(statistics.median(everything) * 1e6, 1),
        "microseconds_for_a_cell": round(statistics.median(everything) * 1e6 / len(told["cells"]), 2),
    }


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load()
    torch.set_num_threads(1)
    from attune_devtools import CACHE, comfyui
    from support.server import Server

    taken: dict[int, list[dict[str, float]]] = {0: [], 1: [], 2: []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        counting = Path(folder) / "zz_counting"
        counting.mkdir()
        (counting / "__init__.py").write_text(COUNTING, "utf-8")
        env = {"OMP_NUM_THREADS": "1", "ATTUNE_HOME": str(Path(folder) / "home")}
        base = Path(folder) / "base"
        base.mkdir()
        with Server.fresh(
            Path(sys.executable), comfyui.locate(), base, CACHE / "models", ("--cpu",), (counting,), env
        ) as server:
            while any(row["outcome"] == "open" for row in server.get("/attune/kernels")["kernels"]):
                time.sleep(0.5)  # the doctor's children would take the CPU
            clients = [Client(server) for _ in range(max(taken))]
            measure(server, 1, 2, clients)
            for number in range(options.rounds):
                for watching in sorted(taken, reverse=bool(number % 2)):
                    taken[watching].append(measure(server, watching, options.steps, clients))
                    print(number + 1, watching, json.dumps(taken[watching][-1]), flush=True)

    def row(watching: int) -> dict[str, float]:
        found = taken[watching]
        middle = {key: statistics.median(one[key] for one in found) for key in found[0]}
        return {
            "run_seconds": round(middle["run"], 3),
            "looks": middle["looks"],
            "events": middle["sends"],
            "milliseconds_in_live": round(1e3 * middle["live"], 3),
            "milliseconds_sending": round(1e3 * middle["sending"], 3),
            "milliseconds_noting_steps": round(1e3 * middle["step_ends"], 3),
            "share_of_the_run": round(
                statistics.median((one["live"] + one["sending"] + one["step_ends"]) / one["run"] for one in found), 5
            ),
        }

    result = {
        "benchmark": "live",
        "machine": {
            "device": platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        "options": {"steps": options.steps, "rounds": options.rounds},
        "clock": "own time of the threads, over wall time of the runs",
        "watching": {str(watching): row(watching) for watching in taken},
        "by_hand": by_hand(),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return result


if __name__ == "__main__":
    main()
