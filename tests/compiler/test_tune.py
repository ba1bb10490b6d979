"""Choosing kernels: a wrong one is an error, every candidate is reported, times are remembered."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.harness import make
from twofour.compiler import trial, tune
from twofour.compiler.timing_cache import TimingCache
from twofour.compiler.trial import Packed, Trial, WrongResult, timer_of
from twofour.compiler.tune import Tuner, timing_key
from twofour.core.errors import Error, InputError
from twofour.core.memory import address
from twofour.core.numerics import Window
from twofour.core.target import host_target
from twofour.kernels.cpu import nest
from twofour.kernels.cpu.conv_dense import Dense
from twofour.kernels.cpu.llvm import Function, Source, compile_object, module_text
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.problem import Config
from twofour.kernels.cpu.program import threads_text
from twofour.kernels.cpu.tactic import Tactic, tactics
from twofour.runtime.cpu import Code

TARGET = host_target()
DENSE = next(t for t in tactics() if t.name == "dense" and t.dtype == "int8")
CASE = make(np.random.default_rng(0), c=16, n=32, pattern="2:4", add="int8")


def choose(tuner: Tuner, case=CASE, wanted=lambda _: ""):
    return tuner.choose(case.problem(), case.w, case.epilogue, case.x_zero, wanted)


def plant(monkeypatch, tactic: Tactic) -> None:
    """Adds a tactic to those that compete."""
    monkeypatch.setattr(tune, "tactics", lambda: (*tactics(), tactic))


@dataclass(frozen=True)
class Forgetful(Dense):
    """Leaves out the last input of each step: almost right."""

    name: str = "forgetful"

    def pack_group(self, w):
        w = w.copy()
        w[..., 3] = 0
        return super().pack_group(w)


@dataclass(frozen=True)
class Untidy(Dense):
    """Computes the right sums, and writes a byte behind the output."""

    name: str = "untidy"

    def emit_group(self, v, rows, x, w, sums, steps):
        v.f.store("i8", "7", "%y", 5 * 5 * 32 + 100)
        return super().emit_group(v, rows, x, w, sums, steps)


def planted(fmt: Dense) -> Tactic:
    one = [Config(1, 1, 1)]
    return Tactic(fmt.name, "int8", "", Tiled(fmt), lambda *_: "", lambda *_: one)


def test_a_wrong_kernel_is_an_error_and_never_a_choice(monkeypatch) -> None:
    plant(monkeypatch, planted(Forgetful()))
    tuner = Tuner(TARGET, TimingCache())
    with pytest.raises(WrongResult, match="forgetful 1x1x16 computes a wrong result") as caught:
        choose(tuner)
    assert "values differ, first at (0, 0, 0" in str(caught.value)
    assert "around the output are intact" in str(caught.value)
    assert isinstance(caught.value, Error)
    assert tuner.cache.times_us == {}, "times of kernels nobody checked"


def test_a_kernel_that_writes_outside_is_an_error(monkeypatch) -> None:
    plant(monkeypatch, planted(Untidy()))
    with pytest.raises(WrongResult, match="around the output were overwritten"):
        choose(Tuner(TARGET, TimingCache()))


def test_a_wrong_float_kernel_is_an_error(monkeypatch) -> None:
    dense = next(t for t in tactics() if t.name == "dense" and t.dtype == "float32")
    case = make(np.random.default_rng(1), c=16, n=16, dtype="float32", window=Window((1, 1)))
    choose(Tuner(TARGET, TimingCache()), case)
    off = case.w.copy()
    off[3, 5] *= np.float32(1.001)
    real = nest.pack
    monkeypatch.setattr(nest, "pack", lambda _, *rest: real(off, *rest))
    with pytest.raises(WrongResult):
        choose(Tuner(TARGET, TimingCache()), case, lambda t: "" if t is dense else "not now")


def test_weights_that_are_not_finite_are_no_fault_of_a_kernel() -> None:
    for value in (np.nan, np.inf, np.float32(3e38)):
        case = make(np.random.default_rng(2), c=16, n=16, dtype="float32", window=Window((1, 1)))
        case.w[3] = value
        with np.errstate(all="ignore"):
            choice, _ = choose(Tuner(TARGET, TimingCache()), case)
        assert choice.time_us > 0


def test_every_candidate_is_reported_the_fastest_first() -> None:
    choice, candidates = choose(Tuner(TARGET, TimingCache()))
    timed = [c for c in candidates if c.time_us is not None]
    assert [c.time_us for c in timed] == sorted(c.time_us for c in timed)
    assert (timed[0].tactic, timed[0].config) == (choice.tactic.name, str(choice.config))
    assert {c.tactic for c in candidates} == {
        t.name for t in tactics() if t.dtype == "int8" and not t.depthwise and t.is_for(TARGET.isa)
    }
    refused = {c.tactic: c.reason for c in candidates if c.time_us is None}
    assert refused.keys() == {"2:4 C", "2:4 pair", "dense ends"}
    assert refused["2:4 pair"]


def test_what_is_not_wanted_is_reported_with_the_reason() -> None:
    choice, candidates = choose(
        Tuner(TARGET, TimingCache()), wanted=lambda t: "not today" if t.pattern else ""
    )
    assert choice.tactic.pattern == ""
    assert {c.reason for c in candidates if c.tactic.startswith("2:4")} == {"not today"}


def test_known_times_are_not_measured_again(monkeypatch, tmp_path) -> None:
    file = tmp_path / "times.json"
    first = TimingCache()
    before = choose(Tuner(TARGET, first))
    first.save(file)
    second = TimingCache.load(file)
    assert second == first

    def measured(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(tune, "interleaved", measured)
    monkeypatch.setattr(tune, "compile_object", measured)
    assert choose(Tuner(TARGET, second)) == before


def test_the_fastest_known_time_wins() -> None:
    """Also against the order of the candidates."""
    tuner = Tuner(TARGET, TimingCache(), effort=3)
    choose(tuner)
    for winner in list(tuner.cache.times_us):
        tuner.cache.times_us = dict.fromkeys(tuner.cache.times_us, 5.0) | {winner: 1.0}
        choice, _ = choose(tuner)
        assert choice.time_us == 1.0


WIDE = make(np.random.default_rng(0), height=10, width=10, c=256, n=64, pattern="2:4")


def timed_as(monkeypatch, tuner: Tuner, time_us, slower: float = 1.0) -> list[int]:
    """Every kernel takes time_us(option), each round `slower` than the one before.

    Returns a list that gets the number of kernels of each round.
    """
    options, rounds = {}, []
    real = tuner._option

    def option(*given):
        made = real(*given)
        options[made.key] = made
        return made

    def interleaved(timers, _):
        rounds.append(len(timers))
        return {k: time_us(options[k]) * slower ** len(rounds) for k in timers}

    monkeypatch.setattr(tuner, "_option", option)
    monkeypatch.setattr(tune, "interleaved", interleaved)
    return rounds


def test_a_tactic_whose_best_guess_is_slow_is_left_there(monkeypatch) -> None:
    tuner = Tuner(TARGET, TimingCache())
    timed_as(monkeypatch, tuner, lambda o: 50.0 if o.tactic.name == "2:4 H" else 100.0)
    _, candidates = choose(tuner, WIDE)
    tried = [c.tactic for c in candidates if c.time_us is not None]
    assert tried.count("2:4 H") > 2
    assert tried.count("dense") == 1
    reasons = [c.reason for c in candidates if c.tactic == "2:4 C"]
    assert reasons == ["faster than others for up to 8 outputs a channel: this layer has 64"]


def test_the_best_tile_is_tried_with_every_order_and_way_to_prefetch(monkeypatch) -> None:
    """The second tile is faster, and fastest with its panels outside."""
    tuner, tactic = Tuner(TARGET, TimingCache()), "2:4 H"
    sparse = next(t for t in tactics() if t.name == tactic and t.dtype == "int8")
    tiles = {c.plain: None for c in sparse.configs(WIDE.problem(), TARGET.isa)}
    second = list(tiles)[1]

    def time_us(o) -> float:
        if o.tactic.name != tactic:
            return 100.0
        return 60.0 - 5 * (o.config.plain == second) - o.config.panels_outside

    timed_as(monkeypatch, tuner, time_us)
    choice, candidates = choose(tuner, WIDE, lambda t: "" if t.name == tactic else "not now")
    assert choice.config.plain == second
    variants = {c for c in sparse.configs(WIDE.problem(), TARGET.isa) if c.plain == second}
    assert choice.config.panels_outside is any(c.panels_outside for c in variants)
    tried = {c.config for c in candidates if c.time_us is not None}
    assert {str(c) for c in variants} <= tried


def test_rounds_are_compared_by_what_ran_in_both(monkeypatch) -> None:
    """A machine that slows down between two rounds changes no choice and no time."""
    chosen = []
    for slower in (1.0, 2.0):
        tuner = Tuner(TARGET, TimingCache())
        with monkeypatch.context() as context:
            rounds = timed_as(context, tuner, lambda o: 9.0 + o.config.tile_h, slower)
            chosen.append(choose(tuner, WIDE))
        assert len(rounds) > 1
    (one, few), (other, many) = chosen
    assert str(one.config) == str(other.config)
    assert [c.time_us for c in many] == [c.time_us and 2 * c.time_us for c in few]


def test_bad_luck_of_one_kernel_makes_no_other_look_fast(monkeypatch) -> None:
    """What was timed before takes five times as long once: then all are timed again."""
    tuner, known = Tuner(TARGET, TimingCache()), set()
    unlucky = iter((False, True))

    def interleaved(timers, rounds):
        slow = next(unlucky, False)
        times = {key: 9.0 * (5.0 if slow and key in known else 1.0) for key in timers}
        known.update(timers)
        return times

    monkeypatch.setattr(tune, "interleaved", interleaved)
    _, candidates = choose(tuner, WIDE)
    assert {c.time_us for c in candidates if c.time_us is not None} == {9.0}
    assert next(unlucky, None) is None


MATRIX = {"height": 150, "window": Window((1, 1))}


def of_8_images(**form):
    form = {"batch": 8, "width": 8, "c": 16, "n": 16, "add": "int8"} | form
    return make(np.random.default_rng(3), **form)


@pytest.mark.parametrize("operand", ["x", "y", "r"])
@pytest.mark.parametrize(("form", "part"), [({}, "image"), (MATRIX, "row")], ids=["image", "row"])
def test_one_image_or_row_in_the_place_of_another_is_found(operand, form, part) -> None:
    """Though inputs repeat: of 8 images, or of 9600 rows of a matrix."""
    case = of_8_images(**form)
    problem = case.problem()
    assert problem.is_column == (part == "row")
    tuner, there = Tuner(TARGET, TimingCache()), Trial(problem, case.w, case.epilogue, case.x_zero)
    option = tuner._option(problem, DENSE, Config(4, 2 if part == "image" else 1, 1))
    sources = [Source(tuner.text(problem, DENSE, option.config))]
    code, packed = Code([compile_object(sources, TARGET)]), there.pack(option, cold_bytes=0)
    there.check(code, "kernel", option, packed)
    step, buffer = getattr(getattr(problem, operand), part), getattr(there, operand)
    for places in (1, -1, 2):
        buffer.address += places * step
        with pytest.raises(WrongResult, match="dense"):
            there.check(code, "kernel", option, packed)
        buffer.address -= places * step
    there.check(code, "kernel", option, packed)


def test_the_definition_is_asked_for_a_part_of_many_images(monkeypatch) -> None:
    asked = []
    real = trial.convolve

    def convolve(x, *rest):
        asked.append(x.shape[:2])
        return real(x, *rest)

    monkeypatch.setattr(trial, "convolve", convolve)
    for form in ({}, MATRIX):
        choose(Tuner(TARGET, TimingCache()), of_8_images(**form))
    assert asked == [(3, 5), (1, 509)]


def test_several_threads_try_both_ways_to_share(monkeypatch) -> None:
    """Where both are as fast, rows: who writes a row goes on with it."""
    tuner = Tuner(TARGET, TimingCache(), threads=2)
    case = make(np.random.default_rng(0), height=10, width=6, c=16, n=64, pattern="2:4")
    shared = []

    def equal(runs, _):
        shared.append(len(runs))
        return dict.fromkeys(runs, 5.0)

    monkeypatch.setattr(tune, "interleaved", equal)
    choice, candidates = choose(tuner, case)
    assert len(shared) > 1
    ways = [c.config for c in candidates if "shared" in c.config]
    assert any("rows" in way for way in ways)
    assert any("panels" in way for way in ways)
    assert choice.by_panels is False
    assert str(choice).endswith("rows shared")


def test_no_effort_times_nothing_and_checks_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr(tune, "interleaved", lambda *_: pytest.fail("timed"))
    tuner = Tuner(TARGET, TimingCache(), effort=0)
    choice, candidates = choose(tuner)
    assert choice.tactic.pattern == "2:4/pair" or choice.tactic.pattern == "2:4"
    assert choice.time_us is None
    assert all(c.time_us is None for c in candidates)
    plant(monkeypatch, replace(DENSE, pattern="2:4/pair", kernel=Tiled(Forgetful())))
    with pytest.raises(WrongResult):
        choose(tuner)


def test_more_effort_times_more() -> None:
    counts = []
    for effort in (1, 2, 3):
        tuner = Tuner(TARGET, TimingCache(), effort=effort)
        _, candidates = choose(tuner)
        counts.append(len([c for c in candidates if c.time_us is not None]))
    assert counts[0] < counts[1] < counts[2]


def test_threads_are_timed_on_what_they_share() -> None:
    """One row of results: nothing but panels to share, where there is more than one."""
    tuner = Tuner(TARGET, TimingCache(), threads=2)
    case = make(np.random.default_rng(0), height=1, width=1, c=64, n=64, window=Window((1, 1)))
    _, candidates = choose(tuner, case)
    shared = [c for c in candidates if "shared" in c.config]
    assert shared
    assert all(c.time_us is not None and c.time_us > 0 for c in shared)
    single = [c for c in shared if c.config.startswith("1x1x64")]
    assert [c for c in shared if "rows" in c.config and c not in single] == []


def test_a_key_covers_all_that_a_time_depends_on() -> None:
    problem, config = CASE.problem(), Config(2, 2, 1)
    base = (problem, DENSE, config, TARGET, "source")
    float_dense = next(t for t in tactics() if t.name == "dense" and t.dtype == "float32")
    others = [
        (replace(problem, activation="Relu"), *base[1:]),
        (replace(problem, x=replace(problem.x, row=999)), *base[1:]),
        (problem, float_dense, *base[2:]),
        (problem, DENSE, replace(config, tile_w=3), *base[3:]),
        (problem, DENSE, config, replace(TARGET, model="Another CPU"), "source"),
        (problem, DENSE, config, replace(TARGET, isa="vector"), "source"),
        (*base[:4], "another source"),
    ]
    keys = [timing_key(*base), *(timing_key(*other) for other in others)]
    assert len(set(keys)) == len(keys)
    assert timing_key(*base) == keys[0]


DAMAGED = {
    "no json": "hello",
    "half": '{"times_us": {"a": 1.0',
    "list": "[1, 2]",
    "other": '{"plan": {}}',
    "words": '{"times_us": {"a": "fast"}}',
    "nested": '{"times_us": {"a": [1]}}',
    "nan": '{"times_us": {"a": NaN}}',
    "infinite": '{"times_us": {"a": 1e999}}',
    "negative": '{"times_us": {"a": -1}}',
    "zero": '{"times_us": {"a": 0}}',
    "bytes": "\x00\x01",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_cache_is_refused_and_kept(text, tmp_path) -> None:
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.raises(InputError, match="is not a timing cache"):
        TimingCache.load(file)
    assert file.read_text() == text


def test_bytes_that_are_no_text_are_refused(tmp_path) -> None:
    (tmp_path / "times.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match="is not a timing cache"):
        TimingCache.load(tmp_path / "times.json")
    with pytest.raises(InputError, match="is not a timing cache"):
        TimingCache.load(tmp_path)


def test_a_cache_is_written_whole_or_not_at_all(tmp_path) -> None:
    cache = TimingCache({"a": 1.5})
    cache.save(tmp_path / "times.json")
    assert json.loads((tmp_path / "times.json").read_text()) == {"times_us": {"a": 1.5}}
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        cache.save(tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "times.json"]
    cache.save(None)
    assert TimingCache.load(None) == TimingCache()


def test_a_folder_that_does_not_exist_is_found_before_the_work(tmp_path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        TimingCache.load(tmp_path / "missing" / "times.json")
    assert TimingCache.load(Path("times-that-do-not-exist.json")) == TimingCache()


def test_work_counts_pieces_of_every_image_and_panels_of_every_group() -> None:
    problem = replace(CASE.problem(), batch=3, out_h=7, groups=2)
    assert DENSE.kernel.work(problem, Config(3, 2, 2)) == (3 * 3, 2)


def test_weights_are_copied_until_they_weigh_what_a_network_does() -> None:
    tuner = Tuner(TARGET, TimingCache())
    there = Trial(CASE.problem(), CASE.w, CASE.epilogue, CASE.x_zero)
    option = tuner._option(CASE.problem(), DENSE, Config(1, 5, 1))
    alone, many = (there.pack(option, cold_bytes=size) for size in (0, 1 << 20))
    assert alone.end == alone.step == many.step
    assert 1 << 20 <= many.end < (1 << 20) + many.step
    assert many.end % many.step == 0


def test_a_timer_reads_the_copy_that_was_not_read_for_the_longest_time() -> None:
    """Else a kernel that takes longer than a round would find its weights in a cache."""
    arguments = [*(("ptr", p) for p in "xwyr"), *(("i64", p) for p in ("t0", "t1", "p0", "p1"))]
    f = Function("add", arguments)
    total = f.int_op("add", f.load("i64", "%y"), f.load("i64", "%w"))
    f.store("i64", total, "%y")
    code = Code(
        [compile_object([Source(module_text([f])), Source(threads_text(TARGET.arch))], TARGET)]
    )
    copies, y = np.array([1, 10, 100]), np.zeros(1, np.int64)
    packed = Packed(copies, 8, 24)
    timer = timer_of(code, "add", (0, address(copies), address(y), 0, 0, 0, 0, 0), packed)
    read = []
    for runs in (1, 1, 2, 4):
        timer(runs)
        read.append(int(y[0]))
    assert read == [1, 11, 112, 233]
