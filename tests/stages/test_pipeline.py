import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from launching import gone

from chatllama import cli
from chatllama.config.loader import dump_config, load_config
from chatllama.config.schema import Config
from chatllama.runs.folder import STAGES, RunFolder, Stage
from chatllama.runs.outcome import record_failure
from chatllama.runtime.files import write_json
from chatllama.start.runs import run_state
from trainers.stages import launcher, lineage, pipeline, refusals
from trainers.stages.launcher import Launch, choose_ranks, hostfile_slots, stage_command
from trainers.stages.pipeline import StageFailed
from trainers.stages.processes import run_to_end

PYTHON = sys.executable


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(pipeline, "count_gpus", lambda: 0)
    for name in ("input_problems", "model_problems"):  # there is no model
        monkeypatch.setattr(refusals, name, lambda *_: [])
    path = tmp_path / "my.yaml"
    text = f"run_dir: {tmp_path / 'run'}\nbackbone: {{path: llama}}\nchat: {{template: llama2}}\n"
    stages = "".join(f"{stage}: {{data: [{{path: {stage}.jsonl}}]}}\n" for stage in STAGES)
    path.write_text(text + stages)
    return str(path)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, run: RunFolder) -> list[list[str]]:
    """Commands that were started; each one finishes its stage."""
    commands: list[list[str]] = []

    def finish(command: list[str], *_: object) -> int:
        commands.append(command)
        script = next(Path(word).name for word in command if word.endswith(".py"))
        stage: Stage = next(s for s in STAGES if launcher.SCRIPTS[s] == script)
        write_json(run.result(stage), {"wall_seconds": 10.0, "accuracy": 0.8})
        return 0

    monkeypatch.setattr(pipeline, "run_to_end", finish)
    return commands


def run_pipeline(config: str, overrides: Sequence[str] = (), **options: Any) -> None:
    pipeline.run_pipeline(config, overrides, **options)


def scripts(commands: list[list[str]]) -> list[str]:
    return [Path(word).name for command in commands for word in command if word.endswith(".py")]


def test_runs_the_stages_in_order_then_reports(
    config: str, run: RunFolder, started: list, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(config, ["ppo.steps=3"])
    assert scripts(started) == ["train_sft.py", "train_rm.py", "train_ppo.py"]
    assert load_config(run.config).ppo.steps == 3
    assert json.loads(run.summary.read_text())["wall_seconds"]["total"] == 30.0
    assert run.report.is_file()
    out = capsys.readouterr().out
    assert f"sft: launcher and libraries write to {run.log('sft')}" in out
    assert "train_sft.py my.yaml" not in out and "train_sft.py" in run.log("sft").read_text()
    assert "reward 10 s" in out and f"Report: {run.report}" in out
    assert "Reward model accuracy on held-out pairs: 0.800" in out


def test_finished_stages_are_skipped(config: str, run: RunFolder, started: list) -> None:
    run_pipeline(config)
    started.clear()
    run_pipeline(config)
    assert started == []
    run.result("ppo").unlink()
    run_pipeline(config)
    assert scripts(started) == ["train_ppo.py"]


def test_from_does_a_stage_and_the_later_ones_again(
    config: str, run: RunFolder, started: list
) -> None:
    run_pipeline(config)
    started.clear()
    (run.checkpoints("reward") / "step-5").mkdir(parents=True)
    run_pipeline(config, ["reward.steps=7", "ppo.kl_coef=0.5"], redo_from="reward")
    assert scripts(started) == ["train_rm.py", "train_ppo.py"]
    assert not run.checkpoints("reward").exists()


def test_an_interrupted_stage_asks_for_resume(config: str, run: RunFolder, started: list) -> None:
    (run.checkpoints("sft") / "step-5").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"add --resume to go on .* or --from sft"):
        run_pipeline(config)
    assert started == []
    run_pipeline(config, resume=True)
    assert started[0][-1] == "--resume"


