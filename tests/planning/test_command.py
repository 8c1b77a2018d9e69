import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from chatllama import cli
from chatllama.config.loader import load_config
from chatllama.config.schema import Config
from chatllama.planning import rates
from chatllama.planning.hardware import GB, GPUS, OVERHEAD, parse_memory
from chatllama.planning.memory import Place, plan_memory
from chatllama.planning.rates import MeasuredRates
from chatllama.planning.shape import ModelShape
from chatllama.planning.source import find_shape
from chatllama.planning.totals import disk_bytes, stage_work
from chatllama.planning.verdict import judge, remedies, suggest, with_settings
from chatllama.runs.folder import STAGES, Stage
from chatllama.runtime.command_line import duration

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SEVEN = str(CONFIGS / "llama-7b-24gb.yaml")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["plan", *words]) == 0
    return capsys.readouterr().out


def test_it_loads_no_torch_and_answers_at_once() -> None:
    code = (
        "import sys; from chatllama.cli import main; "
        f"main(['plan', {SEVEN!r}, '--gpu', 'h100', '--suggest']); "
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "suggested: " in done.stdout, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 5


@pytest.mark.parametrize(
    "name", ["quickstart", "llama-7b-24gb", "llama-7b-nf4-12gb", "llama-13b-8gpu-zero2"]
)
def test_shipped_configs_have_plans(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(CONFIGS / f"{name}.yaml"))
    for stage in STAGES:
        assert f"\n{stage}: peak " in text
    assert "FITS" not in text  # no memory was named: no verdict


def test_each_role_and_phase_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, SEVEN, "--gpu-memory", "24GB", "--gpus", "1")
    # 6.738e9 parameters in bfloat16; adapters of 39,976,960 float32 numbers
    assert "backbone, bfloat16 13.5 GB" in text
    for role in ("reference", "policy", "reward", "value"):
        assert f"    {role:<16}" in text
    assert "adapter 0.16 GB, AdamW 0.32 GB, optimizer's own copy 0.16 GB" in text
    # 8 rows x 1,024 columns x 32 layers x 2 x 4,096 x 2 bytes
    assert "KV cache 4.29 GB" in text
    assert text.count(": FITS") == 3
    assert "16 x microbatch 2 x 1 ranks; 4 epochs = 8 optimizer steps a step, 2,400 in all" in text


def test_a_reward_model_of_its_own_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards = f"ppo.rewards=[{{model: {tmp_path}}}, {{model: nobody/no-such-model}}]"
    text = shown(capsys, SEVEN, rewards, "--gpu-memory", "24GB")
    assert f"ppo.rewards: {tmp_path} is not on this machine and not counted" in text
    for i, size in enumerate((10**9, 2 * 10**9)):
        with (tmp_path / f"model-{i}.safetensors").open("wb") as file:
            file.truncate(size)  # takes no room on the disk
    text = shown(capsys, SEVEN, rewards, "--gpu-memory", "24GB")
    assert f"weights of {tmp_path} 3.00 GB" in text and f"{tmp_path} is not" not in text
    assert "ppo.rewards: nobody/no-such-model is not on this machine" in text


def test_what_does_not_fit_names_keys_and_their_price(capsys: pytest.CaptureFixture[str]) -> None:
    words = (SEVEN, "backbone.gradient_checkpointing=false", "sft.microbatch_size=8")
    text = shown(capsys, *words, "--gpu", "rtx4090", "--suggest")
    assert "OUT OF MEMORY" in text
    assert "turn backbone.gradient_checkpointing=true: " in text
    assert "suggested: backbone.gradient_checkpointing=true" in text


def test_time_and_cost_come_from_a_rate_only(capsys: pytest.CaptureFixture[str]) -> None:
    words = (SEVEN, "sft.steps=100", "--gpu", "h100", "--price", "3")
    text = shown(capsys, *words)
    assert text.count("time: not measured on this hardware") == 2  # ppo too; reward has no steps
    assert "steps depend on the data: give --examples reward=N" in text
    assert "by the data sheet (roofline bound): no less than " in text
    # 100 steps x 64 rows x 1,024 tokens at 6,553.6 a second: 1,000 s, at 3 an hour
    text = shown(capsys, *words, "--rate", "sft=6553.6", "--examples", "reward=6400")
    assert "16 min 40 s at 6,554 tokens per second (given), 0.83 at 3 a GPU hour" in text
    assert "100 steps, at most 9,830,400 tokens" in text  # 6,400 pairs, 2 x 768 tokens each


def row(machine: str = "h100", size: float = 1.0, dtype: str = "bfloat16") -> MeasuredRates:
    parameters = round(6_738_415_616 * size)
    return MeasuredRates(
        "2026-01-02", "a machine", machine, parameters, dtype, 1000, 2000, 100, 4000, 1500
    )


