"""ComfyUI runs this before it imports torch: attention packages that would end its process are kept out of it."""

import importlib
import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).absolute().parent
# doctor/ is loaded by its path, under a name of its own: the pack's package does not exist yet.
doctor = importlib.util.spec_from_file_location(
    "attune_doctor", PACK / "doctor" / "__init__.py", submodule_search_locations=[str(PACK / "doctor")]
)
sys.modules["attune_doctor"] = importlib.util.module_from_spec(doctor)
importlib.import_module("attune_doctor.quarantine").apply(PACK)
