"""`chatllama eval RUN --suite NAME`: every role on every task, kept as it comes, then a table."""

import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from chatllama.config.schema import Config, with_weights
from chatllama.inference.evaluation.cli import SuiteOptions
from chatllama.inference.folders import find_model, is_run
from chatllama.inference.options import ADAPTER_WEIGHTS, GenerationRole, digest, find_role
from chatllama.runs.folder import RunFolder
from chatllama.runtime.command_line import tell
from chatllama.runtime.digests import file_hashes
from chatllama.runtime.files import write_json
from chatllama.runtime.json_files import read_json

Results = dict[str, dict[str, float]]
"""Task -> metric -> value."""
COUNTS = ("items", "truncated")
"""Keys of a task's results that are no metrics."""
ROLES: tuple[GenerationRole, ...] = ("base", "sft", "policy")


def evaluate_suite(place: str | Path, options: SuiteOptions) -> dict[str, Results]:
    """Measures the roles, prints the table and writes RUN/benchmarks/SUITE/ROLE.json.

    Of a plain model or an adapter alone they go to runs/NAME/benchmarks.

    A task that is there already, measured under the same settings, is not measured again.

    Returns:
        Role -> task -> metrics.

    Raises:
        ValueError: lm-eval is not installed, or a suite, role or data set that is not there.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's own bars, one for each task
    try:
        from chatllama.inference.evaluation import harness
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ValueError("--suite needs lm-eval: pip install 'chatllama[eval]'") from error
    from chatllama.inference.answerer import Answerer
    from chatllama.inference.evaluation.suites import find_suite, local_records
    from chatllama.inference.load import load_run

    assert options.suite is not None
    run, cfg = find_model(place)
    cfg = with_weights(cfg, options.dtype, options.quantization)
    suite = find_suite(options.suite, options.shots)
    adapters = dict(find_role(run, cfg, role) for role in roles_of(run, cfg, options.role))
    groups = harness.find_tasks(suite.tasks)
    tasks = [task for inside in groups.values() for task in inside]
    if options.data is not None:
        for task in tasks:  # all of them, before anything heavy
            local_records(task, options.data)
    folder = place_of(run, options.suite)
    answerer: Answerer | None = None
    found: dict[str, Results] = {}
    for role, adapter in adapters.items():
        own = settings(options, cfg, adapter)
        own |= {"lm_eval": version("lm-eval"), "shots": suite.shots}
        path = folder / f"{role}.json"
        found[role] = kept(path, own)
        for number, task in enumerate(tasks, 1):
            if task in found[role]:
                continue
            if answerer is None:  # loaded once, and only if something is to be measured
                names = [acting_as_role(each) for each in adapters]
                answerer = Answerer(load_run(run, cfg, names, options.trust_remote_code), names[0])
            answerer.acting = acting_as_role(role)
            partial = folder / f"{role}.{task}.{digest(own)}.jsonl"
            partial.parent.mkdir(parents=True, exist_ok=True)
            lm = harness.RoleLM(answerer, options.batch_size or cfg.generation.batch_size, partial)
            found[role][task] = harness.measure(lm, task, suite.shots, options.limit, options.data)
            write_json(path, {"settings": own, "tasks": found[role]})
            partial.unlink(missing_ok=True)
            tell(f"{role}: {task} ({number} of {len(tasks)}): {_shown(found[role][task])}")
    print("\n".join(_table(found, groups, suite.published)))
    print(f"written: {folder}")
    return found


def place_of(run: RunFolder, suite: str) -> Path:
    """Where a suite's results go: into the run, or of a plain model to runs/NAME."""
    root = run.root if is_run(run) else Path("runs") / run.root.name
    return root / "benchmarks" / suite.replace(",", "+")


def acting_as_role(role: GenerationRole) -> Any:
    """The role's name among the loaded adapters."""
    return "reference" if role == "sft" else role


def roles_of(
    run: RunFolder, cfg: Config, wanted: GenerationRole | None
) -> Iterator[GenerationRole]:
    """The role that is asked for; by default those that the run has."""
    if wanted is not None:
        yield wanted
        return
    for role in ROLES:
        try:
            find_role(run, cfg, role)
        except ValueError:
            continue
        yield role


