"""`chatllama export`: adapters and models of a run in the formats of other programs, checked.

Every folder is written beside its place, reopened by the export gate in a fresh process, and moved
there only if it passes.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from chatllama.config.schema import Config, with_weights
from chatllama.exporting import gate, templates
from chatllama.exporting.card import Kind, model_card, portable
from chatllama.exporting.cli import ExportOptions
from chatllama.exporting.gguf_writer import (
    check_gguf,
    context_length,
    write_adapter_gguf,
    write_model_gguf,
)
from chatllama.exporting.reference_outputs import CONVERSATIONS, ReferenceOutputs, reference_outputs
from chatllama.inference.load import load_run, reward_role
from chatllama.inference.options import find_role
from chatllama.model.adapters import SavedAdapter, load_adapter, save_adapter
from chatllama.model.families import family_of
from chatllama.model.roles import Role
from chatllama.model.weight_files import (
    MAX_FILE_BYTES,
    ModelFiles,
    chosen_dtype,
    dtype_name,
    local_folder,
    merged,
    open_model,
    write_model,
)
from chatllama.runs.folder import INFO, RunFolder, base_path
from chatllama.runtime.files import new_folder, write_json
from chatllama.text.chat_format import end_of_turn_ids

MODEL_FILE = "model.gguf"
BASE_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
GGUF_KEYS = ("attention_bias", "head_dim", "mlp_bias", "rope_parameters")
"""Keys of config.json that transformers does not read from every GGUF file, though it is there."""
MULTI_TURN_NOTE = (
    "Other programs put a space token before turns after the first that the model was not trained "
    "with (layout {}): a single question is exact, a longer conversation nearly."
)
NO_MODELFILE_NOTE = (
    "no Modelfile: Ollama cannot read the tokenizer's own chat template (Jinja), and no other "
    "layout writes the same: write its TEMPLATE by hand"
)
WINDOW_NOTE = (
    "gguf: llama.cpp computes no sliding window for this model: texts of more than {} tokens would "
    "be read as by another model, and that is the context length in the file"
)
NO_TEMPLATE_NOTE = (
    "With the base's own tokenizer files plain transformers gives other token ids than the model "
    "was trained on: take the tokenizer of this folder, which is exact."
)


@dataclass
class Exporter:
    """The export of one run; every folder that `write_*` leave in `out` has passed the gate."""

    run: RunFolder
    cfg: Config
    out: Path
    role: str
    adapter: SavedAdapter | None
    base: Path
    base_name: str
    config: LlamaConfig
    tokenizer: PreTrainedTokenizerFast
    reference: ReferenceOutputs
    dtype: torch.dtype
    """Of merged weights."""
    modelfile: str | None
    """For Ollama, beside GGUF files."""

    def write_adapter(self) -> None:
        """The role's adapter in PEFT's format."""
        assert self.adapter is not None
        state, lora = self.adapter.state, self.adapter.lora
        outputs = {name: getattr(self.reference, name) for name in ("logprobs", "base_logprobs")}
        info = self._info("adapter", **outputs)
        write = partial(save_adapter, state=state, lora=lora, info=info)
        self._publish("adapter", "adapter", write, rank=lora.r)

    def write_merged(self) -> None:
        """The model with the adapter added, as a plain Hugging Face folder."""

        def write(folder: Path) -> None:
            files = self._merged(self.adapter)
            self._write_model(folder, files.shapes, files.tensor, {})
            section = self.cfg.generation
            GenerationConfig(
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=end_of_turn_ids(self.tokenizer, self.cfg.chat),
                pad_token_id=self.tokenizer.pad_token_id,
                do_sample=True,
                temperature=section.temperature,
                top_k=section.top_k,
                top_p=section.top_p,
            ).save_pretrained(folder)
            write_json(folder / INFO, self._info("merged", logprobs=self.reference.logprobs))

        self._publish("merged", "merged", write, against=self.adapter is not None)

    def write_rewards(self, with_merged: bool) -> None:
        """Every member of the reward model; with `with_merged` also as classification models."""
        for number, source in enumerate(self.run.reward_members()):
            saved, suffix = load_adapter(source), f"-{number}" if number else ""
            scores = self.reference.scores[number]
            info = self._info("reward", scores=scores)
            write = partial(
                save_adapter, state=saved.state, lora=saved.lora, info=info, head=saved.head
            )
            self._publish("reward", f"reward{suffix}", write, rank=saved.lora.r)
            if with_merged:
                write = partial(self._write_classifier, saved=saved, scores=scores)
                self._publish("reward-merged", f"reward-merged{suffix}", write)

    def write_gguf(self) -> None:
        """GGUF files of the merged model and of the adapter, and an Ollama Modelfile."""
        name = f"{self.run.root.resolve().name}-{self.role}"
        tokenizer, chat, config = self.tokenizer, self.cfg.chat, self.config
        logprobs = self.reference.logprobs

        def write(folder: Path) -> None:
            model, template = folder / MODEL_FILE, templates.jinja_template(tokenizer, chat)
            files = self._merged(self.adapter)
            write_model_gguf(model, files, config, tokenizer, chat, template, name)
            if self.adapter is not None:
                write_adapter_gguf(folder / "adapter.gguf", self.adapter, config, name)
            if self.modelfile is not None:
                (folder / "Modelfile").write_text(self.modelfile, encoding="utf-8")
            own = {key: value for key, value in config.to_dict().items() if key in GGUF_KEYS}
            write_json(folder / INFO, self._info("gguf", config=own, logprobs=logprobs))

        self._publish("gguf", "gguf", write, opened=MODEL_FILE)

    def _merged(self, adapter: SavedAdapter | None) -> ModelFiles:
        return merged(open_model(self.base), adapter, self.dtype)

    def _write_model(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        tensor: Callable[[str], torch.Tensor],
        changes: dict[str, Any],
    ) -> None:
        write_model(folder, shapes, self.dtype, tensor, MAX_FILE_BYTES)
        # Scores are read at the last token that is no padding: it must not be the end of a turn.
        changes |= {"dtype": self.dtype, "pad_token_id": self.tokenizer.pad_token_id}
        kind = CONFIG_MAPPING[family_of(self.config).name]
        kind.from_dict(self.config.to_dict() | changes).save_pretrained(folder)

    def _write_classifier(self, folder: Path, saved: SavedAdapter, scores: list[float]) -> None:
        files, head = self._merged(saved), saved.head["weight"].to(self.dtype)
        shapes = {n: s for n, s in files.shapes.items() if not n.startswith("lm_head.")}
        shapes["score.weight"] = tuple(head.shape)
        changes = {
            "architectures": [f"{family_of(self.config).classes}ForSequenceClassification"],
            "id2label": {0: "score"},
            "label2id": {"score": 0},
        }

        def tensor(name: str) -> torch.Tensor:
            return head if name == "score.weight" else files.tensor(name)

        self._write_model(folder, shapes, tensor, changes)
        write_json(folder / INFO, self._info("reward-merged", scores=scores))

    def _info(self, kind: Kind, **outputs: Any) -> dict[str, Any]:
        is_merged = kind.endswith("merged")
        return {
            "base": self.base_name,
            "contract": self.reference.contract,
            "stage": "reward" if kind.startswith("reward") else self.role,
            "export": {
                "kind": kind,
                "dtype": dtype_name(self.dtype) if is_merged else self.cfg.backbone.dtype,
                "base": {key: getattr(self.config, key) for key in BASE_KEYS},
                "pad_token_id": self.tokenizer.pad_token_id,
                "ids": self.reference.ids,
                **outputs,
            },
        }

    def _publish(
        self,
        kind: Kind,
        name: str,
        write: Callable[[Path], None],
        *,
        rank: int | None = None,
        against: bool = False,
        opened: str = "",
    ) -> None:
        """Writes a folder, passes it (or `opened` in it) through the gate, moves it to its place.

        `rank` is an adapter's; `against` has the gate compare with the base and the adapter.
        """
        folder, template = self.out / name, templates.jinja_template(self.tokenizer, self.cfg.chat)
        with new_folder(folder) as beside:
            write(beside)
            if kind == "gguf":
                (beside / "chat_template.jinja").write_text(template, encoding="utf-8")
            else:
                templates.write_tokenizer(beside, self.tokenizer, self.cfg.chat)
            notes = self._add_conversations(beside, name, beside if rank is None else self.base)
            example = templates.as_text(self.tokenizer, CONVERSATIONS[0], template)
            card = partial(
                model_card, kind, self.run, self.cfg, role=self.role, base=self.base_name,
                rank=rank, pad_id=cast(int, self.tokenizer.pad_token_id), example=example,
                notes=notes,
            )  # fmt: skip
            (beside / "README.md").write_text(card(checks={}), encoding="utf-8")
            command: list[str | Path] = [beside / opened]
            if rank is not None or against:
                command += ["--base", self.base]
            if against:
                command += ["--adapter", self.out / "adapter"]
            checks = run_gate(command)
            (beside / "README.md").write_text(card(checks=checks), encoding="utf-8")
        numbers = ", ".join(f"{n.replace('_', ' ')} {v:.2g}" for n, v in checks.items())
        print(f"{folder}: checked: {numbers}", flush=True)

    def _add_conversations(self, folder: Path, name: str, tokenizer_folder: Path) -> list[str]:
        """Records the conversations that plain transformers tokenises as we do; returns notes."""
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        kept: list[dict[str, Any]] = []
        notes = []
        if info["export"]["kind"] != "gguf":
            plain = AutoTokenizer.from_pretrained(tokenizer_folder)
            template = templates.jinja_template(self.tokenizer, self.cfg.chat)
            for messages, ids in zip(CONVERSATIONS, self.reference.rendered, strict=True):
                text = templates.as_text(plain, messages, template)
                if gate.same_tokens(plain, text, ids):
                    kept.append({"messages": messages, "ids": ids})
            if not kept or kept[0]["messages"] != CONVERSATIONS[0]:
                notes.append(NO_TEMPLATE_NOTE)
            elif len(kept) < len(CONVERSATIONS):
                notes.append(MULTI_TURN_NOTE.format(self.cfg.chat.template))
        info["export"]["conversations"] = kept
        write_json(folder / INFO, info)
        for note in notes:
            print(f"{name}: {note}")
        return notes


def export_run(run_dir: Path, options: ExportOptions, out: Path | None = None) -> Path:
    """Writes and checks the folders that the options name below `out` (default: RUN/export).

    Raises:
        ValueError: the run has no such role, an option does not fit it, or the gate refused.
    """
    run = RunFolder(run_dir)
    from chatllama.config.loader import load_config

    # The unquantised base is what others have, and what an adapter is merged into.
    cfg = with_weights(load_config(run.existing_config()), None, "none")
    role, adapter_folder = find_role(run, cfg, options.role)
    if adapter_folder is None and not (options.merged or options.gguf):
        raise ValueError(
            f"with `lora: null` SFT trained all weights: there is no adapter; {run.full_model} is "
            "a plain Hugging Face folder, and --merged or --gguf write it in other types"
        )
    if options.reward and not run.reward_adapter.is_dir():
        raise ValueError(f"--reward: {run.root} has no reward model")
    active: Role = "reference" if role == "sft" else role
    members = len(run.reward_members()) if options.reward else 0
    roles = [active, *(reward_role(number) for number in range(members))]
    loaded = load_run(run, cfg, roles, trust_remote_code=options.trust_remote_code)
    config, tokenizer = cast(LlamaConfig, loaded.model.llama.config), loaded.tokenizer
    ollama = checked_modelfile(cfg, config, tokenizer) if options.gguf else None
    reference = reference_outputs(loaded, active)
    del loaded
    path = base_path(cfg, run)
    base = local_folder(path, cfg.backbone.revision)
    adapter = load_adapter(adapter_folder) if adapter_folder is not None else None
    name, dtype = (
        options.base_name or portable(path),
        chosen_dtype(options.dtype, open_model(base).dtypes.values(), f"{base}"),
    )
    out = out or run.root / "export"
    exporter = Exporter(
        run, cfg, out, role, adapter, base, name, config, tokenizer, reference, dtype, ollama
    )
    if adapter is not None:
        exporter.write_adapter()
    if options.merged:
        exporter.write_merged()
    if options.reward:
        exporter.write_rewards(options.merged)
    if options.gguf:
        exporter.write_gguf()
    return out


def checked_modelfile(
    cfg: Config, config: LlamaConfig, tokenizer: PreTrainedTokenizerFast
) -> str | None:
    """The Modelfile beside a GGUF file, None (and a note) where no layout of ours fits.

    Raises:
        ValueError: no GGUF file of this model, or no such Modelfile, can be written.
    """
    check_gguf(config, tokenizer)
    if (most := context_length(config)) < config.max_position_embeddings:
        print(WINDOW_NOTE.format(most))
    if (layout := templates.own_layout(tokenizer, cfg.chat)) is None:
        print(NO_MODELFILE_NOTE)
        return None
    return templates.modelfile(
        tokenizer, layout, cfg.generation, MODEL_FILE, context_length(config)
    )


def run_gate(arguments: list[str | Path]) -> dict[str, float]:
    """The export gate's numbers, from a process of its own; ValueError says why it refused."""
    command = [sys.executable, "-I", gate.__file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ValueError(f"the export gate: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
