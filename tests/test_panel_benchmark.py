"""A benchmark of the panel that goes on, or ends, while its page is loaded again."""

from __future__ import annotations

import json

import pytest

from support.prompts import two_stage

# Nothing of it is the renderer's.
pytestmark = pytest.mark.parametrize("desk_page", [False], ids=["canvas"], indirect=True)


@pytest.fixture
def panel(panel, desk):
    yield panel
    desk.server.interrupt()
    desk.comfy.call("() => sessionStorage.removeItem('attune.benchmark')")


def start(panel, desk, seconds: float) -> str:
    """Press the button; each kernel is timed for so long. Returns the prompt's id."""

    def change(route) -> None:
        body = json.loads(route.request.post_data)
        body["prompt"]["attune_benchmark"]["inputs"] |= {"seconds": seconds, "kernels": "exact"}
        route.continue_(post_data=json.dumps(body))

    desk.open("wan2.2_t2v_14b")
    desk.look_at(58)
    desk.click(58)
    panel.open()
    desk.page.route("**/api/prompt", change)
    try:
        with desk.page.expect_response(lambda answer: answer.url.endswith("/prompt")) as got:
            panel.button("Benchmark this model").click()
        return got.value.json()["prompt_id"]
    finally:
        desk.page.unroute("**/api/prompt")


def reload(panel, desk):
    """Press F5 and open the tab; returns the section with the tools."""
    panel.close()
    desk.reload()
    panel.open()
    return panel.section("tools")


def test_it_goes_on_and_its_result_is_there_after_another_reload(panel, desk):
    identity = start(panel, desk, seconds=1)
    panel.section("tools").get_by_text("The benchmark runs").wait_for()
    section = reload(panel, desk)
    section.get_by_text("The benchmark runs").wait_for()
    section.get_by_text("The benchmark runs: ").wait_for()  # so many of so many
    section.get_by_text("The benchmark is done.").wait_for(timeout=120_000)
    told = section.locator("pre").inner_text()
    section = reload(panel, desk)
    section.get_by_text("The benchmark is done.").wait_for()
    assert section.locator("pre").inner_text() == told and "sdpa" in told
    picture = section.get_by_role("img")
    panel.until(lambda: picture.evaluate("one => one.complete && one.naturalWidth > 300"))
    desk.screenshot("panel-benchmark-reloaded")
    desk.server.post("/history", {"delete": [identity]})
    section = reload(panel, desk)
    section.get_by_role("alert").get_by_text("ComfyUI no longer knows the benchmark").wait_for()
    section = reload(panel, desk)
    desk.page.wait_for_timeout(500)
    assert "benchmark:" not in section.inner_text(), "it is said once"


def test_it_is_stopped_while_the_page_is_loaded_again(panel, desk):
    identity = start(panel, desk, seconds=5)
    panel.section("tools").get_by_text("The benchmark runs").wait_for()
    panel.close()
    desk.comfy.call("() => { window.onbeforeunload = null }")
    desk.page.goto("about:blank")
    desk.server.interrupt()
    desk.server.wait(identity)
    desk.page.goto(desk.server.url)
    desk.page.wait_for_function("() => window.app?.graph?.nodes?.length && window.app.extensionManager")
    desk.listen()
    desk.settle()
    panel.open()
    panel.section("tools").get_by_role("alert").get_by_text("The benchmark failed: stopped").wait_for()


def test_it_waits_and_is_taken_out_of_the_queue(panel, desk):
    prompt = two_stage(steps=10_000, split=9_999)
    before = desk.server.submit(prompt)
    identity = start(panel, desk, seconds=1)
    section = panel.section("tools")
    section.get_by_text("The benchmark is in the queue.").wait_for()
    section = reload(panel, desk)
    section.get_by_text("The benchmark is in the queue.").wait_for()
    desk.server.post("/queue", {"delete": [identity]})
    section.get_by_role("alert").get_by_text("it was taken out of the queue").wait_for()
    assert "The benchmark is in the queue." not in section.inner_text()
    desk.server.interrupt()
    desk.server.wait(before)
