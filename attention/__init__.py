"""The heart of the pack: what a call is, what a kernel needs, how the choice is made and carried out.

Needs torch and nothing else: no ComfyUI, no kernel package. Read `router.py`, then `plan.py`.
"""
