"""`attune workflow` on workflows that were changed at random: a clean end, and never a file that is half written."""

from __future__ import annotations

import copy
import json
import random

import pytest

from comfyui_attune import cli
from comfyui_attune.graphs import files
from support.workflows import NAMES, read

ACTIONS = (["show"], ["show", "--json"], ["bypass"], ["enable"], ["insert", "--kernel", "sdpa"], ["remove"],
           ["upgrade"], ["run", "--server", "127.0.0.1:9"])  # fmt: skip
VALUES = [None, True, False, -1, 0, 3.5, "x", "", [], {}, [1], [[1]], {"a": 1}, 2**70, "AttentionSelector", "KSampler",
          "Reroute", "GetNode", "SetNode", "PathchSageAttentionKJ", float("nan"), float("inf"), -10, "-20"]  # fmt: skip
KEYS = ["id", "link", "links", "type", "nodes", "inputs", "outputs", "mode", "properties", "widgets_values", "extra"]
EACH = 60


def prompt() -> dict:
    """An API prompt with the nodes that matter here."""
    chain = ["UNETLoader", "LoraLoaderModelOnly", "AttentionSelector", "PathchSageAttentionKJ", "KSampler"]
    made = {}
    for number, kind in enumerate(chain, 1):
        inputs = {"model": [str(number - 1), 0]} if number > 1 else {}
        made[str(number)] = {
            "class_type": kind,
            "inputs": {**inputs, "kernel": "auto", "steps": 4},
            "_meta": {"title": "é"},
        }
    return made


def changed(flow: dict, luck: random.Random) -> dict:
    """A copy with one to three things set to another kind of value, taken out, doubled or added."""
    flow = copy.deepcopy(flow)
    for _ in range(luck.randint(1, 3)):
        holder, key, target = None, None, flow
        for _ in range(luck.randint(1, 7)):
            if not isinstance(target, (dict, list)) or not target:
                break
            holder, key = target, luck.choice(list(target)) if isinstance(target, dict) else luck.randrange(len(target))
            target = target[key]
        if holder is None:
            continue
        what = luck.choice(["set", "set", "take out", "double", "add"])
        if what == "set":
            holder[key] = copy.deepcopy(luck.choice(VALUES))
        elif what == "take out":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[luck.choice(KEYS)] = copy.deepcopy(luck.choice(VALUES))
    return flow


def cut(text: str, luck: random.Random) -> bytes:
    """The file with a few bytes changed, or its end missing."""
    data = bytearray(text.encode())
    if luck.random() < 0.3:
        return bytes(data[: luck.randrange(len(data))])
    for _ in range(luck.randint(1, 4)):
        data[luck.randrange(len(data))] = luck.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("name", [*NAMES, "prompt"])
def test_whatever_is_wrong_ends_cleanly(name, tmp_path, capsys):
    luck = random.Random(name)
    flow = prompt() if name == "prompt" else read(name)
    path, out = tmp_path / "工 flow.json", tmp_path / "out.json"
    ends = set()
    for number in range(EACH):
        odd = json.dumps(changed(flow, luck), ensure_ascii=False)
        given = cut(odd, luck) if number % 4 == 0 else odd.encode()
        action = luck.choice(ACTIONS)
        writes = action[0] not in ("show", "run")
        path.write_bytes(given)
        out.unlink(missing_ok=True)
        elsewhere = writes and luck.random() < 0.3
        more = (["-o", str(out)] if elsewhere else ["--no-backup"]) if writes else []
        status = cli.main(["workflow", action[0], str(path), *action[1:], *more])
        said = capsys.readouterr()
        ends.add(status)
        if status:
            assert status == 2 and said.out == "" and said.err.count("\n") == 1 and "Traceback" not in said.err, said
            assert path.read_bytes() == given and not out.exists(), action
        else:
            files.read(out if elsewhere else path)
            assert not elsewhere or path.read_bytes() == given
        assert {one.name for one in tmp_path.iterdir()} <= {path.name, out.name}
    assert ends == {0, 2}
