"""README.md of an exported folder: its contents, origin and use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from chatllama import __version__
from chatllama.config.schema import Config
from chatllama.config.sources import DataSource
from chatllama.reporting.summary import read_summary, result_table
from chatllama.runs.folder import RunFolder, Stage, read_lineage
from chatllama.text.chat_format import default_system

Kind = Literal["adapter", "merged", "reward", "reward-merged", "gguf"]
TITLES: dict[Kind, str] = {
    "adapter": "LoRA adapter",
    "merged": "merged model",
    "reward": "reward model (LoRA adapter)",
    "reward-merged": "reward model",
    "gguf": "GGUF files",
}
_SCORE = """\
The score of a conversation is read at its last token that is no padding, which must be the end of
the assistant's turn: cut what the chat template writes after it, such as a line break. Padding is
token {pad}, never the end of a turn."""
_LOADING: dict[Kind, str] = {
    "adapter": """\
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```

    vllm serve {base} --enable-lora --max-lora-rank {rank} \\
        --lora-modules policy=THIS_FOLDER --chat-template THIS_FOLDER/chat_template.jinja""",
    "merged": """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
```""",
    "reward": """\
```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained(
    "{base}", num_labels=1, pad_token_id={pad}
)
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

"""
    + _SCORE,
    "reward-merged": """\
```python
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained("THIS_FOLDER")
```

"""
    + _SCORE,
    "gguf": """\
    llama-cli -m model.gguf --jinja
    ollama create NAME -f Modelfile

`adapter.gguf`, where it is there, is the adapter alone, for a GGUF of the base:
`llama-cli -m BASE.gguf --lora adapter.gguf`.""",
}
# vLLM reserves room for one of these.
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def model_card(
    kind: Kind,
    run: RunFolder,
    cfg: Config,
    *,
    role: str,
    base: str,
    rank: int | None,
    pad_id: int,
    checks: Mapping[str, float],
    example: str,
    notes: list[str],
) -> str:
    """The page. `rank` is an adapter's, `checks` are the gate's numbers, `example` is a prompt."""
    room = next((r for r in _VLLM_RANKS if rank and r >= rank), rank)
    library = "peft" if kind in ("adapter", "reward") else "transformers"
    front = [f"library_name: {library}", "tags: [chatllama, llama, rlhf, lora]"]
    if cfg.backbone.path is not None and not Path(cfg.backbone.path).is_dir():
        front.insert(0, f"base_model: {base}")
    lines = ["---", *front, "---", "", f"# {run.root.resolve().name}: {role}, {TITLES[kind]}", ""]
    lines += [_LOADING[kind].format(base=base, rank=room, pad=pad_id), ""]
    lines += [f"- {note}" for note in notes]
    lines += ["", "## Lineage", "", *_lineage(run, cfg, base, rank), ""]
    lines += ["## Measured", "", *_metrics(run), ""]
    lines += ["## Chat template", "", *_chat(cfg, example), ""]
    if checks:
        lines += ["## Checked", "", "A fresh process with plain transformers found, against the"]
        lines += ["run's own computation:", ""]
        lines += [f"- {name.replace('_', ' ')}: {value:.2g}" for name, value in checks.items()]
    return "\n".join(lines).rstrip() + "\n"


def portable(path: str) -> str:
    """A hub id or relative path as it is; of an absolute path its last part."""
    return Path(path).name if Path(path).is_absolute() else path


def _lineage(run: RunFolder, cfg: Config, base: str, rank: int | None) -> list[str]:
    revision = f", revision {cfg.backbone.revision}" if cfg.backbone.revision else ""
    records = read_lineage(run)
    lines = [f"- base: {base}{revision} ({cfg.backbone.dtype})"]
    hashes = {record["base"]["fingerprint"] for record in records.values()} - {None}
    lines += [f"    - fingerprint of its weights: {each}" for each in sorted(hashes)]
    lines.append(f"- seed: {cfg.seed}")
    if rank is not None:
        lora = cfg.adapter_lora
        lines.append(f"- adapter: LoRA rank {rank}, alpha {lora.alpha:g}, {lora.target_modules}")
    sections: dict[Stage, Any] = {"sft": cfg.sft, "reward": cfg.reward, "ppo": cfg.ppo}
    for stage, section in sections.items():
        if not run.result(stage).is_file():
            continue
        record = records.get(stage, {})
        numbers = run.read_result(stage)
        sources = ", ".join(_source(source) for source in section.data)
        more = f", KL coefficient {cfg.ppo.kl_coef:g}" if stage == "ppo" else ""
        lines.append(
            f"- {stage}: {numbers.get('steps', 0):g} steps, learning rate "
            f"{section.learning_rate:g}{more}, data {sources or 'none named'}"
        )
        if record:
            code = "chatllama {version} ({source})".format(**record["code"])
            lines.append(f"    - {record['begun'][:10]}, {code}")
        lines += [
            f"    - {portable(name)}: SHA-256 {entry['sha256']}"
            for name, entry in record.get("data", {}).items()
            if entry["sha256"] is not None
        ]
    packages = next((records[stage]["packages"] for stage in reversed(records)), {})
    if packages:
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        lines.append(f"- trained with {versions}")
    return [*lines, f"- exported with chatllama {__version__}"]


def _source(source: DataSource) -> str:
    return portable(source.path) + (f" ({source.subset})" if source.subset else "")


def _metrics(run: RunFolder) -> list[str]:
    if not run.summary.is_file():
        return ["The run has not been evaluated."]
    heads, rows = result_table(read_summary(run))
    if not rows:
        return ["The run has no evaluation of answers."]
    table = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return ["Held-out prompts of the run:", "", *table, *(f"| {' | '.join(r)} |" for r in rows)]


def _chat(cfg: Config, example: str) -> list[str]:
    system = default_system(cfg.chat)
    shown = f"System prompt: {system!r}." if system else "No system prompt."
    about = f"Layout `{cfg.chat.template}`, in `chat_template.jinja`. {shown} A prompt as text:"
    return [about, "", "```", example, "```"]