def settings(options: SuiteOptions, cfg: Config, adapter: Path | None) -> dict[str, Any]:
    """What the figures of any suite depend on."""
    weights = None
    if adapter is not None:
        weights = file_hashes([adapter / ADAPTER_WEIGHTS], fresh=False)[adapter / ADAPTER_WEIGHTS]
    return {
        "limit": options.limit,
        "data": str(options.data.resolve()) if options.data else None,
        "dtype": cfg.backbone.dtype,
        "quantization": cfg.backbone.quantization,
        "adapter": weights,
    }


def kept(path: Path, own: dict[str, Any]) -> Results:
    """Tasks that were measured before under the same settings."""
    if not path.is_file():
        return {}
    before = read_json(path)
    if before.get("settings") != own:
        tell(f"{path}: measured under other settings; done again")
        return {}
    return before["tasks"]


def pooled(results: Results, tasks: Sequence[str], metric: str) -> tuple[float, float] | None:
    """Mean over all items of several tasks, and its standard error; None without that metric.

    As lm-eval pools a group: the variance within tasks alone (its `pooled_sample_stderr`).
    """
    if not all(metric in results[task] for task in tasks):
        return None
    items = [results[task]["items"] for task in tasks]
    total = sum(items)
    mean = sum(results[task][metric] * n for task, n in zip(tasks, items, strict=True)) / total
    errors = [results[task].get(f"{metric}_stderr", math.nan) for task in tasks]
    if total == len(tasks):  # one item each has no deviation
        return mean, math.nan
    within = sum((n - 1) * error**2 * n for error, n in zip(errors, items, strict=True))
    return mean, math.sqrt(within / (total - len(tasks)) / total)


def _table(
    found: Mapping[str, Results],
    groups: Mapping[str, Sequence[str]],
    published: Mapping[str, Mapping[str, float]],
) -> Iterator[str]:
    """Percentages with standard errors: a row for each role, then what others have published."""
    columns: dict[str, Sequence[str]] = dict(groups)
    if len(groups) > 1 and any(len(tasks) > 1 for tasks in groups.values()):
        columns["average"] = [task for tasks in groups.values() for task in tasks]
    names = {name: name.removeprefix("mmlu_").removesuffix("_tasks") for name in columns}
    width = max(len(row) for row in ("published", *found, *published))
    for metric in _metrics(found, columns):
        yield f"{metric} (%)"
        yield _row("", names.values(), width)
        for role, results in found.items():
            cells = []
            for tasks in columns.values():
                value = pooled(results, tasks, metric)
                cells.append(
                    "-" if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"
                )
            yield _row(role, cells, width)
        if metric == "acc":
            for model, values in published.items():
                cells = [f"{values[n]:.1f}" if n in values else "-" for n in names.values()]
                yield _row(model, cells, width) + "  published"


def _metrics(found: Mapping[str, Results], columns: Mapping[str, Sequence[str]]) -> list[str]:
    """The metrics that some column has for every role."""
    names = {
        name: None
        for results in found.values()
        for metrics in results.values()
        for name in metrics
        if name not in COUNTS and not name.endswith("_stderr")
    }
    return list(names)


def _row(name: str, cells: Iterable[str], width: int) -> str:
    return f"{name:<{width}}  " + "  ".join(f"{cell:>15}" for cell in cells)


def _percent(value: float, error: float) -> str:
    return f"{100 * value:.1f} \N{PLUS-MINUS SIGN} {100 * error:.1f}"


def _shown(metrics: Mapping[str, float]) -> str:
    """Metrics of one task in one line."""
    shown = [
        f"{name} {_percent(value, metrics.get(f'{name}_stderr', math.nan))} %"
        for name, value in metrics.items()
        if name not in COUNTS and not name.endswith("_stderr")
    ]
    cut = f", {metrics['truncated']:.0f} choices cut on the left" if metrics["truncated"] else ""
    return ", ".join(shown) + f" of {metrics['items']:.0f} items{cut}"