def test_changed_settings_are_done_again_and_nothing_is_lost(
    config: str, run: RunFolder, started: list, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(config)
    for stage in STAGES:
        lineage.write_record(run, stage, lineage.gather(load_config(config), run, stage, {}))
        lineage.finish(load_config(config), run, stage)
    started.clear()
    run_pipeline(config, ["reward.learning_rate=0.5", "ppo.steps=7"])
    assert scripts(started) == ["train_rm.py", "train_ppo.py"]
    out = capsys.readouterr().out
    assert "sft: finished before, kept" in out
    assert "reward:   reward.learning_rate: 5e-05 there, 0.5 now" in out
    assert "ppo:   reward is made anew" in out
    for name in ("reward-1", "ppo-1"):
        assert (run.root / "previous" / name / "result.json").is_file()
        assert f"kept in {run.root / 'previous' / name}" in out
    assert load_config(run.config).ppo.steps == 7


def test_machines_started_one_by_one_move_nothing_aside(
    config: str, run: RunFolder, started: list, tmp_path: Path
) -> None:
    cfg = load_config(config)
    run_pipeline(config)
    for stage in STAGES:
        lineage.write_record(run, stage, lineage.gather(cfg, run, stage, {}))
        lineage.finish(cfg, run, stage)
    started.clear()
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    for rank in (0, 1):
        launch = Launch(
            hostfile=tmp_path / "hosts", node_rank=rank, master_addr="a", master_port=1234
        )
        with pytest.raises(
            ValueError, match=r"ppo\.steps: 100 there, 7 now\. With --node-rank .*ppo"
        ):
            run_pipeline(config, ["ppo.steps=7"], launch=launch)
    assert started == [] and not (run.root / "previous").exists()


@pytest.mark.parametrize(
    ("ensemble", "finished", "saved", "step", "expected"),
    [
        (1, 0, [5, 6], None, "6 1"),
        (1, 0, [5, 6], 5, "5 1"),
        (3, 0, [5], None, "5 1"),
        (3, 1, [5, 6], 5, "5 2"),
        (3, 2, [], None, "None 2"),
        (3, 1, [5], 7, "step 7: it has checkpoints of steps 5"),
        (3, 1, [], 5, "step 5: it has checkpoints of steps none"),
    ],
)
def test_finishing_an_interrupted_reward_stage(
    config: str,
    run: RunFolder,
    started: list,
    ensemble: int,
    finished: int,
    saved: list[int],
    step: int | None,
    expected: str,
) -> None:
    run_pipeline(config, [f"reward.ensemble={ensemble}"])
    run.result("reward").unlink()
    shutil.rmtree(run.stage("ppo"))
    for each in saved:
        (run.reward_run(finished).checkpoints("reward") / f"step-{each}").mkdir(parents=True)
    if finished:
        run.checkpoints("reward").mkdir(parents=True, exist_ok=True)
        run.members.write_text(json.dumps([{}] * finished))
    started.clear()
    if ":" in expected:
        with pytest.raises(ValueError, match=expected):
            pipeline.finish_run(run.root, step)
        return
    pipeline.finish_run(run.root, step)
    assert scripts(started) == ["train_rm.py"] and started[0][-1] == "--resume"
    section = load_config(run.config).reward
    assert f"{section.steps} {section.ensemble}" == expected


def test_a_later_stage_without_its_base_is_refused(
    config: str, run: RunFolder, started: list
) -> None:
    run_pipeline(config)
    run.result("sft").unlink()
    with pytest.raises(
        ValueError, match=r"reward is begun or finished, but sft, .* Use --from sft"
    ):
        run_pipeline(config)


@pytest.mark.parametrize(
    ("code", "exit_code", "words"),
    [(3, 3, "exit code 3."), (0, 1, "exit code 1"), (247, 247, "out of memory"), (245, 245, "11")],
)
def test_a_failing_stage_stops_the_run(
    config: str,
    run: RunFolder,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    exit_code: int,
    words: str,
) -> None:
    calls = []
    monkeypatch.setattr(pipeline, "run_to_end", lambda *args: calls.append(args) or code)
    with pytest.raises(StageFailed) as caught:
        run_pipeline(config, launch=Launch(num_gpus=2))
    assert len(calls) == 1 and caught.value.exit_code == exit_code and words in str(caught.value)
    assert f"chatllama run {run.config} --resume --num-gpus 2" in str(caught.value)
    said = json.loads(run.failed("sft").read_text())  # and a page of the run
    assert said["code"] == 1 and f"exit code {exit_code}" in said["reason"]
    assert f"ended with exit code {exit_code}" in run_state(run).state
    page = run.report.read_text()
    assert '<p class="status bad">Failed: stage sft ended before its first step: its pro' in page


def test_after_a_mistake_of_the_user_the_own_file_is_named(
    config: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object) -> int:
        record_failure(run, "sft", "sft.data: <b> is\nwrong", 2)
        return 2

    monkeypatch.setattr(pipeline, "run_to_end", refused)
    with pytest.raises(StageFailed) as caught:
        run_pipeline(config, ["seed=3"], launch=Launch(num_gpus=2))
    assert caught.value.exit_code == 2 and f"Correct {config}, " in str(caught.value)
    assert f"  chatllama run {config} seed=3 --num-gpus 2" in str(caught.value)
    assert "--resume" not in str(caught.value)
    page = run.report.read_text()
    assert '<p class="status bad">Refused: stage sft: sft.data: &lt;b&gt; is\nwrong</p>' in page
    assert run_state(run).state == "sft refused (sft.data: <b> is), reward to do, ppo to do"
    # In this process, too; an error of the code is none of the user's.
    monkeypatch.setattr(pipeline, "run_here", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_pipeline(config, launch=Launch(in_process=True))
    assert run_state(run).state.startswith("sft failed (division by zero)")


def some_config(**sizes: int) -> Config:
    data = {"data": [{"path": "a.jsonl"}]}
    batch = {**data, "batch_size": 12, "microbatch_size": 2, **sizes}
    return Config.model_validate(
        {
            "run_dir": "x",
            "backbone": {"path": "y"},
            "sft": batch,
            "reward": batch,
            "ppo": {**data, "rollout_batch_size": 12, "minibatch_size": 12, "microbatch_size": 2},
        }
    )


def test_number_of_processes() -> None:
    cfg = some_config()
    assert choose_ranks(cfg, None, gpus=0, cores=8) == 2
    assert choose_ranks(cfg, None, gpus=0, cores=1) == 1
    assert choose_ranks(cfg, None, gpus=5, cores=1) == 3  # 12 = 3 * 2 * 2; 5 and 4 leave a rest
    assert choose_ranks(cfg, 6, gpus=0, cores=2) == 6
    assert choose_ranks(some_config(batch_size=6, microbatch_size=6), None, 0, 8) == 1
    with pytest.raises(ValueError, match="5 ranks"):
        choose_ranks(cfg, 5, gpus=0, cores=8)
    with pytest.raises(ValueError, match="--num-gpus 3: this machine has 2"):
        choose_ranks(cfg, 3, gpus=2, cores=8)


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    command = stage_command(
        "reward", ["r/config.yaml"], 2, 0, Launch(master_port=1234), True, "abc"
    )
    assert Path(command[0]).name == "deepspeed"
    assert command[1:5] == ["--num_gpus", "2", "--master_port", "1234"]
    assert command[5:7] == ["--log_level", "error"]
    assert Path(command[7]).is_file() and Path(command[7]).name == "train_rm.py"
    assert command[8:] == ["r/config.yaml", "--run-lock", "abc", "--resume"]
    ports = {stage_command("sft", ["c"], 1, 0, Launch(), False, "")[4] for _ in range(3)}
    assert all(1024 <= int(port) <= 65535 for port in ports)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,2")
    command = stage_command("sft", ["c"], 2, 3, Launch(), False, "")
    assert command[1:3] == ["--include", "localhost:3,1"]
    hosts = tmp_path / "hosts"
    hosts.write_text("# two\na slots=4\n\nb slots=8\n")
    assert hostfile_slots(hosts) == [4, 8]
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    command = stage_command("sft", ["c"], 8, 0, Launch(hostfile=hosts), False, "")
    assert command[1:3] == ["--hostfile", str(hosts)] and "--num_gpus" not in command
    assert command[3:] == ["--log_level", "error", command[-2], "c"]
    one = Launch(hostfile=hosts, node_rank=1, master_addr="a", master_port=1234)
    command = stage_command("sft", ["c", "seed=1"], 8, 0, one, False, "")
    assert command[3:10] == [
        *("--master_addr", "a", "--no_ssh", "--node_rank", "1", "--master_port", "1234")
    ]
    assert command[-2:] == ["c", "seed=1"]
    assert one.arguments[-4:] == ["--node-rank", "1", "--master-addr", "a"]
    assert Launch(hostfile=hosts).leads and not one.leads
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="pdsh, which is not installed here"):
        stage_command("sft", ["c"], 8, 0, Launch(hostfile=hosts), False, "")
    with pytest.raises(ValueError, match="--node-rank needs --hostfile and --master-addr"):
        Launch(hostfile=hosts, node_rank=0)
    with pytest.raises(ValueError, match=r"--node-rank 2: .* names 2 machines, which are 0 to 1"):
        Launch(hostfile=hosts, node_rank=2, master_addr="a")
    with pytest.raises(ValueError, match="--master-addr is for several machines"):
        Launch(master_addr="a")
    hosts.write_text("a slots=4\nb 8\n")
    with pytest.raises(ValueError, match="line 2: 'b 8'"):
        hostfile_slots(hosts)
    with pytest.raises(ValueError, match="no such file"):
        Launch(hostfile=tmp_path / "absent")


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    environment = launcher.stage_environment(2, 8, cpu_only=True)
    assert environment["OMP_NUM_THREADS"] == "4"
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in launcher.stage_environment(2, 8, cpu_only=False)
    assert environment["PATH"] == f"{Path(PYTHON).parent}:/bin"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launcher.stage_environment(4, 2, cpu_only=True)["OMP_NUM_THREADS"] == "3"


def never() -> bool:
    return False


def test_exit_codes() -> None:
    assert run_to_end([PYTHON, "-c", "raise SystemExit(5)"], os.environ, never) == 5
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_to_end([PYTHON, "-c", kill], os.environ, never) == 128 + 9


def test_no_process_outlives_a_failed_command(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(pid_file)!r}, "w").write(str(child.pid))
        sys.exit(4)
    """
    assert run_to_end([PYTHON, "-c", textwrap.dedent(code)], os.environ, never) == 4
    assert gone([int(pid_file.read_text())], seconds=5)


@pytest.mark.parametrize(
    ("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_every_process(tmp_path: Path, signum: int, exit_code: int) -> None:
    pid_file = tmp_path / "pid"
    child = f"""
        import os, signal, subprocess, sys, time
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(pid_file)!r} + ".tmp", "w").write(f"{{os.getpid()}} {{grandchild.pid}}")
        os.rename({str(pid_file)!r} + ".tmp", {str(pid_file)!r})
        time.sleep(60)
    """
    parent = f"""
        import os, signal, sys
        from trainers.stages.processes import run_to_end
        # the tests may run under nohup, or in the background
        signal.signal({int(signum)}, signal.{"default_int_handler" if signum == 2 else "SIG_DFL"})
        try:
            run_to_end([sys.executable, "-c", {textwrap.dedent(child)!r}], os.environ, bool)
        except KeyboardInterrupt:
            sys.exit(130)
    """
    process = subprocess.Popen([PYTHON, "-c", textwrap.dedent(parent)])
    deadline = time.monotonic() + 30
    while not pid_file.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    assert process.wait(timeout=30) == exit_code
    assert gone(map(int, pid_file.read_text().split()), seconds=5)


def test_signal_handlers_come_back() -> None:
    before: Any = signal.getsignal(signal.SIGINT)
    run_to_end([PYTHON, "-c", ""], os.environ, never)
    assert signal.getsignal(signal.SIGINT) is before


def test_every_stage_has_its_script() -> None:
    assert [launcher.script_path(stage).name for stage in STAGES] == [
        "train_sft.py",
        "train_rm.py",
        "train_ppo.py",
    ]


def test_finishing_an_interrupted_stage_at_a_checkpoint(
    config: str, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(pipeline, "run_pipeline", lambda *a, **k: calls.append((*a, k)))
    dump_config(load_config(config), run.config)
    with pytest.raises(ValueError, match="no stage is interrupted"):
        pipeline.finish_run(run.root, None)
    for step in (3, 17):
        (run.checkpoints("ppo") / f"step-{step}").mkdir(parents=True)
    for given, expected in ((None, 17), (17, 17), (3, 3)):
        pipeline.finish_run(run.root, given)
        path, overrides, options = calls.pop()
        assert path == str(run.config) and overrides[1] == f"ppo.steps={expected}"
        assert options == {"resume": True, "only": ["ppo"]}
    with pytest.raises(ValueError, match=r"cannot be finished at step 5: .* of steps 3, 17"):
        pipeline.finish_run(run.root, 5)


@pytest.mark.parametrize("stage", STAGES)
def test_finishing_a_run_does_not_run_the_code_that_its_config_trusts(
    config: str,
    run: RunFolder,
    stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(pipeline, "run_pipeline", lambda *_, only, **__: calls.extend(only))
    dump_config(load_config(config, ["backbone.trust_remote_code=true"]), run.config)
    (run.checkpoints(stage) / "step-3").mkdir(parents=True)
    assert cli.main(["finish", str(run.root)]) == 2 and calls == []
    error = capsys.readouterr().err
    assert str(run.config) in error and "give --trust-remote-code" in error
    assert cli.main(["finish", str(run.root), "--trust-remote-code"]) == 0 and calls == [stage]
