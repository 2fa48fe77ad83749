"""Files in ComfyUI's output folder, named and numbered as its own."""

from __future__ import annotations

import tempfile
from pathlib import Path

import folder_paths


def output_path(prefix: str, ending: str) -> Path:
    """A file in ComfyUI's output folder that is not there yet, numbered as its own are: PREFIX_00001_ENDING.

    Makes the folder. Raises ValueError where `prefix` leads out of it or nothing can be written there.
    """
    base = folder_paths.get_output_directory()
    if not prefix.strip() or prefix.strip().endswith(("/", "\\")):
        raise ValueError(f"filename_prefix {prefix!r} holds no name; wanted one such as attune/capture")
    try:
        folder, name, number, _, _ = folder_paths.get_save_image_path(prefix.strip(), base)
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=name, dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"nothing can be written to {base} under {prefix!r} ({error}); make room, or change it"
        ) from None
    except Exception as error:  # the host raises a bare Exception for a folder outside
        raise ValueError(
            f"filename_prefix {prefix!r} cannot be used ({str(error).splitlines()[0]}); wanted a name below {base}"
        ) from None
    return Path(folder) / f"{name}_{number:05}_{ending}"
