"""Recipes: what is read, and a message with file, line and fix for everything that is wrong."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.core.errors import InputError
from twofour.core.machine import usable_cores
from twofour.pipeline.recipe_file import RecipeFile, read_recipe
from twofour.pipeline.yaml_lines import MOST_BYTES, read_document

GOOD = """\
name: r20
model: {onnx: r20.onnx}
data: {calibrate: calib.npz, evaluate: test.npz}
sparsify:
  pattern: 2:4
  method: sparsegpt
quantize: {recipe: fast, max_drop: 0.5}
build: {targets: [cpu], tuning_effort: 0}
gate: {max_drop: 1.5, max_memory: 200M}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the files that recipes name."""
    for name in ("r20.onnx", "calib.npz", "test.npz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "own_code.py").write_text("def function():\n    pass\n")
    return tmp_path


def read(folder: Path, text: str) -> RecipeFile:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path)


def refused(folder: Path, text: str) -> InputError:
    with pytest.raises(InputError) as caught:
        read(folder, text)
    return caught.value


def test_a_recipe_is_read_with_defaults(folder: Path) -> None:
    found = read(folder, GOOD)
    recipe = found.recipe
    assert recipe.sparsify is not None
    assert recipe.sparsify.pattern == "2:4"  # not 124 seconds, as YAML 1.1 has it
    assert recipe.sparsify.samples == 512
    assert recipe.quantize is not None
    assert recipe.quantize.max_drop == 0.5
    assert recipe.finetune is None
    assert recipe.build.targets == ("cpu",)
    assert found.place("r20.onnx") == str(folder / "r20.onnx")
    assert found.place("own_code:function") == "own_code:function"
    assert found.max_drop == 1.5


def test_the_gate_allows_a_drop_of_one_and_a_half_points_by_default(folder: Path) -> None:
    text = GOOD.replace("max_drop: 1.5, ", "")
    assert read(folder, text).max_drop == 1.5
    assert read(folder, text + "metric: spearman\n").max_drop is None
    assert read(folder, text + "metric: own_code:function\n").max_drop is None


TORCH = "model: {torch: own_code:function, example: own_code:function}\n"
# What is wrong, and the line and words of the message, and of the fix.
BAD = [
    ("name: r20\nmodel: {onx: r20.onnx}\n", 2, "model.onx: unknown", "write 'onnx' for 'onx'"),
    ("nme: r20\nmodel: {onnx: r20.onnx}\n", 1, "nme: unknown", "write 'name' for 'nme'"),
    ("model: {onnx: r20.onnx}\n", 1, "name: expected a value", "add name"),
    ("name: 20\nmodel: {onnx: r20.onnx}\n", 1, "expected text, got 20", "name: '20'"),
    ("name: a/b\nmodel: {onnx: r20.onnx}\n", 1, "a name of letters", ""),
    ("name: a\nmodel: r20.onnx\n", 2, "expected fields: {name: value}", ""),
    ("name: a\nmodel: {}\n", 2, "one of onnx and torch, got none", "write model: {onnx: FILE}"),
    (f"name: a\n{TORCH}".replace("{", "{onnx: r20.onnx, "), 2, "got both", "write model"),
    ("name: a\nmodel: {torch: own_code:function}\n", 2, "needs example inputs", "add example"),
    ("name: a\nmodel: {torch: own_code}\n", 2, "expected module:function", ""),
    ("name: a\nmodel: {onnx: none.onnx}\n", 2, "there is none at", "check the path"),
    ("name: a\nmodel: {onnx: r20.onnx, checkpoint: c.pt}\n", 2, "only a torch model", "leave"),
    (GOOD.replace("2:4", "2:5"), 5, "expected one of '2:4', '4:8'", ""),
    (GOOD.replace("  method", "  patern: 2:4\n  method"), 6, "unknown", "write 'pattern'"),
    (GOOD.replace("sparsegpt", "[a]"), 6, "got a list", ""),
    (GOOD.replace("0.5", "lots"), 7, "expected a number, got 'lots'", ""),
    (GOOD.replace("0.5", "-1"), 7, "expected 0 or more, got -1", ""),
    (GOOD.replace("0.5", ".nan"), 7, "quantize.max_drop", ""),
    (GOOD.replace("[cpu]", "cpu"), 8, "expected a list", ""),
    (GOOD.replace("[cpu]", "[]"), 8, "at least one", ""),
    (GOOD.replace("[cpu]", "[gpu]"), 8, "cpu:avx2", ""),
    (GOOD.replace("[cpu]", "[cpu, cpu]"), 8, "each target once", ""),
    (GOOD.replace("effort: 0", "effort: 4"), 8, "expected 3 or less, got 4", ""),
    (GOOD.replace("effort: 0", "effort: true"), 8, "a whole number, got true", ""),
    (GOOD.replace("200M", "200T"), 9, "a size such as 200M", ""),
    (GOOD + "seed: 0.5\n", 10, "a whole number, got 0.5", ""),
    (GOOD + f"threads: {usable_cores() + 1}\n", 10, "the cores here", ""),
    (GOOD + "shapes: {x: [0, 3]}\n", 10, "shapes.x", ""),
    (GOOD + "shapes: {x: [[1], [2]]}\n", 10, "three such lists", ""),
    (GOOD + "layers: {conv1: fast}\n", 10, "such as 2:4 int8", ""),
    (GOOD + "metric: topp1\n", 10, "expected one of top1", ""),
    (GOOD + "metric: nowhere_at_all:f\n", 10, "no module 'nowhere_at_all'", "beside the recipe"),
    (GOOD + "finetune: {epochs: 1}\n", 10, "an ONNX file cannot be trained", "leave finetune"),
    (GOOD + "publish: {repository: models, nam: x}\n", 10, "publish.nam: unknown", "'name'"),
    (GOOD + "benchmark: {vs: [tensorrt]}\n", 10, "benchmark.vs[0]", ""),
    (GOOD + "sparsify: {}\n", 10, "stands twice, first at line 4", "keep one"),
    (GOOD + "a: &x 1\n", 10, "an anchor (&x)", "write the values out"),
    (GOOD + "a: *x\n", 10, "alias", ""),
    (GOOD + "a: !!python/object/apply:os.system [id]\n", 10, "a tag", ""),
    (GOOD + "---\nname: b\n", 10, "a second document", ""),
    (GOOD + "b: }\n", 10, "", "check indentation"),
    (GOOD + "\tb: 1\n", 10, "", "check indentation"),
    ("- name\n", 1, "expected fields", "docs/pipeline.md"),
    (GOOD.replace("calibrate: calib.npz, ", ""), 6, "sparsegpt needs data.calibrate", "add data"),
    (GOOD.replace("calibrate: calib.npz, ", ""), 7, "quantize: it needs", "add data"),
    (GOOD.replace(", evaluate: test.npz", ""), 7, "needs data.evaluate", "with labels"),
    (GOOD.replace(", evaluate: test.npz", ""), 9, "gate.max_drop", ""),
    (GOOD.replace("test.npz", "tests.npz"), 3, "data.evaluate: expected a file", "check"),
    (f"name: a\n{TORCH}finetune: {{}}\n", 3, "needs data.train", "add data"),
    (f"name: a\n{TORCH}qat: {{lr: 0.1, final_lr: 1}}\n", 3, "at most lr", ""),
    (f"name: a\n{TORCH}qat: {{warmup: -1}}\n", 3, "a whole number of steps", ""),
    ("name: a\nmodel: {onnx: r20.onnx}\nsensitivity: {}\n", 3, "needs data.evaluate", "labels"),
    ("name: a\nmodel: {onnx: r20.onnx}\nsparsify: {permute: true}\n", 3, "only torch", "leave"),
    ("name: a\nmodel: {onnx: r20.onnx}\npublish: {repository: m}\n", 3, "passed a gate", "gate:"),
]


@pytest.mark.parametrize(("text", "line", "words", "fix"), BAD)
def test_each_fault_is_told_with_its_line(
    folder: Path, text: str, line: int, words: str, fix: str
) -> None:
    error = refused(folder, text)
    at = f"recipe.yaml:{line}:"
    matching = [reason for reason in error.reasons if at in reason and words in reason]
    assert matching, str(error)
    assert fix in error.fix, str(error)


def test_all_faults_are_told_at_once(folder: Path) -> None:
    error = refused(folder, "name: [a]\nmodel: {onx: b}\nseed: x\nbuild: {batch: 0}\n")
    assert [reason.split(": ")[0].rpartition(":")[2] for reason in error.reasons] == [
        "1",
        "2",
        "3",
        "4",
    ]


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read recipe"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot read recipe"):
        read_recipe(tmp_path)


def test_what_is_no_text_or_too_large_or_too_deep() -> None:
    for content, words in (
        (b"\xff\xfe\x00", "no"),
        (b"a" * (MOST_BYTES + 1), "too large"),
        (b"[" * 4000, "r.yaml"),
        (b"a: " * 3000, "r.yaml"),
        (b"\x00", "r.yaml"),
    ):
        with pytest.raises(InputError, match=words):
            read_document(content, "r.yaml")


def test_scalars_are_those_of_yaml_1_2() -> None:
    text = "a: 2:4\nb: 1e-3\nc: no\nd: 010\ne: '5'\nf: ~\ng: 1_0\nh: -.5\ni: True\nj: 2024-01-01\n"
    assert read_document(text.encode(), "r").plain == {
        "a": "2:4",
        "b": 1e-3,
        "c": "no",
        "d": 10,
        "e": "5",
        "f": None,
        "g": "1_0",
        "h": -0.5,
        "i": True,
        "j": "2024-01-01",
    }


WORDS = st.text(max_size=5)
PLAIN = st.recursive(
    WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)


def tuples(value: object) -> object:
    """Lists as the reader has them."""
    if isinstance(value, dict):
        return {key: tuples(each) for key, each in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


@given(st.dictionaries(WORDS, PLAIN, max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_yaml_writes_in_quotes_is_read_back(plain: dict[str, object]) -> None:
    text = yaml.safe_dump(plain, allow_unicode=False, default_style='"')
    found = read_document(text.encode(), "r.yaml")
    assert found.plain == tuples(plain)
    assert all(1 <= line <= text.count("\n") + 1 for line in found.lines.values())


TEXTS = st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace"))


@given(st.binary(max_size=60) | TEXTS)
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_document_or_an_error_of_ours(content: bytes) -> None:
    with suppress(InputError):
        read_document(content, "r.yaml")
