"""The generated problems: right answers, as deep as they say, never in two splits, the same everywhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from melt_edge import tasks
from melt_edge.errors import ConfigError
from melt_edge.tasks import TASKS, Problem, is_correct, training_problem

STEPS = st.integers(1, 8)
SEEDS = st.integers(0, 2**32)
GOLDEN = [
    "a=7;p=b+8;b=9;a%10=",
    "i>f;e>d;f>m;p>k;j>p;n>i;d>j;l>e;m>l;k>n;p>1=",
    "e=1-j;j=1;n=e+8;h=e+1;e%10=",
    "(9*(4+6))%10=",
    "b>e;c>p;a>h;e>d;o>b;h>n;p>o;j>c;n>j;d>a;n>2=",
    "b=7;j=6-b;f=n+6;n=j+7;p=7-f;n%10=",
]


def assignments(question: str) -> tuple[dict[str, str], str]:
    """The right side of every variable of a chain, and the variable that is asked for."""
    *statements, asked = question.split(";")
    right_sides = dict(statement.split("=") for statement in statements)
    assert len(right_sides) == len(statements)
    assert re.fullmatch(r"[a-p]%10=", asked)
    return right_sides, asked[0]


def names_in(right_side: str) -> list[str]:
    return re.findall("[a-p]", right_side)


def table(question: str) -> tuple[dict[str, str], str, int]:
    """The table of a pointers question, where the walk starts, and how long it is."""
    *entries, asked = question.split(";")
    start, steps = asked.removesuffix("=").split(">")
    return dict(entry.split(">") for entry in entries), start, int(steps)


@given(SEEDS, STEPS)
@settings(deadline=None)
def test_chain_answer_is_what_python_computes(seed: int, steps: int) -> None:
    problem = TASKS["chain"].problem(Random(seed), steps)
    waiting, asked = assignments(problem.question)
    known: dict[str, int] = {}
    while waiting:
        ready = [name for name, right in waiting.items() if set(names_in(right)) <= known.keys()]
        assert ready, "every variable can be computed"
        for name in ready:
            known[name] = eval(waiting.pop(name), {}, dict(known))
    assert problem.answer == str(known[asked] % 10)


@given(SEEDS, STEPS)
@settings(deadline=None)
def test_chain_depends_on_exactly_that_many_assignments_in_a_row(seed: int, steps: int) -> None:
    right_sides, name = assignments(TASKS["chain"].problem(Random(seed), steps).question)
    depth = 1
    while names_in(right_sides[name]):
        (name,) = names_in(right_sides[name])
        depth += 1
    assert depth == steps
    assert len(right_sides) == steps + 2  # two more that it does not depend on


@given(SEEDS, STEPS)
@settings(deadline=None)
def test_nested_answer_is_what_python_computes(seed: int, steps: int) -> None:
    problem = TASKS["nested"].problem(Random(seed), steps)
    assert problem.answer == str(eval(problem.question.removesuffix("=")))
    assert problem.answer == str(eval(problem.key) % 10)  # the same problem in another writing


@given(SEEDS, STEPS)
@settings(deadline=None)
def test_nested_holds_one_operation_inside_the_other(seed: int, steps: int) -> None:
    node = ast.parse(TASKS["nested"].problem(Random(seed), steps).question.removesuffix("="), mode="eval").body
    assert isinstance(node, ast.BinOp)
    assert isinstance(node.op, ast.Mod)
    node, depth = node.left, 0
    while isinstance(node, ast.BinOp):
        inner = [side for side in (node.left, node.right) if isinstance(side, ast.BinOp)]
        assert len(inner) <= 1
        node, depth = inner[0] if inner else node.left, depth + 1
    assert depth == steps


@given(SEEDS, STEPS)
@settings(deadline=None)
def test_pointers_answer_is_the_end_of_the_walk(seed: int, steps: int) -> None:
    problem = TASKS["pointers"].problem(Random(seed), steps)
    following, letter, length = table(problem.question)
    assert length == steps
    for _ in range(steps):
        letter = following[letter]
    assert problem.answer == letter


@given(SEEDS, STEPS)
@settings(deadline=None)
def test_pointers_have_no_shorter_way_backwards(seed: int, steps: int) -> None:
    following, start, _ = table(TASKS["pointers"].problem(Random(seed), steps).question)
    ring = [start]
    while following[ring[-1]] != start:
        ring.append(following[ring[-1]])
    assert len(ring) == len(following) >= 2 * steps


@pytest.mark.parametrize("name", TASKS)
def test_no_answer_is_much_likelier_than_another(name: str) -> None:
    rng = Random(0)
    task = TASKS[name]
    answers = Counter(task.problem(rng, rng.randint(1, 8)).answer for _ in range(8000))
    assert max(answers.values()) / 8000 < 0.12
    assert all(len(answer) == 1 for answer in answers)


def test_shallow_rules_do_not_answer_a_chain() -> None:
    """Adding up the digits, or taking the last one in the text, is right about as often as a guess."""
    rng = Random(1)
    problems = [TASKS["chain"].problem(rng, rng.randint(2, 8)) for _ in range(4000)]
    for rule in (sum, max, lambda digits: digits[0], lambda digits: digits[-1]):
        right = sum(
            str(rule([int(d) for d in re.findall("[0-9]", p.question[:-4])]) % 10) == p.answer for p in problems
        )
        assert right / 4000 < 0.13


@pytest.mark.parametrize("name", TASKS)
def test_questions_are_short(name: str) -> None:
    rng = Random(2)
    longest = max(len(TASKS[name].problem(rng, 8).question) for _ in range(200))
    assert longest <= 68  # 16 pointers of a ring


@given(SEEDS, st.sampled_from([*TASKS]), st.integers(1, 3), SEEDS)
@settings(deadline=None, max_examples=30)
def test_training_problems_are_never_held_out_ones(seed: int, name: str, max_steps: int, other_seed: int) -> None:
    rng = Random(seed)
    training = [training_problem(rng, [name], max_steps) for _ in range(100)]
    test = tasks.test_problems(name, other_seed, 60)
    validation = tasks.test_problems(name, other_seed, 60, "validation")
    keys = [{problem.key for problem in problems} for problems in (training, test, validation)]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    assert all(problem.task == name and problem.steps <= max_steps for problem in training)


def test_writings_of_one_problem_share_its_split() -> None:
    """Two orders of a table or of a sum: one must not be trained on when the other is tested."""
    rng = Random(3)
    writings: dict[str, set[str]] = {}
    for _ in range(4000):
        problem = TASKS["nested"].problem(rng, 1)
        writings.setdefault(problem.key, set()).add(problem.question)
    assert writings["(3+4)"] == {"(3+4)%10=", "(4+3)%10="}
    assert writings["(3-4)"] == {"(3-4)%10="}
    problem = TASKS["chain"].problem(rng, 3)
    *statements, asked = problem.question.split(";")
    assert problem.key == ";".join([*sorted(statements), asked])


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("name", [*TASKS, "all"])
def test_held_out_problems_are_different_and_spread_over_the_steps(name: str, split: str) -> None:
    problems = tasks.test_problems(name, 7, 1000, split)
    assert len({p.question for p in problems}) == len(problems) == 1000
    assert {p.split for p in problems} == {split}
    counts = Counter(p.steps for p in problems)
    assert set(counts) == set(range(2 if name == "nested" else 1, 9))  # nested's table of one step is all trained on
    assert min(counts[steps] for steps in range(2, 9)) >= 120
    if name == "all":
        assert min(Counter(p.task for p in problems).values()) >= 250
    assert tasks.test_problems(name, 7, 100, split) == problems[:100]
    assert tasks.test_problems(name, 8, 1000, split) != problems


@pytest.mark.parametrize("name", [*TASKS, "all"])
def test_held_out_problems_have_no_more_steps_than_asked_for(name: str) -> None:
    problems = tasks.test_problems(name, 7, 300, max_steps=3)
    counts = Counter(p.steps for p in problems)
    assert set(counts) == set(range(2 if name == "nested" else 1, 4))
    assert min(counts[steps] for steps in (2, 3)) >= 90
    assert {p.split for p in problems} == {"test"}


def test_training_problems_take_every_task_and_number_of_steps() -> None:
    rng = Random(4)
    drawn = Counter((p.task, p.steps) for p in (training_problem(rng) for _ in range(4000)))
    assert len(drawn) == 24
    assert min(drawn.values()) > 100


def test_the_same_on_every_machine() -> None:
    """If this changes, every number measured before is of other problems."""
    assert [p.question for p in tasks.test_problems("all", 0, 6)] == GOLDEN
    code = (
        "from melt_edge import tasks; from random import Random\n"
        "print([p.question for p in tasks.test_problems('all', 0, 6)])\n"
        "r = Random(5); print([tasks.training_problem(r).question for _ in range(9)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    rng = Random(5)
    here = f"{GOLDEN}\n{[training_problem(rng).question for _ in range(9)]}\n"
    assert printed == {here}


def test_importing_the_tasks_loads_nothing_heavy() -> None:
    code = "import sys, melt_edge.tasks; print(sorted({'torch', 'llama_cpp', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("7", True),
        (" 7\n", True),
        ("7.", True),
        ("a=3+4=7", True),
        ("The answer is **7**.", True),
        ("", False),
        ("17", False),
        ("-7", False),
        ("7.5", False),
        ("0.7", False),
        ("7 or 8", False),
        ("a7", False),
    ],
)
def test_only_the_last_word_answers(text: str, right: bool) -> None:
    assert is_correct(Problem("chain", 1, "a=7;a%10=", "7", "a=7;a%10="), text) is right


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: TASKS["chain"].problem(Random(0), 9), r"steps is 9, task chain has 1 to 8"),
        (lambda: training_problem(Random(0), ["sums"]), r"'sums' is not a task, expected one of: chain, nested"),
        (lambda: training_problem(Random(0), []), r"is not a task"),
        (lambda: training_problem(Random(0), max_steps=0), r"max_steps is 0, task \w+ has 1 to 8"),
        (lambda: tasks.test_problems("sums", 0, 1), r"'sums' is not a task"),
        (lambda: tasks.test_problems("chain", 0, 0), r"number of problems is 0"),
        (lambda: tasks.test_problems("chain", 0, 1, max_steps=9), r"max_steps is 9, expected 1 to 8"),
        (lambda: tasks.test_problems("chain", 0, 1, "training"), r"split is 'training', expected test or validation"),
    ],
    ids=["steps", "training task", "no task", "max_steps", "task", "count", "most steps", "split"],
)
def test_wrong_arguments_are_told(call: object, said: str) -> None:
    assert callable(call)
    with pytest.raises(ConfigError, match=said):
        call()
