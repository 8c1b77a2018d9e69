import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROJECT = Path(__file__).resolve().parent.parent
TESTDATA = PROJECT.parent / "shared" / "testdata"


CPU_SECONDS = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--cpu-budget`: what the whole run may cost; `make unit` sets it."""
    parser.addoption(
        "--cpu-budget",
        type=float,
        metavar="SECONDS",
        help="fail where all test processes and their children take more CPU seconds than this",
    )


def pytest_configure() -> None:
    """Before anything imports torch: one thread, no network, no telemetry."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in (
        "HF_HUB_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
    ):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts tests on real data and models into the slow tier; skips the gpu tier without CUDA.

    Asks torch for CUDA only when such a test was chosen.
    """
    for item in items:
        if {"testdata", "real_model"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    if config.getoption("collectonly") or "not gpu" in str(config.getoption("markexpr")):
        return
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(trylast=True)  # pytest-xdist's workers have ended by then, and been waited for
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that took more than its budget: this process and all that it has waited for."""
    session.config.stash[CPU_SECONDS] = used = sum(os.times()[:4])
    budget = session.config.getoption("cpu_budget")
    if budget is not None and used > budget and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Says what the tests cost, where there is a budget."""
    budget, used = config.getoption("cpu_budget"), config.stash[CPU_SECONDS]
    if budget is not None:
        verdict = "within" if used <= budget else "OVER"
        advice = "" if used <= budget else ": make the slowest tests cheaper, or mark them slow"
        line = f"{used:.0f} CPU seconds, {verdict} the budget of {budget:.0f}{advice}"
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def testdata() -> Path:
    """Folder of real public inputs beside the project, which does not ship them."""
    if not TESTDATA.is_dir():
        message = f"real test data is absent: {TESTDATA}"
        if os.environ.get("CHATLLAMA_REQUIRE_TESTDATA", "0") not in ("", "0"):
            pytest.fail(message)
        pytest.skip(message)
    return TESTDATA


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, imported from its GGUF file: a Hugging Face folder of 540 MB."""
    from real_model import real_gguf

    from chatllama.importing.gguf_checkpoint import import_gguf

    return import_gguf(real_gguf(), tmp_path_factory.mktemp("real") / "smollm2")


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """Sentences that the tiny tokenizer learns from, with enough letters for 300 pieces."""
    places = ["the river", "a garden", "an old house", "the market", "some forest", "our village"]
    people = ["Anna", "the baker", "my brother", "a quiet child", "Victor", "the queen"]
    deeds = ["walks through", "paints", "asks about", "jumps over", "never forgets", "looks for"]
    return [
        f"{who} {does} {where} at {hour} o'clock, and then it is quiet again."
        for who in people
        for does in deeds
        for hour, where in enumerate(places, start=1)
    ]


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory, tiny_texts: list[str]) -> Path:
    """A folder with a SentencePiece BPE tokenizer of 300 pieces."""
    from chatllama.text.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    train_tokenizer(tiny_texts, vocab_size=300, folder=folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_dir: Path) -> "PreTrainedTokenizerFast":
    """The tiny tokenizer, loaded; a module may put one of its own in its place."""
    from chatllama.text.tokenizer import load_tokenizer

    return load_tokenizer(tiny_tokenizer_dir)


@pytest.fixture
def data_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` keeps goes to the test's own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A plain Hugging Face folder: seeded LLaMA (2 layers, hidden 64) and the tiny tokenizer.

    Session-wide: read it, never write into it.
    """
    import shutil

    import torch
    from tiny_models import tiny_config
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    config = tiny_config(vocabulary=300, hidden=64, initializer_range=0.02)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copytree(tiny_tokenizer_dir, folder, dirs_exist_ok=True)
    return folder
