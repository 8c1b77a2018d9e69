"""Every JSON file of a run, changed at random: it loads, or one ValueError says why, in time."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from generation_runs import make_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatllama.inference.load import load_run
from chatllama.runs.folder import RunFolder
from chatllama.text.chat_format import render
from chatllama.text.encoding import decode

pytestmark = pytest.mark.slow
FILES = ("backbone/config.json", "backbone/generation_config.json", "backbone/tokenizer.json",
         "backbone/tokenizer_config.json", "ppo/policy/adapter_config.json",
         "ppo/policy/chatllama.json", "lineage.json",
         "backbone/model.safetensors.index.json")  # fmt: skip
VALUES = st.sampled_from([
    None, True, False, 0, -1, 1, 2, 3.5, 2**31, 2**63, 10**30, -(2**40), float("nan"), float("inf"),
    "", "x", "0", "../x", "\0", "a" * 3000, [], [0], ["x"], {}, {"a": 1}, {"content": 5}, [[]],
])  # fmt: skip
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
Change = tuple[str, list[int], str, Any]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A run of two weight files, with a record of its policy."""
    run = make_run(tmp_path_factory.mktemp("run"), tiny_tokenizer_dir)
    (run.backbone / "model.safetensors").rename(run.backbone / "a.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": {"lm_head.weight": "a.safetensors"}}
    (run.backbone / "model.safetensors.index.json").write_text(json.dumps(index))
    empty = {key: {} for key in ("code", "packages", "config", "data", "parents", "outputs")}
    base = {"path": "b", "fingerprint": None, "files": {}}
    record = {"begun": "2026", "finished": "2026", "base": base, "changed": [["x"]], **empty}
    run.lineage.write_text(json.dumps({"ppo": record}))
    load_run(run, roles=["policy"])
    return run.root


def changed(content: Any, way: list[int], what: str, value: Any) -> Any:
    """The JSON value with one change, at a place that is found by numbers from the root."""
    if way and isinstance(content, dict | list) and content:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = keys[way[0] % len(keys)]
        if len(way) == 1 and what == "delete":
            del content[key]
        else:
            content[key] = changed(content[key], way[1:], what, value)
        return content
    if what == "negate" and isinstance(content, int | float):
        return -content
    if what == "nest":
        return [[content]]
    if what == "text":
        return json.dumps(content)
    return value


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    st.sampled_from(FILES),
    st.lists(st.integers(0, 400), min_size=1, max_size=5),
    st.sampled_from(["replace", "replace", "delete", "negate", "nest", "text"]),
    VALUES,
)
def test_a_changed_file_loads_or_is_refused(
    plain: Path, tmp_path_factory: pytest.TempPathFactory, name: str, way: list[int], what: str,
    value: Any,
) -> None:  # fmt: skip
    root = tmp_path_factory.mktemp("fuzz") / "run"
    shutil.copytree(plain, root)
    run = RunFolder(root)
    run.config.write_text(run.config.read_text().replace(str(plain), str(root)))
    file = root / name
    file.write_text(json.dumps(changed(json.loads(file.read_text()), way, what, value)))
    begun = time.process_time()
    try:
        loaded = load_run(run, roles=["policy"])
        messages: Any = [{"role": "user", "content": "the river"}]
        decode(loaded.tokenizer, render(loaded.tokenizer, loaded.chat, messages).ids)
    except ValueError as error:
        assert str(error) and len(str(error)) < 5000
    assert time.process_time() - begun < 2
    shutil.rmtree(root)
