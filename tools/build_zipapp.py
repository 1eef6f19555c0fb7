"""Builds `aphro` as one executable file, without torch: for hosts that estimate, diagnose, chat, measure and watch.

    python tools/build_zipapp.py [-o dist/aphro.pyz]

Packs this checkout and the packages that it needs besides, as they are installed here: no network is asked. The file
runs with the Python version and on the platform that built it (others are told), and unpacks itself once into
~/.shiv. Needs shiv, of the development extra.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# what serving needs and looking does not
LEFT_OUT = {"torch", "transformers", "tokenizers", "numba", "llvmlite", "gguf", "jinja2", "hypercorn", "starlette"}
LEFT_OUT |= {"hf-xet"}  # for weights; headers come without it
PREAMBLE = """\
import sys
if sys.version_info[:2] != {version}:
    sys.exit("error: this file was built for Python %d.%d, this is %d.%d" % ({version} + sys.version_info[:2])
             + "\\ntry: python%d.%d in front of it" % {version})
"""


def needed_packages() -> list[metadata.Distribution]:
    """The dependencies of pyproject.toml but for LEFT_OUT, and theirs, as installed. Exits naming what is not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    found: dict[str, metadata.Distribution] = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in found or name in LEFT_OUT or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            sys.exit(f"error: {name} is not installed\ntry: python -m pip install -e '.[dev]'")
        waiting += [Requirement(text) for text in found[name].requires or ()]
    return [found[name] for name in sorted(found)]


def copy_package(package: metadata.Distribution, folder: Path) -> None:
    """Its files inside site-packages; not its commands and manuals, nor bytecode."""
    for file in package.files or ():
        source = Path(str(package.locate_file(file)))
        if ".." in file.parts or "__pycache__" in file.parts or "tests" in file.parts or not source.is_file():
            continue
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def copy_aphro(folder: Path) -> None:
    """This checkout's packages, and the metadata that says which version they are."""
    ignored = shutil.ignore_patterns("__pycache__")
    for package in ("src/aphro_cli", "src/aphro_core", "kernels/aphro_kernels"):
        shutil.copytree(ROOT / package, folder / Path(package).name, ignore=ignored)
    shutil.copyfile(ROOT / "src" / "aphro.py", folder / "aphro.py")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    info = folder / f"aphro-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: aphro\nVersion: {version}\n")


def build(output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        site, preamble = Path(folder) / "site-packages", Path(folder) / "preamble.py"
        site.mkdir()
        for package in needed_packages():
            copy_package(package, site)
        copy_aphro(site)
        preamble.write_text(PREAMBLE.format(version=sys.version_info[:2]))
        command = [
            sys.executable,
            "-m",
            "shiv.cli",
            "--site-packages",
            str(site),
            "--entry-point",
            "aphro_cli.main:main",
        ]
        command += ["--output-file", str(output), "--python", "/usr/bin/env python3", "--compressed", "--reproducible"]
        subprocess.run([*command, "--preamble", str(preamble)], check=True)
    output.chmod(0o755)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "dist" / "aphro.pyz", metavar="FILE")
    output = parser.parse_args().output
    build(output)
    print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB, for Python {sys.version_info[0]}.{sys.version_info[1]}")


if __name__ == "__main__":
    main()
