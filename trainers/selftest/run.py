"""`chatllama selftest`: every check in turn, as a table that says what was found and allowed."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Column, Table

from chatllama.runtime.gpu import choose_kernels
from chatllama.runtime.libraries import quiet_libraries
from trainers.selftest.convergence import Convergence, converge
from trainers.selftest.gradient_oracle import SETTINGS, Setting, check_gradient
from trainers.selftest.identities import (
    bradley_terry,
    gae_error,
    kl_errors,
    reinforce_error,
    sampler_distance,
    start_errors,
)
from trainers.selftest.rollback import rollback_errors
from trainers.selftest.world import Precision, World


@dataclass(frozen=True)
class Limits:
    """What rounding may do."""

    gradient: float
    """Relative error of gradients."""
    explained: float
    """Of the explained variance, absolute."""
    first_log_ratio: float
    """Nats, of log-probabilities of rollout and update."""
    logprob: float
    """Nats."""
    kl: float
    """Relative error of expected KL estimates."""


LIMITS: dict[Precision, Limits] = {
    # Float32 log-probabilities reach 5e-7 to 2e-6.
    "float32": Limits(1e-5, 1e-5, 0.0, 1e-4, 1e-5),
    # About twice the largest of worlds 1 to 5 on a CPU (docs/selftest.md).
    "bfloat16": Limits(0.1, 0.015, 0.1, 0.12, 0.015),
}
GAP_LIMIT = 0.95
"""Least share of the gap from J(pi_ref) to J* that training closes."""
ROLLBACK_LIMIT = 1e-6
SAMPLER_LIMIT = 1.3
BAYES_LIMIT = 0.01
CORRELATION_LIMIT = 0.97
WORLD_SEED = 1
"""Of the world of all checks but convergence, which makes a world per seed."""


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool
    found: str
    allowed: str
    seconds: float = 0.0


def selftest(seeds: Sequence[int], quick: bool = False, dtype: Precision = "float32") -> bool:
    """True when every check passes; prints what each found.

    Args:
        seeds: one training run each; `quick` leaves them out.
        dtype: of the backbone.
    """
    quiet_libraries()
    choose_kernels()
    torch.set_num_threads(1)  # the models are too small for more
    console, started = Console(), time.perf_counter()
    console.print("PPO against the closed form: every response of a tiny LLaMA is enumerated.")
    runs: list[Convergence] = []
    with tempfile.TemporaryDirectory(prefix="chatllama-selftest-") as folder, console.status(""):
        world = World.make(Path(folder) / "world", WORLD_SEED, dtype)
        checks = identities(world) + [gradient(world, setting) for setting in SETTINGS]
        console.print(_table(checks))
        for seed in () if quick else seeds:
            runs.append(converge(World.make(Path(folder) / f"seed-{seed}", seed, dtype)))
    if runs:
        console.print(_convergence_table(runs))
    failed = [check.name for check in checks if not check.passed]
    failed += [f"training, seed {run.seed}" for run in runs if not converged(run)]
    verdict = f"[bold red]FAILED: {'; '.join(failed)}[/]" if failed else "[green]all pass[/]"
    seconds = time.perf_counter() - started
    console.print(f"{len(checks) + len(runs)} checks in {seconds:.0f} s: {verdict}")
    return not failed


def gradient(world: World, setting: Setting) -> Check:
    """The gradient oracle in one setting."""
    started = time.perf_counter()
    outcome = check_gradient(world, setting)
    seconds = time.perf_counter() - started
    limits = LIMITS[world.dtype]
    found = f"{outcome.policy_error:.1e}"
    if outcome.value_error is not None:
        found += f", value {outcome.value_error:.1e}"
    if outcome.explained_error is not None:
        found += f", explained variance {outcome.explained_error:.1e}"
    if outcome.first_log_ratio:
        found += f", first log ratio {outcome.first_log_ratio:.1e}"
    passed = (
        max(outcome.policy_error, outcome.value_error or 0.0) <= limits.gradient
        and (outcome.explained_error or 0.0) <= limits.explained
        and (outcome.first_log_ratio or 0.0) <= limits.first_log_ratio
        and outcome.reference_error <= limits.logprob
    )
    return Check(f"gradient: {setting.name}", passed, found, f"{limits.gradient:g}", seconds)


def converged(run: Convergence) -> bool:
    """Whether training closed enough of the gap."""
    return run.progress[-1].share_closed >= GAP_LIMIT


def identities(world: World, only: int | None = None) -> list[Check]:
    """The identities of `identities.py`; `only` is the number of a single one."""
    checks: list[tuple[str, Callable[[], tuple[bool, str, str]]]] = [
        ("GAE is its O(T^2) sum", _gae),
        ("ratio 1 gives REINFORCE", _reinforce),
        ("means of the KL estimators", lambda: _kl(world)),
        ("PPO starts from SFT", lambda: _start(world)),
        ("sampled as scored, T 0.7", lambda: _sampler(world)),
        ("Bradley-Terry", lambda: _bradley_terry(world)),
        ("a rollback goes back", lambda: _rollback(world)),
    ]
    found = []
    for name, check in checks if only is None else [checks[only]]:
        started = time.perf_counter()
        found.append(Check(name, *check(), time.perf_counter() - started))
    return found


def _gae() -> tuple[bool, str, str]:
    error = gae_error()
    return error <= 1e-12, f"{error:.1e}", "1e-12"


def _reinforce() -> tuple[bool, str, str]:
    error = reinforce_error()
    return error == 0, f"{error:.1e}", "0 exactly"


def _kl(world: World) -> tuple[bool, str, str]:
    errors = kl_errors(world)
    found = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    limit = LIMITS[world.dtype].kl
    return max(errors.values()) <= limit, found, f"{limit:g}"


def _start(world: World) -> tuple[bool, str, str]:
    errors, limit = start_errors(world), LIMITS[world.dtype].logprob
    passed = max(errors["policy"], errors["reference"]) <= limit and errors["base"] > 2 * limit
    found = f"policy {errors['policy']:.1e}, reference {errors['reference']:.1e} nats off"
    return passed, f"{found}; the base {errors['base']:.1f}", f"{limit:g}"


def _sampler(world: World) -> tuple[bool, str, str]:
    distance = sampler_distance(world)
    return distance <= SAMPLER_LIMIT, f"{distance:.2f} noise floors apart", f"{SAMPLER_LIMIT}"


def _rollback(world: World) -> tuple[bool, str, str]:
    errors = rollback_errors(world)
    found = f"weights {errors['weights']:.1e}, learning rate {errors['rate']:.1e} off"
    return max(errors.values()) <= ROLLBACK_LIMIT, found, f"{ROLLBACK_LIMIT:g}"


def _bradley_terry(world: World) -> tuple[bool, str, str]:
    found = bradley_terry(world)
    passed = found["lost"] <= BAYES_LIMIT and found["correlation"] >= CORRELATION_LIMIT
    text = f"accuracy {found['lost']:.4f} below, correlation {found['correlation']:.3f}"
    return passed, text, f"{BAYES_LIMIT}, {CORRELATION_LIMIT}"


def _table(checks: Sequence[Check]) -> Table:
    table = Table("check", "found", "allowed", "", Column("s", justify="right"))
    for check in checks:
        seconds = f"{check.seconds:.1f}"
        table.add_row(check.name, check.found, check.allowed, _verdict(check.passed), seconds)
    return table


def _convergence_table(runs: Sequence[Convergence]) -> Table:
    title = f"PPO trained for real, {GAP_LIMIT:.0%} of the gap to J* required"
    names = "seed", "J(pi_ref)", "J*", "closed", "KL to pi*", "episodes", "s", ""
    table = Table(*names, title=title)
    for run in runs:
        for progress in run.progress:
            last = progress is run.progress[-1]
            row = (f"{run.seed}", f"{run.start:.3f}", f"{run.best:.3f}")
            row += (f"{progress.share_closed:.1%}", f"{progress.kl_to_best:.3f}")
            row += (f"{progress.episodes}", f"{progress.seconds:.0f}")
            table.add_row(*row, _verdict(converged(run)) if last else "", end_section=last)
    return table


def _verdict(passed: bool) -> str:
    return "[green]pass[/]" if passed else "[bold red]FAIL[/]"
