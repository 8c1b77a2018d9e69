"""Bugs of win rates and of their judges, as data like `catalogue.py`'s."""

from mutation import Mutation

WIN_RATE = "trainers/judging/win_rate.py"
LLM_JUDGE = "trainers/judging/llm_judge.py"

_RATES = "tests/judging/test_win_rate.py::test_"
_JUDGE = "tests/judging/test_judge.py::test_"

JUDGING_BUGS = (
    Mutation(
        "win rate: each comparison a draw of its own",
        "trainers/judging/command.py",
        "[c.cluster for c in some],",
        "list(range(len(some))),",
        (_JUDGE + "votes_of_the_page_are_counted_by_model",),
    ),
    Mutation(
        "win rate: lengths without tanh",
        WIN_RATE,
        "x = np.tanh(differences / spread) if",
        "x = differences / spread if",
        (_RATES + "length_control_by_hand",),
    ),
    Mutation(
        "position bias of the second order turned round",
        WIN_RATE,
        "np.stack([1 - orders[:, 0], orders[:, 1]]",
        "np.stack([1 - orders[:, 0], 1 - orders[:, 1]]",
        (_RATES + "position_by_hand",),
    ),
    Mutation(
        "judge sees one order twice",
        LLM_JUDGE,
        "    if swapped:",
        "    if False:",
        (_JUDGE + "the_right_side_wins_in_both_orders",),
    ),
    Mutation(
        "judge is paid for every reply again",
        LLM_JUDGE,
        "todo = [text for text in texts if digest(text) not in kept]",
        "todo = list(texts)",
        (_JUDGE + "replies_are_kept_and_never_paid_for_twice",),
    ),
    Mutation(
        "a classifier without its head scores at random",
        "trainers/ppo/terms/models.py",
        'if missing := sorted(loading["missing_keys"]):',
        "if missing := []:",
        ("tests/ppo/terms/test_other_models.py::test_models_that_do_not_fit_are_refused",),
    ),
)
