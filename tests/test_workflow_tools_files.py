"""`attune workflow` on pictures and videos, and on files that are damaged, huge or made to do harm."""

from __future__ import annotations

import json
import os
import struct
import time
import zlib

import hypothesis
import pytest
from hypothesis import strategies

from comfyui_attune import cli
from comfyui_attune.graphs import check as checks
from comfyui_attune.graphs import files, text
from comfyui_attune.graphs.media import texts_in
from comfyui_attune.measure.workflow_file import WorkflowError
from support.workflows import read

FLOW = read("wan2.2_i2v_14b")
PROMPT = {"3": {"class_type": "KSampler", "inputs": {"model": ["4", 0], "text": "é"}},
          "4": {"class_type": "UNETLoader", "inputs": {}}}  # fmt: skip
ACTIONS = (["show"], ["insert"], ["remove"], ["upgrade"], ["bypass"], ["enable"], ["run", "--server", "127.0.0.1:9"])


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(content): every action ends with one line and status 2, and writes nothing. Returns the line."""

    def run(content: bytes | str, name: str = "flow.json", actions=ACTIONS) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        lines = []
        for action in actions:
            began = time.perf_counter()
            assert cli.main(["workflow", action[0], str(path), *action[1:]]) == 2, action
            assert time.perf_counter() - began < 20
            said = capsys.readouterr()
            assert not said.out and said.err.count("\n") == 1 and "Traceback" not in said.err, said
            lines.append(said.err.strip())
        assert [one.name for one in tmp_path.iterdir()] == [name]
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
        assert len(set(lines)) == 1
        return lines[0]

    return run


# Pictures and videos, written by PyAV and Pillow as ComfyUI's nodes do (nodes_video.py, _ui.py).

BOTH = {"workflow": json.dumps(FLOW), "prompt": json.dumps(PROMPT)}


def video(path, codec: str, metadata: dict[str, str], **options: str) -> None:
    av = pytest.importorskip("av", reason="PyAV, which ComfyUI brings, writes the videos of this test")
    import numpy

    with av.open(str(path), "w", options=options) as out:
        for name, value in metadata.items():
            out.metadata[name] = value
        stream = out.add_stream(codec, rate=8)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(numpy.zeros((64, 64, 3), "uint8"), format="rgb24")))
        out.mux(stream.encode())


def picture(path, kind: str) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow, which ComfyUI brings, writes the pictures here")
    from PIL.PngImagePlugin import PngInfo

    image = image_module.new("RGB", (16, 16))
    if kind.startswith("webp"):
        exif = image.getexif()
        exif[0x0110], exif[0x010F] = f"prompt:{BOTH['prompt']}", f"workflow:{BOTH['workflow']}"
        more = {"save_all": True, "append_images": [image_module.new("RGB", (16, 16), "red")]} if "anim" in kind else {}
        image.save(path, exif=exif, **more)
        return
    info = PngInfo()
    for name, value in BOTH.items():
        if kind == "png comf":
            info.add(b"comf", f"{name}\0{value}".encode(), after_idat=True)
        elif kind == "png itxt":
            info.add_itxt(name, json.dumps(json.loads(value), ensure_ascii=False), zip=True)
        else:
            info.add_text(name, value, zip=kind == "png ztxt")
    image.save(path, pnginfo=info)


MEDIA = {
    "png": ("a.png", lambda path: picture(path, "png")),
    "png ztxt": ("a.png", lambda path: picture(path, "png ztxt")),
    "png itxt": ("a.png", lambda path: picture(path, "png itxt")),
    "png comf": ("a.png", lambda path: picture(path, "png comf")),
    "webp": ("a.webp", lambda path: picture(path, "webp")),
    "webp animated": ("a.webp", lambda path: picture(path, "webp anim")),
    "SaveVideo": ("a.mp4", lambda path: video(path, "mpeg4", BOTH, movflags="use_metadata_tags+faststart")),
    "mp4 at its end": ("a.mp4", lambda path: video(path, "mpeg4", BOTH, movflags="use_metadata_tags")),
    "SaveWEBM": ("a.webm", lambda path: video(path, "libvpx-vp9", BOTH)),
    "VHS mp4": ("a.mp4", lambda path: video(path, "mpeg4", {"comment": json.dumps(BOTH)})),
    "VHS webm": ("a.webm", lambda path: video(path, "libvpx-vp9", {"comment": json.dumps(BOTH)})),
}


@pytest.mark.parametrize("name", MEDIA)
def test_a_workflow_in_a_picture_or_video_is_read_and_never_written(name, tmp_path, capsys):
    path = tmp_path / MEDIA[name][0]
    MEDIA[name][1](path)
    before = path.read_bytes()
    assert files.read(path).workflow == FLOW
    assert files.read(path, to_run=True).workflow == PROMPT
    assert cli.main(["workflow", "show", str(path)]) == 0
    assert "KSamplerAdvanced (57" in capsys.readouterr().out
    assert cli.main(["workflow", "bypass", str(path)]) == 2
    assert "only read" in capsys.readouterr().err
    out = tmp_path / "out.json"
    assert cli.main(["workflow", "bypass", str(path), "-o", str(out)]) == 0
    assert {node["mode"] for node in json.loads(out.read_text("utf-8"))["nodes"] if node["id"] == 115} == {4}
    assert path.read_bytes() == before
    assert cli.main(["workflow", "bypass", str(out), "-o", str(path)]) == 2
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", MEDIA)
def test_a_cut_or_changed_picture_or_video(name, tmp_path):
    path = tmp_path / MEDIA[name][0]
    MEDIA[name][1](path)
    whole = path.read_bytes()
    for size in sorted({*range(12, 200, 17), *range(200, len(whole), len(whole) // 15)}):
        path.write_bytes(whole[:size])
        try:  # what is there as a whole is read, the rest is told
            assert files.read(path).workflow in (FLOW, PROMPT)
        except WorkflowError as error:
            assert str(path) in str(error)
    for place in range(12, min(len(whole), 4000), 37):
        path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        try:
            files.read(path)
        except WorkflowError as error:
            assert str(path) in str(error)


@hypothesis.given(
    head=strategies.sampled_from(
        [b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"\0\0\0\x18ftypisom", b"\x1a\x45\xdf\xa3"]
    ),
    rest=strategies.binary(max_size=300),
)
def test_any_bytes_behind_the_head_of_a_picture_or_video(head, rest, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(head + rest)
    with pytest.raises(WorkflowError):
        texts_in(path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_text_that_unpacks_to_gigabytes(refused, monkeypatch):
    monkeypatch.setattr("comfyui_attune.graphs.media.LARGEST", 100_000)
    bomb = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"0" * 10_000_000))
    said = refused(b"\x89PNG\r\n\x1a\n" + bomb + chunk(b"IEND", b""), "a.png")
    assert "larger than" in said


def test_texts_that_nobody_asked_for_are_not_unpacked(refused, monkeypatch):
    unpacked = []
    monkeypatch.setattr("comfyui_attune.graphs.media._inflate", lambda data: unpacked.append(data) or b"{")
    zipped = [chunk(b"zTXt", name + b"\0\0x") for name in (b"Software", b"workflow", b"workflow", b"Comment2")]
    refused(b"\x89PNG\r\n\x1a\n" + b"".join(zipped) + chunk(b"IEND", b""), "a.png", actions=ACTIONS[:1])
    assert len(unpacked) == 1


def test_a_picture_that_names_its_text_a_thousand_times(refused):
    entries = b"".join(struct.pack("<HHII", 0x10F, 2, 40_000_000, 8) for _ in range(60_000))
    exif = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", 60_000) + entries + b"x" * 20_000_000
    webp = b"WEBP" + b"EXIF" + struct.pack("<I", len(exif)) + exif
    assert "WebP" in refused(b"RIFF" + struct.pack("<I", len(webp)) + webp, "a.webp", actions=ACTIONS[:1])


def test_what_a_terminal_obeys_is_not_printed(tmp_path, capsys):
    flow = json.loads(json.dumps(FLOW).replace('"KSamplerAdvanced"', '"K\\u001b[2J\\n\\u202eS"'))
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(flow), "utf-8")
    assert cli.main(["workflow", "show", str(path)]) == 0
    assert "K\\x1b[2J\\n\\u202eS (57" in capsys.readouterr().out
    flow["nodes"].append(flow["nodes"][0] | {"id": "\x1b[2J\n"})
    flow["nodes"].append(flow["nodes"][-1])
    path.write_text(json.dumps(flow), "utf-8")
    assert cli.main(["workflow", "show", str(path)]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and said.count("\n") == 1


def test_nan_in_a_picture_is_what_the_front_end_takes_it_for(tmp_path, capsys):
    text = json.dumps(FLOW).replace('"version": 0.4', '"version": NaN')
    path, out = tmp_path / "a.png", tmp_path / "out.json"
    head = b"\x89PNG\r\n\x1a\n"
    path.write_bytes(head + chunk(b"tEXt", b"workflow\0" + text.encode()) + chunk(b"IEND", b""))
    assert cli.main(["workflow", "bypass", str(path), "-o", str(out)]) == 0
    assert json.loads(out.read_text("utf-8"))["version"] is None
    assert cli.main(["workflow", "show", str(out)]) == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "flow.json")
    assert cli.main(["workflow", "show", str(tmp_path / "flow.json")]) == 2
    assert "a pipe or a device" in capsys.readouterr().err


def test_links_to_a_workflow_are_followed_and_stay(tmp_path, capsys):
    folder, name = tmp_path / "real", "flow.json"
    folder.mkdir()
    (folder / name).write_text(json.dumps(FLOW), "utf-8")
    for link, target in (("link.json", folder / name), ("loop.json", "loop.json"), ("lost.json", "nowhere.json")):
        try:
            (tmp_path / link).symlink_to(target)
        except OSError:
            pytest.skip("this system lets users make no links")
    assert cli.main(["workflow", "bypass", str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink() and json.loads((folder / name).read_text("utf-8")) != FLOW
    assert sorted(one.name for one in folder.iterdir()) == [name, f"{name}.bak"]
    capsys.readouterr()
    for link in ("loop.json", "lost.json"):
        for action in ACTIONS:
            assert cli.main(["workflow", action[0], str(tmp_path / link), *action[1:]]) == 2
            said = capsys.readouterr().err
            assert link in said and said.count("\n") == 1


def test_a_picture_without_a_workflow(refused):
    said = refused(b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "a.png")
    assert "PNG" in said and "--disable-metadata" in said
    said = refused(b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"workflow\0{nonsense") + chunk(b"IEND", b""), "a.png")
    assert "the workflow in" in said and "no JSON" in said


# What is no workflow.


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        (json.dumps(FLOW).replace('"version": 0.4', '"version": NaN'), "NaN is no number of JSON"),
        (json.dumps(FLOW).replace('"version": 0.4', '"version": -Infinity'), "-Infinity is no number of JSON"),
        (json.dumps(FLOW).encode("utf-16"), "UTF-8"),
        ('{"nodes": {"1": {"id": 1, "type": "X"}}, "links": []}', "found an object with nodes, links"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "inside each other"),
        ("{", "cut off"),
        (json.dumps(FLOW)[:5000], "cut off"),
        ("null", "null"),
        ("[1, 2]", "found a list"),
        ("{}", "an empty object"),
        ('{"a": 1, "b": 2}', "found an object with a, b"),
        ('{"nodes": 3, "links": []}', "found an object with nodes, links"),
        ('{"3": {"class_type": "X"}}', "class_type and inputs"),
        (b"\xff\xfe{\x00}\x00", "UTF-8"),
        (b"\x00" * 100, "no JSON"),
        ("[" * 100_000 + "]" * 100_000, "inside each other"),
        ('{"nodes": [], "links": [], "extra": ' + '{"a":' * 300 + "1" + "}" * 300 + "}", "inside each other"),
    ],
)
def test_what_is_no_workflow(content, reason, refused):
    said = refused(content)
    assert reason in said and "anted" in said and "flow.json" in said


def test_a_file_of_100_megabytes(refused):
    said = refused(json.dumps({"nodes": [], "links": [], "extra": "x" * 100_000_000}), actions=ACTIONS[:2])
    assert "100 MB" in said and "at most 50 MB" in said


def test_a_file_that_is_not_there(tmp_path, capsys):
    for path in (tmp_path / "none.json", tmp_path):
        assert cli.main(["workflow", "insert", str(path)]) == 2
        assert str(path) in capsys.readouterr().err


def graph(nodes: list, links: list, **more) -> dict:
    return {"last_node_id": 99, "last_link_id": 99, "nodes": nodes, "links": links, "version": 0.4, **more}


def one(number, kind: str = "LoraLoaderModelOnly", link=None, **more) -> dict:
    inputs = [{"name": "model", "type": "MODEL", "link": link}]
    return {"id": number, "type": kind, "inputs": inputs, "outputs": [{"type": "MODEL", "links": []}], **more}


def inner(name: str, *nodes: dict, **more) -> dict:
    return {"id": name, "name": name, "nodes": list(nodes), "links": [], "inputs": [], "outputs": [], **more}


DAMAGED = {
    "two nodes with one id": (graph([one(1), one("1")], []), "two nodes have the id 1"),
    "two links with one id": (graph([one(1), one(2)], [[1, 1, 0, 2, 0, "MODEL"]] * 2), "two links have the id 1"),
    "a link to a missing node": (graph([one(1, link=1)], [[1, 7, 0, 1, 0, "MODEL"]]), "comes from node 7"),
    "a link that is not there": (graph([one(1, link=5)], []), "has link 5"),
    "a link of another kind": (graph([one(1, link=[1])], []), "has link [1]"),
    "a circle": (
        graph([one(1, link=2), one(2, link=1)], [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 1, 0, "MODEL"]]),
        "run in a circle",
    ),
    "a node behind itself": (graph([one(1, link=1)], [[1, 1, 0, 1, 0, "MODEL"]]), "run in a circle"),
    "a circle through SetNode": (
        graph(
            [one(1, "SetNode", link=1, widgets_values=["a"]), one(2, "GetNode", widgets_values=["a"]),
             one(3, "KSampler", link=2, outputs=[{"type": "LATENT"}])],
            [[1, 2, 0, 1, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"]],
        ),
        "run in a circle",
    ),
    "a subgraph that holds itself": (
        graph([one(1, "a")], [], definitions={"subgraphs": [inner("a", one(2, "b")), inner("b", one(3, "a"))]}),
        "holds itself",
    ),
    "subgraphs that grow without end": (
        graph([one(1, "s0")], [], definitions={
            "subgraphs": [inner(f"s{at}", *(one(n, f"s{at + 1}") for n in range(8))) for at in range(40)]
        }),
        "each use of a subgraph",
    ),
    "two subgraphs with one id": (graph([], [], definitions={"subgraphs": [inner("a"), inner("a")]}), "two subgraphs"),
    "a subgraph without an id": (graph([], [], definitions={"subgraphs": [{**inner("a"), "id": 3}]}), "has no id"),
    "a subgraph without links": (graph([], [], definitions={"subgraphs": [{"id": "a", "nodes": []}]}), "no nodes and"),
    "definitions of another kind": (graph([], [], definitions=[1]), "definitions"),
    "subgraphs of another kind": (graph([], [], definitions={"subgraphs": [1]}), "subgraphs"),
    "a node of another kind": (graph([3], []), "no id or no type"),
    "a node without a type": (graph([{"id": 1}], []), "no id or no type"),
    "inputs of another kind": (graph([one(1, inputs=["a"])], []), "inputs of node 1"),
    "a mode of another kind": (graph([one(1, mode="x")], []), "mode of node 1"),
    "a link of another length": (graph([one(1)], [[1, 2]]), "neither a list of six nor an object"),
    "a link without numbers": (graph([one(1)], [[1, None, 0, 1, 0, "MODEL"]]), "link 1 says"),
    "too many links": (graph([one(1)], [[n, 1, 0, 2, 0, "X"] for n in range(50_001)]), "too large"),
    "too many nodes": (graph([one(n) for n in range(checks.MOST_NODES + 1)], []), "too large"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_workflows(name, refused):
    data, reason = DAMAGED[name]
    data = {**data, "nodes": [*data["nodes"], one(9_000_000, "PathchSageAttentionKJ")]}
    said = refused(json.dumps(data))
    assert reason in said and "anted" in said


def test_damaged_workflows_in_api_format(refused):
    circle = {
        "1": {"class_type": "A", "inputs": {"model": ["2", 0]}},
        "2": {"class_type": "B", "inputs": {"x": ["1", 0]}},
    }
    actions = [*ACTIONS[:4], ACTIONS[-1]]
    said = refused(json.dumps(circle), actions=actions)
    assert "run in a circle" in said
    said = refused(json.dumps({"1": {"class_type": "A", "inputs": {"model": ["7", 0]}}}), actions=actions)
    assert "node 7" in said


def test_a_link_that_is_left_over_does_no_harm(tmp_path):
    data = graph([one(1)], [[1, 1, 0, 44, 0, "MODEL"], None])  # official templates have such links
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(data), "utf-8")
    assert cli.main(["workflow", "show", str(path)]) == 0


def test_a_large_workflow_takes_seconds_and_not_hours(tmp_path):
    count = 1600
    loaders = [one(n, "UNETLoader", pos=[0, 0], outputs=[{"type": "MODEL", "links": [n]}]) for n in range(count)]
    ends = [one(n + count, "KSampler", link=n, pos=[9, 9], outputs=[{"type": "LATENT"}]) for n in range(count)]
    links = [[n, n, 0, n + count, 0, "MODEL"] for n in range(count)]
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(graph(loaders + ends, links)), "utf-8")
    began = time.perf_counter()
    assert cli.main(["workflow", "insert", str(path)]) == 0
    assert time.perf_counter() - began < 60
    assert len(json.loads(path.read_text("utf-8"))["nodes"]) == 3 * count


VALUES = strategies.sampled_from([None, True, -1, 3.5, "x", "", [], {}, [1], {"a": 1}, 2**70])


@hypothesis.settings(max_examples=200)
@hypothesis.given(data=strategies.data())
def test_a_file_with_one_value_of_another_kind(data, tmp_path_factory):
    """Whatever is wrong: a clean end, and a file that is as it was or a workflow."""
    flow = json.loads(json.dumps(FLOW))
    target = flow
    for _ in range(data.draw(strategies.integers(1, 5))):
        if not isinstance(target, (dict, list)) or not target:
            break
        key = data.draw(strategies.sampled_from(list(target) if isinstance(target, dict) else range(len(target))))
        holder, target = target, target[key]
    holder[key] = data.draw(VALUES)
    action = data.draw(strategies.sampled_from([action[0] for action in ACTIONS[:-1]]))
    path = tmp_path_factory.getbasetemp() / "changed.json"
    path.write_text(json.dumps(flow), "utf-8")
    options = [] if action == "show" else ["--no-backup"]
    status = cli.main(["workflow", action, str(path), *options])
    if status:
        assert json.loads(path.read_text("utf-8")) == flow
    else:
        files.read(path)


def test_a_write_that_fails_leaves_the_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(FLOW), "utf-8")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("comfyui_attune.measure.bench_file.os.replace", full)
    for options in (["--no-backup"], [], ["-o", str(path)]):
        assert cli.main(["workflow", "bypass", str(path), *options]) == 2
        assert "No space left" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["flow.json"] and json.loads(path.read_text("utf-8")) == FLOW


def test_a_file_that_is_write_protected_and_a_folder_that_nothing_can_be_written_to(tmp_path, monkeypatch, capsys):
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(FLOW), "utf-8")

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("comfyui_attune.graphs.files.shutil.copy2", forbidden)
        assert cli.main(["workflow", "bypass", str(path)]) == 2
    said = capsys.readouterr().err
    assert (
        "cannot be written (Permission denied); nothing was changed. Wanted: a folder" in said and "flow.json " in said
    )
    monkeypatch.setattr("comfyui_attune.graphs.files.os.access", lambda *_: False)
    assert cli.main(["workflow", "bypass", str(path)]) == 2
    assert "is write-protected, and is as it was" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["flow.json"] and json.loads(path.read_text("utf-8")) == FLOW


def test_how_deep_is_measured_without_recursion():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert text.depth(deep) > 200


def test_a_folder_that_is_not_there_and_an_address_that_is_no_servers(tmp_path, capsys) -> None:
    given = tmp_path / "flow.json"
    given.write_text(json.dumps(FLOW), "utf-8")
    assert cli.main(["workflow", "bypass", str(given), "-o", str(tmp_path / "nowhere" / "x.json")]) == 2
    assert f"there is no folder {tmp_path / 'nowhere'}: make it" in capsys.readouterr().err
    assert cli.main(["workflow", "run", str(given), "--server", "file:///etc/passwd"]) == 2
    assert "wanted http://" in capsys.readouterr().err


def test_kernels_are_named_where_widgets_are_not_listed_among_the_inputs(tmp_path, capsys) -> None:
    """As in the workflows that ComfyUI writes into pictures and videos."""
    workflow = read("wan2.2_t2v_14b")
    for node in workflow["nodes"]:
        node["inputs"] = [one for one in node.get("inputs", []) if "widget" not in one or one.get("link")]
    path = tmp_path / "flow.json"
    path.write_text(json.dumps(workflow), "utf-8")
    assert cli.main(["workflow", "show", str(path)]) == 0
    said = capsys.readouterr().out
    assert "AttentionSelector (115" in said and said.count(": auto") == 2, said
