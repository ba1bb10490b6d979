"""Two real processes (gloo): the same masks on both, held on whole weights and on parts of them."""

import json
from pathlib import Path

import pytest

from tests.train.processes import two_processes

WORKER = Path(__file__).with_name("two_processes.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each process saw, the first one's first."""
    folder = two_processes(WORKER, tmp_path_factory.mktemp("job"))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_ddp_has_the_masks_of_the_first_process_where_weights_differed(seen):
    first, second = (each["ddp"] for each in seen)
    assert first["own"] != second["own"]  # else there is nothing to agree about
    assert first["masks"] == first["own"]
    assert second["masks"] == first["own"]
    assert first["weights"] == second["weights"]


def test_a_wrapped_model_is_named_like_the_one_inside(seen):
    first, second = (each["ddp_wrapped_first"] for each in seen)
    assert first["names"] == ["0", "2"]
    assert first["masks"] == second["masks"]
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("case", ["fsdp_prune_first", "fsdp_shard_first"])
def test_fsdp2_holds_masks_on_the_parts(seen, case):
    first, second = (each[case] for each in seen)
    assert first["masks"] == second["masks"] == first["expected"]
    assert (first["local_rows"], second["local_rows"]) == ([4, 16, 1], [3, 16, 0])
    for each in (first, second):
        assert each["strays"] == [{"tensors": 3, "count": 0}] * 3  # weight and Adam's two
        assert each["gathered"] == 1
        assert each["restored"]
    assert first["weights"] == second["weights"]


def test_both_ways_to_shard_train_alike(seen):
    assert seen[0]["fsdp_prune_first"]["weights"] == seen[0]["fsdp_shard_first"]["weights"]


def test_a_sharded_checkpoint_is_restored_into_a_sharded_model(seen):
    assert all(each["resumed_in_parts"]["equal"] for each in seen)


def test_different_models_are_an_error_on_every_process(seen):
    for each in seen:
        error = each["different_models"]["error"]
        assert error.startswith("processes mask different weights")
        assert "process 1 has [('0', (8, 8)), ('1', (16, 8))]" in error
