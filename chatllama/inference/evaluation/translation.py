"""`chatllama eval RUN --translation FILE`: a run translates, sacrebleu compares with references.

Answers are made, kept and continued as by `chatllama generate`; requests and references come from
`data/cli.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatllama.inference.folders import find_model, is_run
from chatllama.inference.options import GenerateOptions, check_options, complete
from chatllama.inference.prompt_files import Prompt
from chatllama.runtime.files import write_json
from chatllama.runtime.jsonl import read_lines

# Languages written without spaces between words, or joined ones: what sacrebleu counts as a word.
TOKENIZERS = {"zh": "zh", "ja": "char", "ko": "char", "th": "char", "km": "char"}
NUM_RESAMPLES = 1000


@dataclass(frozen=True)
class Translations:
    """Sentences to translate, with their references."""

    name: str
    """Of the set, for file names."""
    requests: Sequence[tuple[str, str, str]]
    """Place, request and reference of every sentence."""
    source: str
    """Language code."""
    target: str
    """Language code."""


def evaluate_translation(
    run_dir: Path, translations: Translations, options: GenerateOptions
) -> dict[str, Any]:
    """BLEU and chrF of a run's translations, printed and written beside the answers."""
    from chatllama.inference.batch import generate_command

    check_options(options)
    run, cfg = find_model(run_dir)
    if not is_run(run):
        raise ValueError(f"{run_dir}: eval keeps its answers in a run folder, and this is none")
    settings = complete(run, cfg, options)
    role = settings.role
    direction = f"{translations.source}-{translations.target}"
    parts = [translations.name, str(len(translations.requests)), direction, role]
    own = cfg.backbone
    forms = ((settings.dtype, own.dtype), (settings.quantization, own.quantization))
    # Answers from weights in another form than the config's stand beside its own.
    stem = ".".join([*parts, *(form for form, usual in forms if form != usual)])
    out = run.root / "translation" / f"{stem}.jsonl"
    out.parent.mkdir(exist_ok=True)
    prompts = [Prompt(i, text, where) for i, (where, text, _) in enumerate(translations.requests)]
    generate_command(run_dir, prompts, options, out)
    answers = read_lines(out)
    found = [answer["response"] for answer in answers]
    references = [reference for _, _, reference in translations.requests]
    result = {
        "role": role,
        "dtype": settings.dtype,
        "quantization": settings.quantization,
        "sentences": len(found),
        "unfinished": sum(not answer["finished"] for answer in answers),
        "empty": sum(not text for text in found),
        **translation_scores(found, references, translations.target),
    }
    write_json(out.with_suffix(".scores.json"), result)
    print("\n".join(_summary(result, direction)))
    print(f"written: {out.with_suffix('.scores.json')}")
    return result


def translation_scores(
    found: Sequence[str], references: Sequence[str], target: str
) -> dict[str, dict[str, Any]]:
    """Sacrebleu's BLEU and chrF of a corpus: score, half of its 95 % interval, and signature.

    The interval is a bootstrap over sentences; None where there is one sentence only. The code of
    the target language decides what counts as a word.
    """
    tokenizer = TOKENIZERS.get(target.replace("_", "-").split("-")[0].lower(), "13a")
    resamples = NUM_RESAMPLES if len(found) > 1 else 1
    scores: dict[str, dict[str, Any]] = {}
    for name, metric in _metrics(tokenizer).items():
        score = metric.corpus_score(list(found), [list(references)], n_bootstrap=resamples)
        signature = metric.get_signature().format()
        result = json.loads(score.format(width=4, signature=signature, is_json=True))
        scores[name] = {
            "score": score.score,
            "plus_minus": result.get("confidence_var"),
            "signature": signature,
        }
    return scores


def _metrics(tokenizer: str) -> dict[str, Any]:
    """BLEU and chrF whose scores are plain floats.

    Sacrebleu's are float32, but 0.0 of a resample without a match: then its bootstrap raises.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    class PlainFloats:
        def _compute_score_from_stats(self, stats: list[int]) -> Any:
            score: Any = super()._compute_score_from_stats(stats)  # pyright: ignore
            score.score = float(score.score)
            return score

    class Bleu(PlainFloats, BLEU): ...

    class Chrf(PlainFloats, CHRF): ...

    return {"bleu": Bleu(tokenize=tokenizer), "chrf": Chrf()}


def _summary(result: dict[str, Any], direction: str) -> list[str]:
    """The closing lines."""
    lines = [f"{result['sentences']} sentences {direction} by {result['role']}"]
    if result["unfinished"] or result["empty"]:
        lines[0] += f"; {result['unfinished']} cut by max_new_tokens, {result['empty']} empty"
    for name, label in (("bleu", "BLEU"), ("chrf", "chrF")):
        own = result[name]
        error = "" if own["plus_minus"] is None else f" +- {own['plus_minus']:.1f}"
        lines.append(f"{label} {own['score']:.1f}{error}  ({own['signature']})")
    return lines
