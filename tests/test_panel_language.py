# ruff: noqa: RUF001  The Chinese marks are meant.
"""The panel and the nodes' pages in Chinese, as ComfyUI changes its language: without loading the page again."""

from __future__ import annotations

import json
import re

import pytest

from support.browser import ComfyPage
from support.browser_nodes import Desk
from support.loading import ROOT
from support.panel import DEMOTED, REPEATED, Fake, Panel, kernel, listed, live, past, works

DOCS = ROOT / "web" / "docs"
WORDS = json.loads((ROOT / "locales" / "zh" / "main.json").read_text("utf-8"))
CHINESE = re.compile(r"[\u4e00-\u9fff]")
CPU = ["ComfyUI was started with --cpu: GPUs are not looked at."]
REASON = "gave NaN or infinity"
PLACE = "block 23 (self attention, 4,096 × 4,096 tokens)"


@pytest.fixture(scope="module")
def shown(browser, server, tmp_path_factory):
    comfy = ComfyPage(browser, server, vue=False)  # nothing of it is the renderer's
    comfy.page.set_default_timeout(60_000)
    comfy.page.set_viewport_size({"width": 1600, "height": 1500})
    yield Panel(Desk(comfy, tmp_path_factory.mktemp("pictures")))
    comfy.call("(locale) => app.extensionManager.setting.set('Comfy.Locale', locale)", "en")
    comfy.close()


@pytest.fixture
def panel(shown):
    speak(shown, "en")
    yield shown
    shown.close()
    assert shown.desk.problems == []


def speak(panel, locale: str) -> None:
    panel.comfy.call("(locale) => app.extensionManager.setting.set('Comfy.Locale', locale)", locale)


def test_the_panel_follows_the_language_at_once(panel):
    """What the server says too, as far as it is known in that language."""
    panel.open()
    panel.width(420)
    panel.section("machine").get_by_text("This machine").wait_for()
    english = panel.section("machine").get_by_role("listitem").all_inner_texts()
    assert not any(CHINESE.search(line) for line in english)
    speak(panel, "zh")
    panel.section("machine").get_by_text("本机").wait_for()
    panel.section("machine").get_by_text("以 --cpu 启动").wait_for()
    chinese = panel.section("machine").get_by_role("listitem").all_inner_texts()
    assert len(chinese) == len(english) and chinese[2].startswith("ComfyUI 自带的注意力：")
    assert re.fullmatch(r"没有节点时：ComfyUI 自带（\w+）。auto 的首选：sdpa。", chinese[3])
    panel.section("kernels").get_by_text("重新检测").wait_for()
    why = panel.section("kernels").locator("tr.why")
    panel.until(lambda: why.count() > 3)
    assert panel.section("live").get_by_text("还没有采样过").or_(panel.section("live").locator(".about")).count()
    panel.desk.screenshot("panel-chinese")
    panel.close()
    speak(panel, "en")
    panel.open()
    panel.section("machine").get_by_text("This machine").wait_for()


def test_it_hears_everything_once_after_the_language_was_changed(panel):
    """The sections that were there before listen no longer, and the server tells of a run from its beginning."""
    fake = Fake(panel.comfy)
    try:
        panel.open()
        panel.until(lambda: fake.asked)
        for locale in ("zh", "en", "zh"):
            speak(panel, locale)
        panel.section("machine").get_by_text("本机").wait_for()
        panel.until(lambda: [body["on"] for path, body in fake.asked if path == "/attune/watch"][-1])
        before = len(fake.asked)
        fake.send("attune.probe", {"done": 1, "total": 2, "kernel": "sdpa", "outcome": "works", "ended": False})
        panel.section("kernels").get_by_text("正在检测 1 / 2：sdpa").wait_for()
        assert panel.section("kernels").count() == 1
        fake.send("reconnected", {})
        panel.until(lambda: len(fake.asked) > before)
        panel.page.wait_for_timeout(300)
        assert [path for path, _ in fake.asked[before:]] == ["/attune/watch"]
    finally:
        panel.page.unroute("**/api/attune/**")


def test_causes_cures_and_what_happened_in_a_run_come_in_chinese(panel):
    fake = Fake(panel.comfy)
    rows = [
        works("sdpa", 0.5),
        kernel("sage3", "not installed", cause="Its package is not installed.",
               cure={"text": "Install the build that fits here:", "command": "pip install x", "source": ""}),
        kernel("flash4", "wrong numbers", cause="It runs, and its results are wrong: pictures would be black, noise or "
               "subtly off. Why is not known."),
        kernel("xformers", "crashed", cause="It ends the process it runs in: ComfyUI would be gone, with no message. "
               "Somebody's own words, which nobody knows."),
        kernel("flash3", "unsupported", cause="needs sm90, this GPU is sm120 (Blackwell)",
               cure={"text": "No installation changes that.", "command": "", "source": ""}),
    ]  # fmt: skip
    notes = [f"sage3 {REASON} in {PLACE}; another kernel computes such calls for the rest of the run"]
    events = [
        {**DEMOTED, "text": f"sage3 {REASON} in {PLACE}"},
        {**REPEATED, "text": "a forward was repeated on the host's own attention"},
        {**DEMOTED, "id": 2, "text": "flash2 raised ValueError: no"},
    ]
    try:
        fake.answers["/attune/kernels"] = {"kernels": rows}
        fake.answers["/attune/runs"] = {"runs": [{**listed(1), "started": "2026-11-22T02:00:00Z", "seconds": 61.2}]}
        fake.answers["/attune/runs/1"] = past(1, 61.2)
        speak(panel, "zh")
        panel.open()
        panel.section("live").get_by_text("61.2 秒").wait_for()
        assert " · 61.2\u00a0秒 · " in panel.page.get_by_label("显示", exact=True).locator("option").first.inner_text()
        fake.send("attune.live", {**live(9, full=True, events=events, notes=notes), "run": 2})
        panel.section("live").get_by_text("运行 2").wait_for()
        panel.page.get_by_text("未安装，或不适用于本机（2）").click()
        table = panel.section("kernels").inner_text()
        for words in ("能运行，但结果错误", "原因未知。", "未安装它的软件包。", "请安装适合这里的版本：",
                      "需要 sm90，此 GPU 是 sm120", "无法通过安装解决。",
                      "没有任何提示。 Somebody's own words, which nobody knows."):  # fmt: skip
            assert words in table, words
        log = panel.section("live").get_by_role("log").inner_text()
        place = "块 23（自注意力，4,096 × 4,096 个 token）"
        assert f"sage3 在{place}产生了 NaN 或无穷大（" in log
        assert f"sage3 在{place}产生了 NaN 或无穷大；本次运行余下的这类调用由别的内核计算" in log
        assert "一次前向计算用 ComfyUI 自带的注意力重做了" in log and "flash2 抛出了 ValueError：no" in log
        for theme in ("light", "dark"):
            panel.theme(theme)
            panel.desk.screenshot(f"panel-chinese-{theme}")
    finally:
        panel.page.unroute("**/api/attune/**")


