"""A NaN or an infinity ends every stage, reaches no checkpoint, and can be gone on from."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatllama.config.model import BackboneSection
from chatllama.config.schema import Config
from chatllama.runs.checkpoints import NotFiniteError, newest_good, save_step, step_folders
from chatllama.runs.folder import RunFolder, Stage, read_lineage
from trainers.engine.sharded_state import state_of, write_shards
from trainers.stages.loop import train_steps, warn_of_warmup
from trainers.stages.not_finite import check_finite, dump_batch

EXPLODING = ["save_every=1", "save_total_limit=2", "learning_rate=1e38", "lr_schedule=constant",
             "warmup_steps=6", "max_grad_norm=1e30"]  # fmt: skip
MAINS = {"sft": "train_sft", "reward": "train_rm", "ppo": "train_ppo"}


def main(stage: Stage, command: list[str]) -> None:
    __import__(MAINS[stage]).main(command)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kills.run import prepare

    folder = tmp_path_factory.mktemp("not_finite")
    prepare(folder)
    for stage in ("sft", "reward"):
        main(stage, [str(folder / "config.yaml"), "sft.steps=2", "reward.steps=2"])
    return folder


def started(prepared: Path, folder: Path, stage: Stage) -> tuple[RunFolder, list[str]]:
    """A run whose earlier stages have finished, and its command line."""
    run = RunFolder(folder)
    for earlier in ("sft", "reward")[: list(MAINS).index(stage)]:
        shutil.copytree(prepared / "run" / earlier, run.stage(earlier))
    return run, [str(prepared / "config.yaml"), f"run_dir={run.root}"]


def test_a_bad_batch_is_dumped_with_its_rows(tmp_path: Path) -> None:
    scores = torch.tensor([0.0, math.nan, 1.0])
    logprobs = torch.zeros(3, 2)
    logprobs[2, 1] = -math.inf
    tokens = torch.arange(6).view(3, 2)
    path = dump_batch(
        tmp_path / "ppo", 12, {"scores": scores, "logprobs": logprobs, "tokens": tokens}
    )
    assert path == tmp_path / "ppo" / "bad_batch-step-12.pt"
    content = torch.load(path, weights_only=True)
    assert content["not_finite_rows"] == {"scores": [1], "logprobs": [2]}
    assert torch.equal(content["tokens"], tokens)
    assert torch.equal(content["logprobs"], logprobs)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_metric_that_is_not_finite_stops(tmp_path: Path, value: float) -> None:
    run = RunFolder(tmp_path)

    def batch() -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([[3, 4]])}

    check_finite(run, "sft", "sft", 3, {"sft/loss": 1.0, "sft/grad_norm": 1e30}, batch)
    assert not list(tmp_path.rglob("*.pt"))
    with pytest.raises(ValueError, match=rf"stopped at step 3: sft/grad_norm is {value}\. .*Lower"):
        check_finite(run, "sft", "sft", 3, {"sft/loss": 1.0, "sft/grad_norm": value}, batch)
    content = torch.load(run.stage("sft") / "bad_batch-step-3.pt", weights_only=True)
    assert content["tokens"].tolist() == [[3, 4]]
    with pytest.raises(ValueError, match=r"look for NaN in the weights that the stage starts from"):
        check_finite(run, "sft", "sft", 1, {"sft/loss": value}, batch)
    (run.checkpoints("sft") / "step-2").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"The weights of .*/step-2 are too large: remove it"):
        check_finite(run, "sft", "sft", 3, {"sft/loss": value}, batch, begun=2)


@pytest.mark.parametrize(
    ("warmup", "steps", "done", "words"),
    [(8, 8, 0, "just reaches"), (9, 8, 0, "never reaches"), (7, 8, 0, ""), (9, 8, 8, "")],
)
def test_a_warmup_as_long_as_the_stage_is_said(
    warmup: int, steps: int, done: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_warmup("reward", warmup, steps, done)
    said = capsys.readouterr().err
    assert (f"reward.warmup_steps {warmup} is not shorter" in said) == bool(words)
    assert words in said


@pytest.mark.parametrize(
    ("stage", "key", "name", "value"),
    [
        ("sft", "sft", "loss", math.nan),
        ("reward", "reward", "grad_norm", math.inf),
        ("sft", "backbone.from_scratch", "grad_norm", -math.inf),
    ],
)
def test_the_loop_of_stages_stops_before_it_saves(
    tmp_path: Path, stage: Stage, key: str, name: str, value: float,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, metric = RunFolder(tmp_path), f"{stage}/{name}"
    cfg = Config(run_dir=str(tmp_path), backbone=BackboneSection(path="m"))
    changes = {"warmup_steps": 4, "save_every": 1}
    section = (cfg.reward if stage == "reward" else cfg.sft).model_copy(update=changes)

    def save(folder: Path, state: object) -> list[str]:
        (folder / "a").write_text("x")
        return ["a"]

    def step(done: int, _: float) -> dict[str, float]:
        good = {f"{stage}/loss": 1.0, f"{stage}/grad_norm": 1.0}
        return good | ({metric: value} if done == 2 else {})

    with pytest.raises(ValueError, match=rf"step 3: {metric} is {value}.*Lower {key}\.learning_ra"):
        train_steps(
            cfg, section, run, stage, cast(Any, SimpleNamespace(save=save)),
            cast(Any, SimpleNamespace(log=lambda *_: None, phase=None)), 4, seed=0, resume=False,
            optimizer_step=step, evaluate=dict, batch=lambda done: {"step": torch.tensor([done])},
            interrupted=None if "." in key else run,
        )  # fmt: skip
    assert newest_good(run.checkpoints(stage))[0].name == "step-2"
    assert torch.load(run.stage(stage) / "bad_batch-step-3.pt")["step"].tolist() == [2]
    assert f"{key}.warmup_steps 4 is not shorter" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["value", "exp_avg", "exp_avg_sq"])
def test_weights_and_moments_that_are_not_finite_reach_no_checkpoint(
    tmp_path: Path, kind: str, value: float
) -> None:
    run, model = RunFolder(tmp_path), torch.nn.Linear(2, 2)
    layout = {"ranks": 1, "zero_stage": None, "microbatch_size": 2}
    optimizer = torch.optim.AdamW(model.parameters())

    def save(step: int) -> None:
        def write(folder: Path) -> None:
            write_shards(folder, model, optimizer)

        save_step(run, "ppo", step, 2, layout, write)

    model(torch.ones(2)).sum().backward()
    optimizer.step()
    save(1)
    held = {"value": model.weight.data, **state_of(model.weight, optimizer)}
    held[kind][1, 0] = value
    words = rf"stopped after step 2: {kind} of weight holds NaN or infinity.*step-1 is as it was"
    with pytest.raises(ValueError, match=words) as caught:
        save(2)
    assert isinstance(caught.value.__cause__, NotFiniteError)
    assert newest_good(run.checkpoints("ppo"))[0].name == "step-1"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_that_explodes_stops_at_once(prepared: Path, tmp_path: Path, stage: Stage) -> None:
    run, command = started(prepared, tmp_path / "run", stage)
    with pytest.raises(ValueError, match=r"stopped a\w+ step [12]\b"):
        main(stage, [*command, f"{stage}.steps=8", *(f"{stage}.{each}" for each in EXPLODING)])
    assert not run.result(stage).is_file()
    assert list(run.stage(stage).glob("bad_batch-step-[12].pt"))
    assert_finite(run, stage)


def assert_finite(run: RunFolder, stage: Stage) -> None:
    for file in run.checkpoints(stage).glob("step-*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_it_goes_on_from_the_last_good_checkpoint_with_another_learning_rate(
    prepared: Path, tmp_path: Path, stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__(f"trainers.{stage}.train", fromlist=["train"])
    original = module.optimizer_step
    run, command = started(prepared, tmp_path / "run", stage)
    command += [f"{stage}.lr_schedule=constant", f"{stage}.warmup_steps=0", "--resume"]
    calls: list[int] = []

    def interrupted(*args: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "optimizer_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(stage, command)
    exploding = [f"{stage}.learning_rate=3e37", f"{stage}.max_grad_norm=1e30"]
    with pytest.raises(ValueError, match=r"stopped at step 5: .*step-4 with --resume"):
        main(stage, [*command, *exploding])
    assert [path.name for path in step_folders(run.checkpoints(stage))] == ["step-3", "step-4"]
    assert_finite(run, stage)
    with pytest.raises(ValueError, match=r"stopped at step 5: .*step-4 are too large: remove it"):
        main(stage, command)
    shutil.rmtree(run.checkpoints(stage) / "step-4")
    main(stage, command)
    assert run.read_result(stage)["steps"] == 8
    there, back = read_lineage(run)[stage]["changed"]
    assert there[0].endswith("before, 3e+37 now") and back[0].startswith(there[0].split(":")[0])
    assert len(there) == len(back) == 2


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_that_is_not_finite_stops_at_step_1(
    prepared: Path, tmp_path: Path, value: float
) -> None:
    base = tmp_path / "base"
    shutil.copytree(prepared / "base", base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][0, 0] = value
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    run, command = started(prepared, tmp_path / "run", "sft")
    with pytest.raises(ValueError, match=r"stopped at step 1: sft/loss is nan.* holds the batch"):
        main("sft", [*command, f"backbone.path={base}"])
    assert not step_folders(run.checkpoints("sft")) and not run.sft_adapter.exists()
    content = torch.load(run.stage("sft") / "bad_batch-step-1.pt", weights_only=True)
    assert content["input_ids"].shape[0] == 4  # all of batch_size
    (line,) = [json.loads(line) for line in run.metrics("sft").open()]
    assert line["step"] == 1 and line["sft/loss"] is None


@pytest.mark.slow
def test_a_backbone_from_scratch_stops_too(prepared: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    text = prepared / "text.txt"
    text.write_text("\n\n".join((prepared / "sft.jsonl").read_text().splitlines()))
    scratch = (
        f"backbone={{dtype: float32, from_scratch: {{data: [{{path: {text}, format: text}}], "
        "vocab_size: 320, hidden_size: 32, intermediate_size: 64, num_layers: 2, steps: 8, "
        "batch_size: 8, microbatch_size: 2, max_length: 64, warmup_steps: 2, "
        "learning_rate: 1e36}}"
    )
    words = r"stopped at step \d: .*Lower backbone\.from_scratch\.learning_rate$"
    with pytest.raises(ValueError, match=words):
        main("sft", [str(prepared / "config.yaml"), scratch, f"run_dir={run.root}"])
    assert not run.backbone.exists()
    assert list((run.root / "pretraining" / "sft").glob("bad_batch-step-*.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["value", "exp_avg", "exp_avg_sq"])
def test_no_checkpoint_holds_a_tensor_that_is_not_finite(
    prepared: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.engine import sharded_state
    from trainers.sft import train

    run, command = started(prepared, tmp_path / "run", "sft")
    original = train.optimizer_step

    def spoiling(trained: train.Trained, step: int, factor: float) -> dict[str, float]:
        metrics = original(trained, step, factor)
        if step == 2:  # an update may overflow although loss and gradient norm are finite
            parameter = trained.engine.trained["matrices"][1]
            state = sharded_state.state_of(parameter, trained.engine.optimizer)
            {"value": parameter.data, **state}[name].view(-1)[3] = math.inf
        return metrics

    monkeypatch.setattr(train, "optimizer_step", spoiling)
    kept = run.checkpoints("sft") / "step-2"
    words = rf"stopped after step 3: {name} of .* holds NaN or infinity.*{kept} is as it was"
    with pytest.raises(ValueError, match=words):
        main("sft", [*command, "sft.steps=4"])
    assert newest_good(run.checkpoints("sft"))[0] == kept
