"""What tests/stages/test_family_stages.py runs in one process and, through the launcher, on two.

All families and stages in one process, since starting one takes longer.
"""

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_gguf import byte_level_tokenizer
from tiny_models import tiny_llama
from workers.resume_worker import train, zero_settings

from chatllama.runs.folder import STAGES, RunFolder
from chatllama.runtime import distributed
from chatllama.runtime.distributed import barrier, shut_down
from chatllama.runtime.jsonl import read_lines
from chatllama.text.tokenizer import save_tokenizer

FAMILIES = {
    "mistral": ("mistral, window", "smollm", "<|im_start|>"),
    "qwen2": ("qwen2, tied, window in the last layer", "qwen2", None),
    "qwen3": ("qwen3", "qwen2", None),
}
"""Form of the model, split of the tokenizer, its BOS."""
LARGE = "llama-3.2-1b"
TIMES = ("time", "seconds", "per_second", "memory")
"""Parts of the names of metrics that differ from run to run."""


def prepare(folder: Path) -> None:
    """Bases, data and configs."""
    words = ["the cat", "12 cats", "a king", "the 123", "singing", "the end"]
    rows = [
        {"prompt": f"Is {one} {two}?", "completion": f"{one}, {two}", "chosen": f"{one}!",
         "rejected": "no"} for one in words for two in words if one != two
    ]  # fmt: skip
    kept = {"sft": ("prompt", "completion"), "pairs": ("prompt", "chosen", "rejected")}
    for name, keys in (*kept.items(), ("prompts", ("prompt",))):
        lines = [json.dumps({key: row[key] for key in keys}) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(dict.fromkeys(lines)))
    for name, (form, split, bos) in FAMILIES.items():
        tokenizer = byte_level_tokenizer(folder / f"{name} words", split, bos)
        _write(folder, name, tiny_llama(300, form=form), tokenizer)


def prepare_large(folder: Path) -> None:
    """A Llama 3.2 1B of one layer: its widths, vocabulary, tied embeddings and rotary scaling."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=1,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=131072, rms_norm_eps=1e-5, dtype=torch.bfloat16,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = LlamaForCausalLM(config)
    torch.nn.Module.to(model, torch.bfloat16)  # half of the disk
    tokenizer = byte_level_tokenizer(folder / "words", "llama-bpe", "<|im_start|>", adds_bos=True)
    _write(folder, LARGE, model, tokenizer)


def _write(folder: Path, name: str, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(folder / name)
    save_tokenizer(tokenizer, folder / name)
    small = {"steps": 2, "warmup_steps": 0, "learning_rate": 1e-2, "save_every": 1}
    stage = {**small, "batch_size": 4, "microbatch_size": 2, "max_length": 64,
             "eval_fraction": 0.2}  # fmt: skip
    config = {
        "run_dir": "unused",
        "backbone": {"path": str(folder / name), "dtype": "float32"},
        "chat": {"template": "tokenizer"},
        "lora": {"r": 4, "alpha": 8.0},
        "tracking": {"report_to": [], "sample_every": 0},
        "generation": {"max_new_tokens": 6, "batch_size": 8},
        "evaluation": {"num_prompts": 2},
        "sft": {**stage, "data": [{"path": f"{folder}/sft.jsonl"}]},
        "reward": {**stage, "data": [{"path": f"{folder}/pairs.jsonl"}], "allow_weak": True},
        "ppo": {**small, "data": [{"path": f"{folder}/prompts.jsonl"}], "eval_fraction": 0.2,
                "max_prompt_length": 64, "rollout_batch_size": 4,
                "minibatch_size": 4, "microbatch_size": 2, "epochs": 2,
                "score_normalization_samples": 4},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(json.dumps(config))


def metrics(run: RunFolder) -> dict[str, list[dict[str, float]]]:
    """What every stage logged, without times and memory."""
    return {
        stage: [
            {k: v for k, v in line.items() if not any(part in k for part in TIMES)}
            for line in read_lines(run.metrics(stage))
        ]
        for stage in STAGES
        if run.metrics(stage).is_file()
    }


def run_stages(folder: Path, name: str, out: str, settings: Sequence[str] = ()) -> RunFolder:
    """All stages of a family into folder/OUT/NAME."""
    run = RunFolder(folder / out / name)
    for stage in STAGES:
        train(stage, [str(folder / f"{name}.yaml"), f"run_dir={run.root}", *settings])
    return run


def run_large(folder: Path, settings: Sequence[str]) -> None:
    """A step of SFT, and one of PPO against a function; no reward model."""
    function = ["ppo.advantage=rloo", "ppo.samples_per_prompt=2", "ppo.score_normalization=none",
                "ppo.rewards=[{function: 'ppo_runs:count_words'}]", "sft.steps=1", "ppo.steps=1",
                "evaluation.num_prompts=1", "sft.save_every=0", "ppo.save_every=0"]  # fmt: skip
    run_dir = f"run_dir={folder / 'zero-3' / LARGE}"
    for stage in ("sft", "ppo"):
        train(stage, [str(folder / f"{LARGE}.yaml"), run_dir, *settings, *function])
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    distributed.shut_down = barrier  # a process group cannot be made twice
    for zero in (2, 3):
        for name in FAMILIES:
            run_stages(folder, name, f"zero-{zero}", zero_settings(zero))
    if (folder / f"{LARGE}.yaml").is_file():
        run_large(folder, zero_settings(3))
    shut_down()


if __name__ == "__main__":
    main()
