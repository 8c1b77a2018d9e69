from pathlib import Path
from typing import Any

from chatllama.reporting.origin import UNKNOWN, machines_line, origin
from chatllama.runs.folder import RunFolder, write_record

CPU = {"system": "Linux x86_64", "cpu": "EPYC", "cores": 2, "memory_gb": 25.3, "gpus": {}}
ONE = {**CPU, "ranks": 1}
EIGHT = {**CPU, "cores": 96, "memory_gb": 1007.5, "ranks": 8, "gpus": {"NVIDIA H100, 85 GB": 8}}
LINE = "no GPU, EPYC, 2 cores, 25 GB of memory, 1 process"


def test_machines_are_told_in_words_and_equal_ones_once() -> None:
    assert machines_line([ONE]) == LINE  # type: ignore[list-item]
    words = "8 x NVIDIA H100, 85 GB, EPYC, 96 cores, 1008 GB of memory, 8 processes"
    assert machines_line([EIGHT] * 4 + [ONE]) == f"4 machines with {words}; {LINE}"  # type: ignore


def test_the_hardware_is_what_ran_each_stage_and_not_what_writes_the_page(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    made: dict[str, Any] = {"begun": "2026-01-02", "finished": None, "code": {"version": "0"}}
    made |= {"packages": {}, "config": {}, "base": {"path": "b", "fingerprint": "f"}}
    made |= {"data": {}, "parents": {}}
    write_record(run, "sft", made)
    write_record(run, "reward", {**made, "hardware": [[ONE]]})
    write_record(run, "ppo", {**made, "hardware": [[ONE], [{**ONE, "ranks": 2}]]})
    assert origin(run, {})["hardware"] == {
        UNKNOWN: ["sft"],
        LINE: ["reward"],
        f"{LINE}; then {LINE[:-9]}2 processes": ["ppo"],
    }