def test_sentences_are_known_whole_or_in_parts_and_the_rest_stays(panel):
    told = panel.comfy.call(
        """async () => {
            const { learn, said } = await import("/extensions/ComfyUI-Attune/panel/said.js");
            const places = { "{a} gave {b}": "{b}由{a}给出", "{n} of {m}": "{m}之{n}" };
            learn({ ...places, "gave no": "无", "a.b (c)": "甲", x: "叉" });
            const found = ["1 gave x", "gave no", "a.b (c)", "aXb (c)", "y; x; z", "No. x", "One. Two.", "", "2 of x"];
            const told = found.map(said);
            const remark = "{kernel}: {why} in {count} model{s} sampled here, and is not used there any more.";
            learn({ [remark]: "甲{kernel}{count}{why}", "{kernel} gave NaN in {place}": "乙", "gave NaN": "丙" });
            told.push(said("sage2: gave NaN in 2 models sampled here, and is not used there any more. Then this."));
            const left = "not {kernel} ×{count}: {reasons}";
            learn({ "{kernel} gave NaN": "{kernel}乙", "gave NaN": "丙", [left]: "未用{kernel}{count}：{reasons}" });
            told.push(said("not flash2 ×4: gave NaN"), said("flash2 gave NaN"));
            const hostile = "k: w in 3 models ".repeat(1000), began = performance.now();
            told.push(said(hostile) === hostile, performance.now() - began < 2000);
            learn({});
            return [...told, said("x")];
        }"""
    )
    assert told == [
        "叉由1给出",
        "无",
        "甲",
        "aXb (c)",
        "y；叉；z",
        "No. x",
        "One. Two.",
        "",
        "叉之2",
        "甲sage22丙 Then this.",
        "未用flash24：丙",
        "flash2乙",
        True,
        True,
        "x",
    ]


def test_the_headings_of_the_settings_and_a_kernels_name(panel):
    fake = Fake(panel.comfy)
    try:
        fake.answers["/attune/runs"] = {"runs": [listed(1)]}
        fake.answers["/attune/runs/1"] = {**past(1, 61.2), "kernels": {"host": {"calls": 8}}}
        speak(panel, "zh")
        panel.open()
        name = panel.section("live").locator("span.kernel", has_text="host")
        name.wait_for()
        assert name.get_attribute("title") == "ComfyUI 自带的注意力"
        assert panel.button("把运行 1 的报告保存为 文本").inner_text() == "文本"
        panel.comfy.call("() => app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
        dialog = panel.page.get_by_role("dialog")
        dialog.get_by_text("Attune", exact=True).first.click()
        dialog.get_by_role("heading", name="新建节点").wait_for()
        assert dialog.get_by_role("heading", name="面板").count()
        panel.desk.screenshot("settings-chinese")
        panel.page.keyboard.press("Escape")
        dialog.wait_for(state="detached")
    finally:
        panel.page.unroute("**/api/attune/**")


def test_the_help_panel_shows_a_nodes_page_in_the_language(panel):
    """As a user asks for it: by the button over a node that is selected."""
    speak(panel, "zh")
    panel.page.wait_for_timeout(2000)  # ComfyUI loads the workflow again
    for page in sorted(DOCS.glob("*/zh.md")):
        panel.comfy.call(
            """async (name) => {
                app.graph.clear();
                const node = LiteGraph.createNode(name);
                node.pos = [400, 300];
                app.graph.add(node);
                app.canvas.ds.scale = 1;
                app.canvas.ds.offset[0] = app.canvas.ds.offset[1] = 0;
                app.canvas.selectNode(node);
                app.canvas.setDirty(true, true);
            }""",
            page.parent.name,
        )
        title, text, *_ = page.read_text("utf-8").split("\n\n")
        button = panel.page.get_by_test_id("info-button")
        beginning = re.split("[，。`]", text)[0]
        shown = panel.page.get_by_text(beginning).filter(visible=True)
        button.click()
        shown.first.wait_for()
        panel.desk.screenshot(f"help-{page.parent.name}")
        assert panel.page.get_by_role("heading", name=title.removeprefix("# "), exact=True).count()
