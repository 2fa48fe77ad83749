"""The same engine for diffusers pipelines, without ComfyUI: `apply` (handle.py), and `attune run` (run_script.py)."""
