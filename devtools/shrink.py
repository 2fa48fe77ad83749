"""Lower the sizes in an API prompt, so that a CPU is done with it in seconds."""

import copy

SIZES = {"width", "height"}


def shrink(prompt: dict, size: int, length: int, steps: int) -> tuple[dict, list[str]]:
    """A copy of `prompt` with pictures of at most `size`, `length` frames, `steps` steps per sampling stage.

    Returns the copy and what was lowered, in words. Only numbers that stand in the prompt itself are lowered, in the
    node that uses them or in the primitive node that it takes them from. A sampler that does the steps 10 to 20 of 20
    does the second half of `2 * steps` afterwards.
    """
    prompt = copy.deepcopy(prompt)
    said: list[str] = []

    def lower(node: str, name: str, most: float) -> None:
        value = prompt[node]["inputs"].get(name)
        if isinstance(value, list) and (source := prompt.get(value[0])) and source["class_type"] == "PrimitiveInt":
            node, name, value = value[0], "value", source["inputs"].get("value")
        if isinstance(value, int) and value > most:
            prompt[node]["inputs"][name] = int(most)
            said.append(f"{name} {value} -> {int(most)} (node {node})")

    for node, data in prompt.items():
        inputs = data["inputs"]
        for name in SIZES & inputs.keys():
            lower(node, name, size)
        if "length" in inputs:
            lower(node, "length", length)
        total = inputs.get("steps")
        if isinstance(total, int) and total > 0:
            start = inputs.get("start_at_step", 0)
            end = min(inputs.get("end_at_step", total), total)
            if not isinstance(start, int) or not isinstance(end, int):
                continue
            share = steps / max(1, end - start)
            if share < 1:
                inputs["steps"] = max(1, round(total * share))
                said.append(f"steps {total} -> {inputs['steps']} (node {node})")
                for name in ("start_at_step", "end_at_step"):
                    if name in inputs and inputs[name] <= total:
                        inputs[name] = round(inputs[name] * share)
    return prompt, said
