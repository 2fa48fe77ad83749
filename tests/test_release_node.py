"""The node ReleaseModel in a real ComfyUI: the host's books stay right, and so does every result."""

from __future__ import annotations

import re

import pytest
import torch

from support.prompts import latent, node, selector, two_stage
from support.server import PromptFailedError


def released(*uses: str, model: list, **options) -> dict:
    """A two-stage prompt; between the stages a ReleaseModel for each of `uses` (node ids) with `model`."""
    prompt = two_stage(**options)
    value = ["12", 0]
    for key in uses:
        prompt[key] = node("ReleaseModel", value=value, model=model)
        prompt[f"{key}0"] = node("PreviewAny", source=[key, 1])
        value = [key, 0]
    prompt["13"]["inputs"]["latent_image"] = value
    return prompt


def text_of(result, key: str = "40") -> str:
    (text,) = result.outputs[f"{key}0"]["text"]
    return text


def seeded(prompt: dict, seed: int) -> dict:
    prompt["12"]["inputs"]["noise_seed"] = seed
    return prompt


def test_its_face_in_the_node_library(server):
    info = server.object_info()["ReleaseModel"]
    assert info["category"] == "attention" and len(info["description"]) > 40
    assert list(info["input"]["required"]) == ["value", "model"] and info["output_name"] == ["value", "text"]
    assert server.object_info()["DeleteModelPassthrough"]["deprecated"]


def test_the_first_model_goes_and_the_result_stays(server):
    wanted = latent(server.run(seeded(two_stage(), 71)))
    result = server.run(seeded(released("40", model=["10", 0]), 71))
    assert torch.equal(latent(result), wanted)
    found = re.fullmatch(
        r"WAN21 was unloaded; it computes on the CPU, where its (\S+) MB stay in memory.", text_of(result)
    )
    assert found and 5 < float(found[1]) < 15  # the tiny model's


def test_a_second_release_finds_nothing_and_says_so(server):
    result = server.run(seeded(released("40", "41", model=["10", 0]), 72))
    assert text_of(result, "40").startswith("WAN21 was unloaded")
    assert text_of(result, "41") == "WAN21 was not loaded; nothing to free."


def test_a_model_that_is_needed_afterwards_is_loaded_again(server):
    """Both stages sample with the model that is released in between."""
    both = two_stage(lambda p, m, stage: selector(p, ["1", 0], str(20 + stage), "sdpa"))
    wanted = latent(server.run(seeded(both, 73)))
    prompt = released("40", model=["10", 0], patch=lambda p, m, stage: selector(p, ["1", 0], str(20 + stage), "sdpa"))
    again = seeded(prompt, 73)
    result = server.run(again)
    assert torch.equal(latent(result), wanted) and text_of(result).startswith("WAN21 was unloaded")
    server.forget()
    assert torch.equal(latent(server.run(again)), wanted)


def test_one_model_with_two_loras(server):
    """Clones with different patches share their weights: releasing one must not leave the other one's behind."""

    def patch(prompt, _model, stage):
        key = str(30 + stage)
        name = f"wan2.2_t2v_lightx2v_4steps_lora_v1.1_{'low' if stage else 'high'}_noise.safetensors"
        prompt[key] = node("LoraLoaderModelOnly", model=["1", 0], lora_name=name, strength_model=1.0 - 0.5 * stage)
        return [key, 0]

    wanted = latent(server.run(seeded(two_stage(patch), 74)))
    plain = latent(server.run(seeded(two_stage(lambda p, m, stage: ["1", 0]), 74)))
    assert not torch.equal(wanted, plain)
    for released_one in ("30", "31", "1"):  # the clone that is loaded, the other one, and the one without patches
        result = server.run(seeded(released("40", model=[released_one, 0], patch=patch), 74))
        assert torch.equal(latent(result), wanted)
    assert torch.equal(latent(server.run(seeded(two_stage(lambda p, m, stage: ["1", 0]), 74))), plain)


def test_only_that_model_goes(server):
    """The other stage's model and the text encoder are loaded as well: they stay until they are released themselves."""
    wanted = latent(server.run(seeded(two_stage(), 75)))
    prompt = seeded(released("40", model=["10", 0]), 75)
    prompt["5"]["inputs"]["text"] += "."  # so that the text encoder is needed
    prompt["42"] = node("ReleaseModel", value=["40", 0], model=["2", 0])
    prompt["420"] = node("PreviewAny", source=["42", 1])
    prompt["43"] = node("DeleteModelPassthrough", data=["42", 0], model=["3", 0])
    prompt["13"]["inputs"]["latent_image"] = ["43", 0]
    result = server.run(prompt)
    assert text_of(result, "40").startswith("WAN21 was unloaded")
    assert text_of(result, "42").startswith("WAN21 was unloaded")
    assert not torch.equal(latent(result), wanted)  # another prompt
    prompt["5"]["inputs"]["text"] = prompt["5"]["inputs"]["text"][:-1]
    assert torch.equal(latent(server.run(prompt)), wanted)


def test_what_is_no_model_is_told(server):
    prompt = two_stage()
    prompt["40"] = node("DeleteModelPassthrough", data=["12", 0], model=["12", 0])
    prompt["13"]["inputs"]["latent_image"] = ["40", 0]
    with pytest.raises(PromptFailedError, match=r"wanted a model .* found dict"):
        server.run(prompt)


def test_swap_nodes_makes_it_of_the_other_packs_node(server):
    (offered,) = server.get("/node_replacements")["DeleteModelPassthrough"]
    assert offered["new_node_id"] == "ReleaseModel" and not offered["old_widget_ids"]
    wanted = [{"new_id": "value", "old_id": "data"}, {"new_id": "model", "old_id": "model"}]
    assert [{key: one[key] for key in ("new_id", "old_id")} for one in offered["input_mapping"]] == wanted
