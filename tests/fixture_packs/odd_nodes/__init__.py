"""Nodes for tests of what goes wrong in a model: a stop in the middle of a forward, numbers that are none."""

import itertools

import comfy.model_management


class StopInForward:
    """ComfyUI's stop button is pressed at the beginning of the model's forward number `forward`, from 0. Flux only."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "forward": ("INT", {"default": 0})}}

    def patch(self, model, forward):
        numbers = itertools.count()

        def look(args):
            if next(numbers) == forward:
                comfy.model_management.interrupt_current_processing()
            return args

        model = model.clone()
        model.set_model_patch(look, "post_input")
        return (model,)


class NanLatent:
    """The latent with NaN in its first place."""

    CATEGORY = "tests"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "spoil"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("LATENT",)}}

    def spoil(self, samples):
        spoilt = samples["samples"].clone()
        spoilt.flatten()[0] = float("nan")
        return ({**samples, "samples": spoilt},)


NODE_CLASS_MAPPINGS = {"StopInForward": StopInForward, "NanLatent": NanLatent}
