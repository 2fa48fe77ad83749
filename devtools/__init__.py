"""The parts of dev.py. Standard library only; the scripts in venv_scripts/ alone run with the Python of .venv."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
