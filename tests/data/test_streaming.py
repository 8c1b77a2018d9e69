"""Large inputs: bounded memory, the same tokens from any number of processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from chatllama.config.model import ChatSection
from chatllama.config.sources import DataSource
from chatllama.text.tokenizer import load_tokenizer
from data.caching import num_workers
from data.mixture import load_mixture
from data.tokenize import tokenize

pytestmark = pytest.mark.usefixtures("data_cache")

PROJECT = Path(__file__).resolve().parents[2]


def test_processes_share_cores_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    assert num_workers(9_999) is None and num_workers(10_000) == 2
    assert num_workers(10**6) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert num_workers(10**6) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert num_workers(10**6) is None


def test_several_processes_give_the_same_tokens(
    tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    rows = [{"prompt": f"the river {i}", "completion": f"a garden {i * i}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(tiny_tokenizer_dir)
    chat = ChatSection(template="llama2")
    results = []
    for name, number in (("one", None), ("two", 2)):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / name)
        monkeypatch.setattr("data.caching.num_workers", lambda _, number=number: number)
        data = load_mixture([DataSource(path=str(file))], [], 0.0, 0, "sft").train
        examples, report = tokenize(data, "sft", tokenizer, chat, 200)
        results.append((examples["input_ids"][:], examples["mask"][:], report))
    assert results[0] == results[1] and len(results[0][0]) == 40


CHILD = """
import resource, sys
from pathlib import Path
import datasets
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2])
from chatllama.config.sources import DataSource
from data.reading.source import read_source
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
data, report = read_source(DataSource(path=sys.argv[1]), "sft")
print(len(data), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="units of ru_maxrss")
def test_reading_needs_far_less_memory_than_the_file(tmp_path: Path) -> None:
    file = tmp_path / "large.jsonl"
    line = json.dumps({"prompt": "why? " * 100, "completion": "because " * 300}) + "\n"
    copies = 200 * 2**20 // len(line)
    with file.open("w") as stream:
        for _ in range(copies):
            stream.write(line)
    command = [sys.executable, "-c", CHILD, str(file), str(tmp_path / "child")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    num_records, growth = map(int, done.stdout.split())
    assert num_records == copies
    assert growth < 100 * 2**10  # KiB; the file has 200 MiB
