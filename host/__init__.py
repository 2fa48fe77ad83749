"""The only folder that imports ComfyUI (and, later, diffusers)."""