def test_hours_come_from_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [row("b200"), row(dtype="nf4"), row(size=0.4), row(size=4.1), row(rates.CPU)]
    words = (SEVEN, "sft.steps=10", "ppo.steps=3", "--gpu", "H100")
    for rows, factor in (([*others, row()], 1.0), ([others[2], others[3]], 2.5)):
        monkeypatch.setattr(rates, "MEASURED", tuple(rows))
        text = shown(capsys, *words)
        # 10 steps x 64 rows x 1,024 tokens at 1,000 a second
        assert f"{duration(655.36 * factor)} at {1000 / factor:,.0f} tokens per second" in text
        # 3 x 64 responses of 512 tokens at 100; 4 roles read 1,024 tokens at 4,000, and two trunks
        # are trained on them 4 times at 1,500
        seconds = 3 * 64 * (512 / 100 + 4 * 1024 / 4000 + 8 * 1024 / 1500)
        assert f"{duration(seconds * factor)} at " in text
        assert "(measured 2026-01-02 on a machine" in text
    for few in (others[:2], others[3:4], others[4:]):
        monkeypatch.setattr(rates, "MEASURED", tuple(few))
        assert "time: not measured on this hardware" in shown(capsys, *words)
    assert "on a machine" in shown(capsys, *words[:3])  # without a GPU: a CPU
    assert "on a machine" not in shown(capsys, *words[:3], "--gpu-memory", "24GB")
    monkeypatch.setattr(rates, "MEASURED", (row(),))
    given = shown(capsys, *words, "--rate", "sft=65536")
    assert "10 s at 65,536 tokens per second (given)" in given


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--nodes", "-1"], "--nodes -1: must be at least 1"),
        (["--gpu", "gtx9"], "--gpu 'gtx9' is not known here; known are"),
        (["--gpu-memory", "much"], "--gpu-memory 'much': give a size such as 24GB"),
        (["--gpu-memory", "0GB"], "--gpu-memory '0GB': give a size"),
        (["--suggest"], "--suggest needs the GPU's memory"),
        (["--rate", "sft"], "--rate 'sft': give sft=N, reward=N, ppo=N"),
        (["--rate", "dpo=3"], "--rate 'dpo=3': give"),
        (["--rate", "sft=0"], "N above 0"),
        (["--rate", "sft=nan"], "N above 0"),
        (["--examples", "sft=1", "--examples", "sft=2"], "each once"),
        (["--price", "-1"], "--price -1.0: must be 0 or more"),
        (["--no-launcher", "--gpus", "2"], "--no-launcher: without the launcher there is one rank"),
        (["--gpus", "7"], "is not a multiple of"),
        (["--model-config", "/nowhere/config.json"], "/nowhere/config.json cannot be read"),
        (["lora.target_modules=[c_attn]"], "c_attn"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", SEVEN, *words]) == 2
    found = capsys.readouterr()
    assert message in found.err and "Traceback" not in found.err and not found.out


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("80 GiB", 80 * 2**30), ("16", 16e9), ("500mb", 5e8)]
)
def test_sizes(text: str, size: float) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    ("peak", "verdict"),
    [(21.9, "FITS"), (22.5, "TIGHT"), (23.19, "TIGHT"), (23.3, "OUT OF MEMORY")],
)
def test_verdicts(peak: float, verdict: str) -> None:
    assert OVERHEAD == 0.8 * GB and judge(peak * GB, 24 * GB) == verdict


def seven(*overrides: str) -> tuple[Config, ModelShape]:
    cfg = load_config(SEVEN, overrides)
    return cfg, find_shape(cfg)[0]


@pytest.mark.parametrize("memory", [16 * GB, 24 * GB, 80 * GB])
@pytest.mark.parametrize("ranks", [1, 8])
def test_suggested_settings_fit_and_keep_the_batches(memory: float, ranks: int) -> None:
    cfg, shape = seven()
    found = suggest(cfg, shape, Place(ranks), memory)
    assert found is not None
    better = with_settings(cfg, found)
    assert better is not None
    for stage in STAGES:
        assert judge(plan_memory(better, shape, Place(ranks), stage).peak, memory) == "FITS"
    for stage in ("sft", "reward"):
        assert vars(better)[stage].batch_size == vars(cfg)[stage].batch_size
    assert better.ppo.minibatch_size == cfg.ppo.minibatch_size
    assert ("backbone.quantization" in found) == (memory == 16 * GB)
    # The next larger microbatch would not fit, unless it is the whole batch already.
    for stage in ("sft", "reward"):
        key, size = f"{stage}.microbatch_size", vars(better)[stage].microbatch_size
        larger = with_settings(better, {key: 2 * size})
        if larger is not None and 64 % (2 * size * ranks) == 0:
            peak = plan_memory(larger, shape, Place(ranks), stage).peak
            assert judge(peak, memory) != "FITS"


