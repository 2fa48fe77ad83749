"""What browsers that watch are told while a model is sampled: by hand-made records, and by a real ComfyUI."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import threading
import time
import urllib.error
import uuid
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import pytest
import torch

from comfyui_attune.attention.clock import Clock
from comfyui_attune.attention.plan import Decision
from comfyui_attune.attention.policy import Policy, Rule
from comfyui_attune.attention.record import Record
from comfyui_attune.host import live as module
from comfyui_attune.host.following import Following
from comfyui_attune.host.live import Live, TooManyError
from comfyui_attune.host.runs import RunInfo, Runs
from support.prompts import rule, selector, two_stage
from support.server import PromptFailedError
from support.standins import environment

SPLIT, BASIC = (Decision("split", "split", "20"),), (Decision("basic", "basic", "20"),)


def made(number=1, steps=4, first_step=0, ends=True, blocks=2) -> RunInfo:
    """A run that goes on, of which nothing is recorded yet."""
    record = Record(Policy((Rule(("split",), source="20"),)))
    record.sigmas = [1 - step / steps for step in range(steps + 1)] if steps else []
    record.blocks = blocks
    run = RunInfo(number, "p", None, "abc", "12", "WAN21", record, {"20": "AttentionSelector"}, first_step=first_step)
    run.step_ends = [] if ends else None
    return run


def forward(run, sigma=None, trail=SPLIT, discarded=False, ends_step=False, blocks=2):
    calls = {(trail, block, kind): 1 for block in range(blocks) for kind in ("self", "cross")}
    level = None if sigma is None else torch.tensor(sigma)
    run.record.add(calls, forwards=0 if discarded else 1, sigma=level, discarded=discarded)
    if ends_step:
        run.step_ends.append((run.record.forwards, len(run.step_ends) + 1))


def cells(event) -> dict:
    return {(step, block, kind, event["kernels"][kernel]): n for step, block, kind, kernel, n in event["cells"]}


def test_steps_come_from_the_sampler_and_at_the_end_from_the_noise_levels():
    """A sampler with two forwards a step, which tells of a step after the first of them."""
    run = made(first_step=4)
    one = Following(run)
    for sigma, middle in ((1.0, 0.9), (0.75, 0.6), (0.5, 0.4)):
        forward(run, sigma, ends_step=True)
        forward(run, middle)
    assert one.look()
    told = one.event(full=True)
    assert {step for step, *_ in told["cells"]} == {4, 5, 6, 7} and told["step"] == 7
    run.status = "finished"
    run.close()
    after = Following(run)
    after.end()
    told = after.event(full=True)
    assert {(step, n) for (step, *_), n in cells(told).items()} == {(4, 2), (5, 2), (6, 2)}
    assert told["step"] == 6 and told["first_step"] == 4 and told["status"] == "finished"


def test_where_the_sampler_says_nothing_a_step_is_a_forward():
    run = made(steps=0, ends=False)
    one = Following(run)
    forward(run)
    forward(run)
    one.look()
    assert [step for step, *_ in one.event(full=True)["cells"]] == [0] * 4 + [1] * 4


def test_only_what_has_changed_is_told_and_counts_are_of_the_whole_cell():
    run = made()
    one = Following(run)
    assert not one.look()
    forward(run)
    assert one.look()
    assert set(cells(one.event(full=False)).values()) == {1}
    one.told()
    assert not one.look()
    forward(run, trail=BASIC, ends_step=True)
    assert one.look()
    told = one.event(full=False)
    assert told["kernels"] == ["split", "basic"] and len(told["cells"]) == 8, (
        "the whole step, which has two kernels now"
    )
    assert told["kinds"] == ["self", "cross"] and told["times"]["basic"]["calls"] == 4
    forward(run)
    one.look()
    assert {step for step, *_ in one.event(full=False)["cells"]} == {1}


def test_a_forward_that_was_thrown_away_has_no_cells_and_its_repair_is_told_as_it_happens():
    run = made()
    one = Following(run)
    run.record.event("demotion", "split gave NaN", kernel="split", block=1, call_kind="self", reason="gave NaN")
    assert one.look()
    (happened,) = one.event(full=False)["events"]
    assert happened == {
        "id": 0, "kind": "demotion", "text": "split gave NaN", "kernel": "split", "reason": "gave NaN", "block": 1,
        "call_kind": "self", "step": 0, "count": 1,
    }  # fmt: skip
    one.told()
    assert not one.look()
    forward(run, discarded=True)
    forward(run, trail=BASIC)
    run.record.event("demotion", "split gave NaN", kernel="split", block=1, call_kind="self", reason="gave NaN")
    run.record.event("repeat", "x" * 10_000)
    assert one.look()
    told = one.event(full=False)
    assert {kernel for *_, kernel in cells(told)} == {"basic"} and told["repeated"] == 1
    assert [(event["id"], event["count"], len(event["text"])) for event in told["events"]] == [(0, 2, 14), (1, 1, 1000)]
    one.told()
    assert one.event(full=False)["events"] == [] and len(one.event(full=True)["events"]) == 2


def test_times_of_the_cpu_and_errors_are_told_and_no_device_is_asked(monkeypatch):
    class Event:
        """A moment on a GPU: asking it for anything would wait."""

        def synchronize(self):
            raise AssertionError("this waits")

        query = elapsed_time = synchronize

    run = made()
    run.record.clock = clock = Clock()
    one = Following(run)
    forward(run)
    clock._pairs += [("split", 1.0, 1.5), ("split", Event(), Event()), ("basic", 2.0, 2.5)]
    run.record.sampled("split", 0.01, 0.01, 0)
    run.record.sampled("split", math.nan, 0.01, 0)
    one.look()
    told = one.event(full=True)["times"]["split"]
    assert told == {"calls": 4, "seconds": 0.5, "share": 0.5, "error_l1": 0.01}
    clock._pairs.append(("split", 3.0, 3.25))
    forward(run)
    one.look()
    assert one.event(full=False)["times"]["split"]["seconds"] == 0.75
    assert len(clock._pairs) == 4, "the clock keeps them for the end of the run"


def test_an_event_has_room_for_ten_thousand_cells_and_the_newest_steps_come_first():
    run = made(steps=300)
    one = Following(run)
    for _ in range(300):
        forward(run, ends_step=True, blocks=25)
    one.look()
    told = one.event(full=True)
    assert len(told["cells"]) == 10_000 and told["steps_left_out"] == 100
    assert [told["cells"][0][0], told["cells"][-1][0]] == [100, 299]
    assert len(one.event(full=False)["cells"]) == 10_000
    rest = one.event(full=False)
    assert [rest["cells"][0][0], rest["cells"][-1][0]] == [0, 99], "what had no room comes with the next one"
    assert one.event(full=False)["cells"] == []
    assert len(json.dumps(told)) < 500_000


# Who is told


class Host:
    """Stands in for the PromptServer."""

    def __init__(self, loop):
        self.loop, self.sockets, self.sent, self.messages = loop, {}, [], asyncio.Queue()

    def send_sync(self, event, data, sid):
        assert event == "attune.live"
        self.sent.append((time.monotonic(), sid, json.loads(json.dumps(data, allow_nan=False))))

    def of(self, sid) -> list[dict]:
        return [data for _, to, data in self.sent if to == sid]


@pytest.fixture
def play(monkeypatch):
    """play(scene): runs the coroutine scene(live, host, runs) with a server and runs of its own."""

    def start(scene):
        async def go():
            host, runs = Host(asyncio.get_running_loop()), Runs()
            monkeypatch.setattr(module, "server_instance", lambda: host)
            monkeypatch.setattr(module, "RUNS", runs)
            live = Live()
            await scene(live, host, runs)
            for client_id in list(host.sockets):
                live.watch(client_id, False)

        with ThreadPoolExecutor(1) as thread:  # playwright's loop may run in this one
            thread.submit(asyncio.run, go()).result()

    return start


def put(runs, run):
    runs._runs.append(run)
    return run


def test_with_nobody_watching_nothing_is_looked_at(play, monkeypatch):
    monkeypatch.setattr(module, "Following", lambda run: pytest.fail("nobody watches"))

    async def scene(live, host, runs):
        run = put(runs, made())
        forward(run)
        await asyncio.sleep(0.3)
        assert live.watched is False and live._timer is None
        live.ended(run)
        await asyncio.sleep(0)
        assert host.sent == []

    play(scene)


def test_at_most_five_a_second_each_and_one_who_comes_later_gets_everything(play):
    async def scene(live, host, runs):
        run = put(runs, made(steps=1000))
        host.sockets["a"] = object()
        assert live.watch("a", True) is True
        begin = time.monotonic()
        while time.monotonic() < begin + 1.5:
            forward(run, run.record.sigmas[run.record.forwards], ends_step=True)
            if "b" not in host.sockets and time.monotonic() > begin + 0.7:
                host.sockets["b"] = object()
                live.watch("b", True)
            await asyncio.sleep(0.01)
        first, late = host.of("a"), host.of("b")
        assert 3 <= len(first) <= 8 and 2 <= len(late) <= 5
        assert [told["full"] for told in first] == [True] + [False] * (len(first) - 1)
        assert late[0]["full"] and not late[1]["full"] and late[0]["cells"][0][0] == 0
        run.status = "stopped"
        run.close()
        live.ended(run)
        await asyncio.sleep(0)
        whole = cells(host.of("a")[-1])
        for told in (host.of("a"), host.of("b")):
            assert told[-1]["full"] and told[-1]["status"] == "stopped"
            seen = {}
            for event in told[:-1]:
                seen.update(cells(event))
            assert set(seen) <= set(whole) and len(seen) >= 0.8 * len(whole)
        assert all(later - sooner > 0.15 for sooner, later in itertools.pairwise(times(host, "a")))

    def times(host, sid):
        return [at for at, to, data in host.sent if to == sid and data["status"] == "running"]

    play(scene)


def test_a_page_that_is_gone_or_says_nothing_for_long_is_forgotten(play, monkeypatch):
    async def scene(live, host, runs):
        put(runs, made())
        host.sockets.update(gone=object(), silent=object(), reloaded=object())
        for client_id in list(host.sockets):
            live.watch(client_id, True)
        await asyncio.sleep(0.05)
        assert [len(host.of(client_id)) for client_id in host.sockets] == [1, 1, 1]
        del host.sockets["gone"]
        host.sockets["reloaded"] = object()
        live.watch("reloaded", True)
        live.watch("silent", True)
        await asyncio.sleep(0.25)
        assert set(live._clients) == {"silent", "reloaded"}
        assert [len(host.of(client_id)) for client_id in ("gone", "silent", "reloaded")] == [1, 1, 2]
        assert host.of("reloaded")[-1]["full"], "the page is new and has nothing"
        monkeypatch.setattr(module, "SECONDS", 0.1)
        live.watch("silent", True)
        live.watch("reloaded", True)
        await asyncio.sleep(0.5)
        assert live._clients == {} and live.watched is False and live._timer is None
        with pytest.raises(KeyError):
            live.watch("gone", True)

    play(scene)


def test_the_number_of_pages_is_bounded(play):
    async def scene(live, host, runs):
        host.sockets.update({str(number): object() for number in range(17)})
        for number in range(16):
            live.watch(str(number), True)
        with pytest.raises(TooManyError):
            live.watch("16", True)
        live.watch("3", True)
        live.watch("4", False)
        live.watch("16", True)

    play(scene)


def test_two_runs_at_once_share_the_five_a_second(play):
    async def scene(live, host, runs):
        both = [put(runs, made(1)), put(runs, made(2))]
        host.sockets["a"] = object()
        live.watch("a", True)
        begin = time.monotonic()
        while time.monotonic() < begin + 1.1:
            for run in both:
                forward(run)
            await asyncio.sleep(0.02)
        told = host.of("a")
        assert len(told) <= 6 and {event["run"] for event in told} == {1, 2}

    play(scene)


def test_what_goes_wrong_in_it_is_said_once_and_ends_it(play, caplog):
    async def scene(live, host, runs):
        run = put(runs, made())
        run.record.history = None
        host.sockets["a"] = object()
        live.watch("a", True)
        await asyncio.sleep(0.5)
        live.ended(run)
        await asyncio.sleep(0)
        assert host.sent == [] and live.watched is False

    play(scene)
    assert len([one for one in caplog.records if one.levelname == "ERROR"]) == 1


def test_while_a_page_takes_nothing_nothing_is_added(play):
    async def scene(live, host, runs):
        run = put(runs, made())
        host.sockets["a"] = object()
        for _ in range(60):
            host.messages.put_nowait(None)
        live.watch("a", True)
        forward(run)
        await asyncio.sleep(0.3)
        assert host.sent == []
        while not host.messages.empty():
            host.messages.get_nowait()
        await asyncio.sleep(0.3)
        assert len(host.of("a")) == 1

    play(scene)


# In a real ComfyUI


class Page:
    """A page: a websocket, and what came through it of ours. `watch()` says that it shows the panel."""

    def __init__(self, server):
        self.server, self.client_id = server, uuid.uuid4().hex
        self.events: list[tuple[float, dict]] = []
        self.others: list[tuple[str, dict]] = []
        self._loop, self._open = asyncio.new_event_loop(), threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._listen(),), daemon=True)
        self._thread.start()
        assert self._open.wait(20)

    async def _listen(self):
        address = f"{self.server.url.replace('http', 'ws')}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as self._socket:
            async for message in self._socket:
                self._open.set()  # the host greets
                if message.type == aiohttp.WSMsgType.TEXT:
                    data = json.loads(message.data)
                    if data["type"] == "attune.live":
                        self.events.append((time.monotonic(), data["data"]))
                    elif data["type"].startswith("attune."):
                        self.others.append((data["type"], data["data"]))

    def watch(self, on=True):
        return self.server.post("/attune/watch", {"client_id": self.client_id, "on": on})

    def of(self, prompt_id) -> list[dict]:
        return [event for _, event in self.events if event["prompt_id"] == prompt_id]

    def close(self):
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._socket.close(), self._loop).result(10)
            self._thread.join(10)
            self._loop.close()


@pytest.fixture
def open_socket(server):
    pages: list[Page] = []

    def one() -> Page:
        pages.append(Page(server))
        return pages[-1]

    yield one
    for page in pages:
        page.close()


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def merged(events) -> dict:
    """What a page holds that follows the contract."""
    held = {}
    for event in events:
        held = cells(event) if event["full"] else {**held, **cells(event)}
    return held


def test_two_stages_are_told_as_they_run(server, open_socket):
    def patch(prompt, model, stage):
        model = selector(prompt, model, str(70 + stage), "split", time_calls=True)
        return rule(prompt, model, str(80 + stage), "basic", kind="cross", to_percent=30.0, blocks="1")

    page, other = open_socket(), open_socket()
    assert page.watch() == {"live": True, "seconds": 30.0}
    result = server.run(two_stage(patch, steps=60), client_id=other.client_id)
    until(lambda: sum(event["status"] == "finished" for event in page.of(result.prompt_id)) == 2)
    assert other.events == [], "the page that queued the prompt does not show the panel"
    assert [event["status"] for kind, event in other.others if kind == "attune.status"] == ["finished"] * 2
    for stage, run in enumerate(result.runs):
        events = [event for event in page.of(result.prompt_id) if event["run"] == run["run"]]
        assert len(events) >= 2 and [event["full"] for event in events[:2]] == [True, len(events) == 2]
        last = events[-1]
        assert last["full"] and last["status"] == "finished" and last["sampler_node"] == str(12 + stage)
        assert (last["first_step"], last["steps"], last["step"], last["blocks"]) == (30 * stage, 30, 30 * stage + 29, 2)
        assert set(last["kernels"]) == ({"split", "basic"} if stage == 0 else {"split"})
        kept = server.get(f"/attune/runs/{run['run']}")
        names = kept["kernel_names"]
        assert cells(last) == {(s, b, kind, names[kernel]): n for s, b, kind, kernel, n in kept["cells"]}
        # What was told before is part of it, euler's steps included.
        assert merged(events[:-1]).items() <= cells(last).items() and merged(events[:-1])
        assert 0 < events[-2]["times"]["split"]["seconds"] <= last["times"]["split"]["seconds"]
        assert sum(time["share"] for time in last["times"].values()) == pytest.approx(1)
    at = [at for at, event in page.events if event["status"] == "running"]
    assert len(at) <= 3 + 5 * (at[-1] - at[0]), "five a second, and the first of each run"


def endless(kernel="split", **inputs):
    prompt = two_stage(lambda p, m, stage: selector(p, m, str(90 + stage), kernel, **inputs), steps=4000)
    for key in ("12", "13"):
        prompt[key]["inputs"] |= {"start_at_step": 0, "end_at_step": 4000}
    return prompt


def test_a_page_that_comes_later_gets_all_of_it_and_one_that_leaves_nothing_more(server, open_socket):
    first, late = open_socket(), open_socket()
    first.watch()
    identity = server.submit(endless(), client_id=first.client_id)
    until(lambda: len(first.of(identity)) >= 3)
    late.watch()
    until(lambda: len(late.of(identity)) >= 3)
    begun = late.of(identity)
    assert [event["full"] for event in begun[:3]] == [True, False, False] and begun[0]["cells"][0][0] == 0
    for place in (f"/attune/runs/{begun[0]['run']}", f"/attune/runs/{begun[0]['run']}/report?format=png"):
        with pytest.raises(urllib.error.HTTPError, match="409"):
            server.get(place)
    first.watch(on=False)
    time.sleep(0.3)
    so_far = len(first.events)
    late.close()  # without a word
    other = open_socket()
    other.watch()
    until(lambda: len(other.of(identity)) >= 2)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        late.watch()
    server.interrupt()
    server.wait(identity)
    until(lambda: other.of(identity)[-1]["status"] == "stopped")
    assert other.of(identity)[-1]["full"]
    assert len(first.events) == so_far
    time.sleep(0.5)
    assert other.of(identity)[-1]["status"] == "stopped", "the end is the last word"
    assert "Traceback" not in server.output().partition(identity)[2]


def test_a_repair_is_told_while_the_run_goes_on_and_a_run_that_fails_ends_with_that(make_server, tmp_path):
    """A stand-in for SageAttention that the doctor finds good, and that then gives NaN."""
    kernel, faults = "sage2_fp8_cuda", tmp_path / "faults.txt"
    server = make_server(env=environment(tmp_path, "sage2", fault_file=faults), folder="repair")
    page = Page(server)
    try:
        assert set(server.run(two_stage(lambda p, m, s: selector(p, m, str(20 + s), kernel))).runs[0]["observed"]) == {
            kernel
        }
        faults.write_text(f"{kernel}:nan:from=0", "utf-8")
        page.watch()
        result = server.run(two_stage(lambda p, m, s: selector(p, m, str(30 + s), kernel), steps=60))
        until(lambda: sum(event["status"] == "finished" for event in page.of(result.prompt_id)) == 2)
        events = [event for event in page.of(result.prompt_id) if event["run"] == result.runs[0]["run"]]
        happened = {one["id"]: one for event in events[:-1] for one in event["events"]}
        assert {"repeat", "demotion"} <= {one["kind"] for one in happened.values()}
        assert kernel in {one["kernel"] for one in happened.values()}
        last = events[-1]
        assert {one["id"] for one in last["events"]} >= set(happened) and last["repeated"] >= 1
        assert set(last["kernels"]) == set(result.runs[0]["observed"]), "what was thrown away is in no cell"
        faults.write_text(f"{kernel}:raise:from=0", "utf-8")
        strict = two_stage(lambda p, m, s: selector(p, m, str(40 + s), kernel, when_unavailable="error"))
        identity = server.submit(strict)
        with pytest.raises(PromptFailedError):
            server.wait(identity)
        until(lambda: bool(page.of(identity)))
        assert page.of(identity)[-1]["status"] == "failed" and page.of(identity)[-1]["full"]
    finally:
        page.close()
        server.stop()
