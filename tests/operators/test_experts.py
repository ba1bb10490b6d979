"""Kernels of routed experts: the definition, bit for bit where weights are int8."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.harness import targets
from tests.operators.experts_harness import Case, Runner, make, run
from twofour.core.experts import ACTIVATIONS, MASKED, MIXTURE, SWIGLU, mixture, route
from twofour.core.experts_text import NAMES
from twofour.core.plugins import Operand, find, installed
from twofour.operators.experts import OPERATORS

TARGETS = targets()
FORMS = [(True, ""), (True, "2:4"), (True, "2:4/pair"), (False, ""), (False, "2:4")]


def check(case: Case, got: np.ndarray) -> None:
    """Equal where all sums are of integers; else as far as the order of sums may change them."""
    want = case.expected()
    if case.quantized:
        np.testing.assert_array_equal(got, want)
        return
    terms = case.experts.w1.shape[-1] + case.experts.w1.shape[-2]
    bound = terms * np.finfo(np.float32).eps * max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


# All forms on the best instruction set; elsewhere other instructions do the same.
TRIED = [
    *((TARGETS[0], MIXTURE, *form) for form in FORMS),
    *((TARGETS[0], MASKED, *form) for form in (FORMS[1], FORMS[3])),
    *((target, MIXTURE, *form) for target in TARGETS[1:] for form in (FORMS[1], FORMS[3])),
]


@pytest.mark.parametrize(("target", "base", "quantized", "pattern"), TRIED, ids=str)
def test_every_tactic(target, base, quantized, pattern) -> None:
    """All configurations of the best instruction set, one of the others."""
    best = target == TARGETS[0] and base == MIXTURE
    size = {"hidden": 64, "inner": 96} if pattern == "2:4/pair" else {"hidden": 24, "inner": 40}
    random = np.random.default_rng(0)
    case = make(random, base=base, quantized=quantized, pattern=pattern, shape=(9,), **size)
    problem, tried = case.problem, set()
    for tactic in case.operator.cpu:
        if tactic.refuse(problem, target):
            continue
        tried.add(tactic.name.removeprefix("routed "))
        for config in tactic.configs(problem, target)[: None if best else 1]:
            made = Runner(tactic.emit(problem, target, config), case, target)
            one = made.run()
            check(case, one)
            np.testing.assert_array_equal(made.run(parts=3), one)
    assert "dense" in tried
    if pattern == "2:4/pair":
        assert "2:4 pair" in tried
    if pattern == "2:4" and quantized:
        assert {"2:4 H", "2:4 C"} <= tried


@cache
def runner(tokens: int, experts: int, k: int, form: int) -> Runner:
    """A layer whose inputs tests replace."""
    quantized, pattern = FORMS[form]
    random = np.random.default_rng(tokens)
    case = make(
        random,
        shape=(tokens,),
        experts=experts,
        k=k,
        quantized=quantized,
        pattern=pattern,
        hidden=32,
        inner=48,
    )
    target = TARGETS[0]
    tactic = next(t for t in case.operator.cpu[::-1] if not t.refuse(case.problem, target))
    return Runner(
        tactic.emit(case.problem, target, tactic.configs(case.problem, target)[0]), case, target
    )


def with_logits(made: Runner, logits: np.ndarray, parts: int = 1) -> None:
    """Runs a layer with other logits and compares."""
    made.inputs[1][...] = logits
    made.case = replace(made.case, chooser=logits)
    check(made.case, made.run(parts))


@pytest.mark.parametrize("form", range(len(FORMS) - 1))
@pytest.mark.parametrize("k", [1, 3])
def test_all_tokens_to_one_expert(k, form) -> None:
    made = runner(97, 5, k, form if form < 2 else 3)
    for expert in range(5):
        logits = np.zeros((97, 5), np.float32)
        logits[:, expert] = 3
        with_logits(made, logits, parts=4)


def test_experts_without_tokens_and_equal_logits() -> None:
    made = runner(97, 5, 3, 1)
    logits = np.zeros((97, 5), np.float32)
    assert (route(logits, 3, normalize=True).experts == [0, 1, 2]).all()
    with_logits(made, logits)
    logits[:, :2] = -np.inf
    with_logits(made, logits)


@pytest.mark.parametrize("tokens", [1, 2, 29])
def test_every_expert_for_every_token(tokens) -> None:
    made = runner(tokens, 4, 4, 1)
    logits = np.random.default_rng(1).standard_normal((tokens, 4), np.float32)
    with_logits(made, logits, parts=2)


def test_more_rows_than_a_chunk() -> None:
    """Chunks are short here, as rows are long."""
    random = np.random.default_rng(4)
    case = make(random, shape=(70,), experts=2, k=2, hidden=8, inner=4100, quantized=False)
    target = TARGETS[0]
    tactic = case.operator.cpu[0]
    for parts in (1, 5):
        check(case, run(case, tactic, target, parts=parts))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_gates_and_batches(activation, normalize) -> None:
    random = np.random.default_rng(2)
    case = make(random, shape=(2, 3, 4), activation=activation, normalize=normalize, k=2)
    check(case, run(case, case.operator.cpu[0], TARGETS[0]))
    gates = route(case.chooser.reshape(-1, 4), 2, normalize=normalize).gates.sum(1)
    assert np.allclose(gates, 1) == normalize


@pytest.mark.parametrize(("quantized", "pattern"), FORMS)
def test_two_halves(quantized, pattern) -> None:
    """SwiGlu takes a kernel more where weights are floats."""
    random = np.random.default_rng(9)
    size = {"hidden": 64, "inner": 96} if pattern == "2:4/pair" else {"hidden": 24, "inner": 36}
    case = make(random, activation=SWIGLU, quantized=quantized, pattern=pattern, **size)
    problem, target = case.problem, TARGETS[0]
    taken = [tactic for tactic in case.operator.cpu if not tactic.refuse(problem, target)]
    for tactic in taken:
        config = tactic.configs(problem, target)[-1]
        made = Runner(tactic.emit(problem, target, config), case, target)
        check(case, made.run())
        check(case, made.run(parts=3))
    assert any("2:4" in tactic.name for tactic in taken) == bool(pattern)


def test_what_is_not_chosen_is_not_read() -> None:
    """NaN in the weights of experts that no token chose, and in rows whose mask is not set."""
    random = np.random.default_rng(3)
    case = make(random, quantized=False, k=1)
    chosen = route(case.chooser, 1, normalize=True).experts
    broken = case.experts.b2.copy()
    broken[[e for e in range(4) if e not in chosen]] = np.nan
    case.chooser[:, 3] = -9
    case = replace(case, experts=replace(case.experts, b2=broken))
    assert np.isfinite(run(case, case.operator.cpu[0], TARGETS[0])).all()
    gated = make(random, base=MASKED, shape=(9,))
    gated.x[~gated.chooser] = np.nan
    got = run(gated, gated.operator.cpu[0], TARGETS[0])
    assert np.isfinite(got).all()
    assert (got[~gated.chooser] == 0).all()


def test_logits_of_nan_harm_no_other_token() -> None:
    made = runner(29, 4, 4, 1)
    logits = np.random.default_rng(5).standard_normal((29, 4), np.float32)
    logits[3] = np.nan
    made.inputs[1][...] = logits
    got = made.run()
    others = np.arange(29) != 3
    assert np.isnan(got[3]).all()
    case = made.case
    want = mixture(case.x[others], logits[others], case.experts, 4)
    np.testing.assert_array_equal(got[others], want)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(1, 4, 2), (29, 4, 4), (97, 5, 3)]),
    st.integers(0, 2**32 - 1),
    st.integers(1, 7),
    st.sampled_from([0.0, 0.5, 4.0]),
)
def test_any_routing(size, seed, parts, skew) -> None:
    made = runner(*size, 1)
    random = np.random.default_rng(seed)
    tokens, experts, _ = size
    preferred = skew * random.standard_normal(experts)
    logits = np.round(random.standard_normal((tokens, experts)) + preferred, 1)
    with_logits(made, logits.astype(np.float32), parts)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=37, max_size=37), st.integers(1, 5))
def test_any_mask(mask, parts) -> None:
    made = masked_runner()
    flags = np.array(mask)
    made.inputs[1][...] = flags
    made.case = replace(made.case, chooser=flags)
    check(made.case, made.run(parts))


@cache
def masked_runner() -> Runner:
    case = make(np.random.default_rng(6), base=MASKED, shape=(37,), pattern="2:4")
    target, tactic = TARGETS[0], case.operator.cpu[1]
    config = tactic.configs(case.problem, target)[0]
    return Runner(tactic.emit(case.problem, target, config), case, target)


def test_refusals() -> None:
    case = make(np.random.default_rng(7), pattern="")
    dense, sparse = case.operator.cpu[:2]
    reason = sparse.refuse(case.problem, TARGETS[0])
    assert reason.startswith("w1 of expert 0: output channel 0")
    assert "k is 5" in dense.refuse(replace(case, k=5).problem, TARGETS[0])
    inputs = list(case.problem.inputs)
    weight = inputs[2]
    assert isinstance(weight, Operand)
    inputs[2] = replace(weight, constant=None)
    assert "has 5 inputs" in dense.refuse(
        replace(case.problem, inputs=case.problem.inputs[:5]), TARGETS[0]
    )
    computed = replace(case.problem, inputs=tuple(inputs))
    assert "constant weights: 'w1'" in dense.refuse(computed, TARGETS[0])


def test_few_tokens_take_a_kernel_less() -> None:
    """So tests with 97 tokens run others than those with few."""
    stages = [[s.name for s in runner(tokens, 5, 3, 1).code.stages] for tokens in (29, 97)]
    assert stages[0][:2] == ["route", "gather"]
    assert stages[1][:3] == ["choose", "sort", "gather"]


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        ("w1", (4, 40, 23), "w1 is float32 [4, 40, 23]: expected float32 [4, 40, 24]"),
        ("w1", (5, 40, 24), "logits is float32 [7, 4]: expected float32 [7, 5]"),
        ("b1", (4, 39), "b1 is float32 [4, 39]: expected float32 [4, 40]"),
        ("w2", (4, 24, 41), "w2 is float32 [4, 24, 41]: expected float32 [4, 24, 40]"),
        ("b2", (24,), "b2 is float32 [24]: expected float32 [4, 24]"),
        ("w1", (40, 24), "x, logits and w1 have 2, 2 and 2 dimensions"),
        ("logits", (6, 4), "logits is float32 [6, 4]: expected float32 [7, 4]"),
        ("x", (0, 24), "x is empty: [0, 24]"),
    ],
)
def test_operands_that_do_not_fit(name, shape, wanted) -> None:
    """A kernel would read beyond them."""
    problem = make(np.random.default_rng(7), quantized=False).problem
    given = {"x": (7, 24), "logits": (7, 4), name: shape}
    if name == "x":
        given["logits"] = (0, 4)
    inputs = [
        replace(each, shape=given.get(each.name.removeprefix("model/"), each.shape))
        for each in problem.inputs
        if each is not None
    ]
    (dense, *_) = next(o for o in OPERATORS if o.name == problem.operator).cpu
    assert dense.refuse(replace(problem, inputs=tuple(inputs)), TARGETS[0]) == wanted


@pytest.mark.parametrize("seed", range(10))
def test_odd_sizes(seed) -> None:
    """One token without an axis, one expert, one channel, more experts than tokens."""
    random = np.random.default_rng(seed)
    shape = [(), (1,), (2, 3), (33,), (1, 1, 7)][seed % 5]
    experts = int(random.integers(1, 5) if seed % 3 else random.integers(9, 70))
    case = make(
        random,
        base=MIXTURE if seed % 4 else MASKED,
        shape=shape,
        hidden=1 if seed == 1 else int(random.integers(2, 70)),
        inner=1 if seed == 2 else int(random.integers(2, 70)),
        experts=experts,
        k=int(random.integers(1, min(experts, 9) + 1)),
        quantized=seed % 2 == 0,
        activation=ACTIVATIONS[seed % len(ACTIVATIONS)],
    )
    tactic = case.operator.cpu[0]
    config = tactic.configs(case.problem, TARGETS[0])[-1]
    check(case, run(case, tactic, TARGETS[0], config, parts=1 + seed % 4))


def test_a_weight_of_another_shape_than_declared() -> None:
    case = make(np.random.default_rng(7), quantized=False)
    inputs = list(case.problem.inputs)
    weight = inputs[2]
    assert isinstance(weight, Operand)
    inputs[2] = replace(weight, constant=case.experts.w1[..., :22])
    reason = case.operator.cpu[0].refuse(replace(case.problem, inputs=tuple(inputs)), TARGETS[0])
    assert reason == "w1 is float32 [4, 40, 22]: expected float32 [4, 40, 24]"


def test_they_are_installed() -> None:
    assert not installed().problems
    for name, *_ in NAMES:
        found = find("twofour.plugins", name)
        assert found is not None
        assert found.is_function
    assert len({operator.name for operator in OPERATORS}) == len(OPERATORS) == len(NAMES)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_samples_are_routed_without_doubt(operator) -> None:
    """No two logits of a token are so near that another order of sums could swap them."""
    base = MASKED if MASKED in operator.name else MIXTURE
    case = make(np.random.default_rng(8), base=base, shape=(50,), experts=16)
    x, chooser = operator.samples(case.problem, np.random.default_rng(0))
    assert x.shape == case.x.shape
    assert chooser.shape == case.chooser.shape
    assert chooser.dtype == case.chooser.dtype
    if base == MIXTURE:
        assert np.diff(np.sort(chooser, axis=-1)).min() > 0.01
        assert len(np.unique(chooser.argmax(-1))) > 8
    else:
        assert 5 < chooser.sum() < 45