def test_nothing_is_suggested_for_what_cannot_fit() -> None:
    assert suggest(*seven(), Place(1), 4 * GB) is None


@pytest.mark.parametrize("stage", STAGES)
def test_remedies_lower_a_phase(stage: Stage) -> None:
    cfg, shape = seven("backbone.gradient_checkpointing=false")
    before = plan_memory(cfg, shape, Place(4), stage).peaks
    found = remedies(cfg, shape, Place(4), stage)
    keys = {remedy.key for remedy in found}
    assert {f"{stage}.microbatch_size", "backbone.gradient_checkpointing"} <= keys
    assert "backbone.quantization" in keys and "backbone.dtype" not in keys  # it is bfloat16
    assert all(remedy.lowered < before[remedy.phase] for remedy in found)


def test_remedies_look_at_what_does_not_fit() -> None:
    cfg, shape = seven("generation.batch_size=32")  # only the rollout is too large
    found = remedies(cfg, shape, Place(1), "ppo", 24 * GB)
    assert {remedy.phase for remedy in found} == {"rollout"}
    assert found[0].key == "generation.batch_size" and "ppo.microbatch_size" not in {
        remedy.key for remedy in found
    }


def test_shares_of_ranks() -> None:
    """Adapter of 100 numbers' state by ZeRO stage, from DeepSpeed's own description of them."""
    shape = ModelShape(8, 16, 1, 2, 2, 4, 11)
    cfg, _ = seven("lora.r=1")
    adapter = shape.adapter_parameters(cfg.adapter_lora)

    def held(stage: int, ranks: int) -> dict[str, float]:
        own = with_settings(cfg, {"deepspeed.stage": stage})
        assert own is not None
        lines = plan_memory(own, shape, Place(ranks), "sft").resident
        return {line.name: line.bytes / adapter for line in lines if line.role == "policy"}

    assert held(0, 4) == {"adapter": 4, "AdamW": 8}
    assert held(2, 4)["AdamW"] == 2 and held(2, 4)["optimizer's own copy"] == 1
    kept = held(3, 4)
    assert kept.pop("adapter") == kept.pop("gradients") == kept.pop("optimizer's own copy") == 1
    assert kept == {"AdamW": 2}


def test_work_and_disk_by_hand() -> None:
    cfg, shape = seven("sft.steps=10", "reward.epochs=2", "ppo.steps=3")
    sft, ppo = stage_work(cfg, "sft", None), stage_work(cfg, "ppo", None)
    assert sft is not None and ppo is not None and stage_work(cfg, "reward", None) is None
    assert (sft.steps, sft.tokens) == (10, 10 * 64 * 1024)
    # policy and value, 4 epochs
    assert (ppo.tokens, ppo.sampled, ppo.trained) == (
        3 * 64 * 1024,
        3 * 64 * 512,
        3 * 64 * 1024 * 4 * 2,
    )
    adapter = 39_976_960
    disk = disk_bytes(cfg, shape)
    assert disk["backbone"] == 2 * 6_738_415_616
    assert disk["sft"] == adapter * (4 + 12 * 3)  # two checkpoints kept, one being written
    assert disk["ppo"] == 2 * adapter * (4 + 12 * 3)


def test_the_demos_model_comes_from_its_config(tmp_path: Path) -> None:
    cfg = load_config(CONFIGS / "quickstart.yaml", [f"run_dir={tmp_path}"])
    shape, where = find_shape(cfg)
    assert where == "backbone.from_scratch"
    # 704 x 128 tied; 3 layers of 4 x 128 x 128 + 3 x 128 x 352 + 256; the last norm
    assert shape.parameters == 704 * 128 + 3 * (4 * 128**2 + 3 * 128 * 352 + 256) + 128
    (tmp_path / "backbone").mkdir()
    content = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 9}
    content |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "backbone" / "config.json").write_text(json.dumps(content))
    assert find_shape(cfg)[0].vocab_size == 9  # once it is made, that counts


def test_the_docs_show_the_rates_that_there_are() -> None:
    text = (CONFIGS.parent / "docs" / "sizing.md").read_text(encoding="utf-8")
    for one in rates.MEASURED:
        cells = [one.date, f"{one.machine}: {one.found}", f"{one.parameters:,}", one.dtype]
        numbers = (one.sft, one.reward, one.sampling, one.scoring, one.update)
        assert f"| {' | '.join([*cells, *(f'{x:g}' for x in numbers)])} |" in text
    gpus = {one.machine for one in rates.MEASURED} - {rates.CPU}
    assert ("every GPU" in text) == (not gpus) and gpus <= GPUS.keys()
