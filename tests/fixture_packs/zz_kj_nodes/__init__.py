"""A pack that has the id of a node which ComfyUI-Attune would otherwise stand in for."""


class PathchSageAttentionKJ:
    CATEGORY = "another pack"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "sage_attention": (["disabled", "auto"],)}}

    def patch(self, model, sage_attention):
        return (model,)


NODE_CLASS_MAPPINGS = {"PathchSageAttentionKJ": PathchSageAttentionKJ}
