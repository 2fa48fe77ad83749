"""Workflow files: what stands in them about attention, and changes to it. Needs no ComfyUI."""
