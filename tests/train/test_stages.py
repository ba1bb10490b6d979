"""The training stages, one after the other in this process: what they leave and refuse."""

import json
import os
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.train import recipe_code
from twofour.core.errors import GateError, InputError, UnsupportedError
from twofour.core.progress import silent
from twofour.train import Sparsifier
from twofour.train.export_stage import export
from twofour.train.quantize_run import quantizers_of
from twofour.train.settings import QatSettings, SparsifySettings, TrainSettings, settings_of
from twofour.train.stages import MASKS, MODEL, Task, load, loaded, sparsify
from twofour.train.states import read_facts
from twofour.train.train_stages import CHECKPOINT, finetune, qat, teacher_of

CODE = "tests.train.recipe_code"
SETTINGS = TrainSettings(epochs=3, lr=0.05)
SPARSIFY = SparsifySettings(exclude=("linear",), permute=True)


def task(folder, report=silent, **changes):
    """A task in a folder that is made, on the small network."""
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    made = Task(
        model=f"{CODE}:model",
        example=f"{CODE}:example",
        checkpoint=None,
        input_names=("x",),
        output_names=("y",),
        dynamic=("batch",),
        train=f"{CODE}:train",
        calibrate=f"{CODE}:calibrate",
        seed=3,
        inputs={},
        output=folder / "out",
        scratch=folder / "scratch",
        report=report,
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Folder of each stage -> what it left, made by the whole chain once."""
    root = tmp_path_factory.mktemp("chain")
    done = {}
    done["load"] = load(task(root / "load"))
    dense = root / "load" / "out" / MODEL
    done["sparsify"] = sparsify(task(root / "sparsify", inputs={"start": dense}), SPARSIFY)
    pruned = root / "sparsify" / "out" / MODEL
    both = {"start": pruned, "teacher": dense}
    done["finetune"] = finetune(task(root / "finetune", inputs=both), SETTINGS)
    tuned = root / "finetune" / "out" / MODEL
    both = {"start": tuned, "teacher": dense}
    done["qat"] = qat(task(root / "qat", inputs=both), QatSettings(epochs=1))
    quantized = root / "qat" / "out" / MODEL
    return SimpleNamespace(
        root=root, done=done, dense=dense, pruned=pruned, tuned=tuned, quantized=quantized
    )


def outputs(path, tmp_path, name="start"):
    found = loaded(task(tmp_path / "any", inputs={name: path}), name)
    x = torch.from_numpy(recipe_code.load_digits().test_x[:32])
    with torch.no_grad():
        return found.model(x).numpy()


def masks_hold(path):
    """Each masked weight is zero where its mask is, and 2:4."""
    state = load_file(path)
    masks = {n.removesuffix("_mask"): m for n, m in state.items() if n.endswith("_mask")}
    assert set(masks) == {f"layer1.{n}.weight" for n in ("conv1", "conv2", "shortcut.0")}
    for name, mask in masks.items():
        assert mask.dtype is torch.bool
        assert int((state[name][~mask] != 0).sum()) == 0
        groups = state[name].flatten(2).reshape(len(mask), -1, 4, mask[0, 0].numel())
        assert int((groups != 0).sum(2).max()) == 2
    return masks


def test_load_keeps_the_users_weights(chain):
    state = load_file(chain.dense)
    assert bool((state["linear.bias"] == 0.25).all())
    assert read_facts(chain.dense).patterns == {}
    assert chain.done["load"].document == {"parameters": sum_of_parameters()}


def sum_of_parameters():
    return sum(p.numel() for p in recipe_code.Net().parameters())


def test_masks_are_kept_apart_too_with_their_hashes(chain):
    in_model = masks_hold(chain.pruned)
    apart = load_file(chain.root / "sparsify" / "out" / MASKS)
    assert {f"{name}.weight" for name in apart} == set(in_model)
    assert all(torch.equal(mask, in_model[f"{name}.weight"]) for name, mask in apart.items())
    with safe_open(chain.root / "sparsify" / "out" / MASKS, "pt") as file:
        header = json.loads(file.metadata()["twofour"])
    assert header["masks"] == read_facts(chain.pruned).masks
    assert set(header["patterns"].values()) == {"2:4"}
    layers = {each["name"]: each for each in chain.done["sparsify"].document["layers"]}
    assert layers["layer1.conv1"]["pruned"]
    assert not layers["linear"]["pruned"]


def test_the_stages_depend_on_nothing_but_what_they_are_given(chain, tmp_path):
    torch.rand(5)  # whatever was drawn before
    again = task(tmp_path / "sparsify", inputs={"start": chain.dense})
    sparsify(again, SPARSIFY)
    assert (again.output / MODEL).read_bytes() == chain.pruned.read_bytes()
    both = {"start": chain.pruned, "teacher": chain.dense}
    again = task(tmp_path / "finetune", inputs=both)
    finetune(again, SETTINGS)
    assert (again.output / MODEL).read_bytes() == chain.tuned.read_bytes()


def test_training_changes_weights_and_keeps_masks(chain):
    before, after = load_file(chain.pruned), load_file(chain.tuned)
    assert not torch.equal(before["layer1.conv1.weight"], after["layer1.conv1.weight"])
    masks = masks_hold(chain.tuned)
    assert all(torch.equal(masks[n], before[f"{n}_mask"]) for n in masks)
    epochs = chain.done["finetune"].document["epochs"]
    assert [each["epoch"] for each in epochs] == [1, 2, 3]
    assert all(each["loss"] > 0 and 0 <= each["accuracy"] <= 1 for each in epochs)
    assert chain.done["finetune"].text.startswith("3 epochs, loss ")


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["finetune", "qat"])
def test_a_stopped_run_ends_with_the_same_bits(chain, tmp_path, stage):
    start = {"finetune": chain.pruned, "qat": chain.tuned}[stage]
    both = {"start": start, "teacher": chain.dense}
    run, settings = {
        "finetune": (finetune, SETTINGS),
        "qat": (qat, QatSettings(epochs=2, learned_scales=True)),
    }[stage]

    def stop(done, total, what):
        if what.startswith("epoch 2") and (tmp_path / "b" / "scratch" / CHECKPOINT).exists():
            raise Stop

    run(task(tmp_path / "a", inputs=both), settings)
    with pytest.raises(Stop):
        run(task(tmp_path / "b", stop, inputs=both), settings)
    assert not (tmp_path / "b" / "out" / MODEL).exists()
    run(task(tmp_path / "b", inputs=both), settings)
    straight, resumed = (tmp_path / name / "out" / MODEL for name in "ab")
    assert straight.read_bytes() == resumed.read_bytes()


def test_qat_leaves_scales_that_the_next_stage_finds(chain, tmp_path):
    masks_hold(chain.quantized)
    start = loaded(task(tmp_path, inputs={"start": chain.quantized}), "start")
    assert start.facts.quantizer == QatSettings().quantizer()
    assert quantizers_of(start.model).state == "on"
    assert start.sparsifier.locked
    assert chain.done["qat"].document["places"]["weight"] == 5


@pytest.mark.parametrize("name", ["dense", "tuned", "quantized"])
def test_export_writes_what_the_model_computes(chain, tmp_path, name):
    made = export(task(tmp_path, inputs={name: getattr(chain, name)}), name)
    assert made.path == tmp_path / "out" / f"{name}.onnx"
    assert made.quantized == (name == "quantized")
    assert set(made.patterns.values()) == ({"2:4"} if name != "dense" else set())
    assert made.inputs["x"].shape == (8, 1, 8, 8)
    np.testing.assert_array_equal(
        made.outputs["y"], outputs_of(chain, tmp_path, name, made.inputs["x"])
    )


def outputs_of(chain, tmp_path, name, x):
    start = loaded(task(tmp_path / "again", inputs={name: getattr(chain, name)}), name)
    with torch.no_grad():
        return start.model(torch.from_numpy(x)).numpy()


def test_hidden_layers_are_compared_in_the_students_order(chain, tmp_path):
    """The teacher's channels are permuted as the student's were, before masks."""
    made = task(tmp_path, inputs={"start": chain.pruned, "teacher": chain.dense})
    start = loaded(made, "start")
    teacher = teacher_of(made, replace(SETTINGS, hidden={"layer1.conv1": 1.0}), start)
    plain = teacher_of(made, SETTINGS, start)
    kept = start.sparsifier.weights[0]
    assert kept.name == "layer1.conv1"
    given, ordered = (each.get_parameter("layer1.conv1.weight") for each in (plain, teacher))
    assert torch.equal(kept.parameter, ordered * kept.mask)
    assert not torch.equal(kept.parameter, given * kept.mask)
    x = recipe_code.example()
    torch.testing.assert_close(teacher(x), plain(x))


def test_a_teacher_of_other_weights_has_no_such_order(chain, tmp_path):
    state = load_file(chain.dense)
    state["layer1.conv1.weight"] += 1
    with safe_open(chain.dense, "pt") as file:
        save_file(state, tmp_path / "other.safetensors", file.metadata())
    both = {"start": chain.pruned, "teacher": tmp_path / "other.safetensors"}
    with pytest.raises(InputError, match="cannot be brought into the order"):
        finetune(task(tmp_path, inputs=both), replace(SETTINGS, hidden={"layer1": 1.0}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layer1.conv1.weight_mask", lambda t: ~t, "other masks than were saved"),
        ("layer1.conv1.weight", lambda t: t + 1, "broke their pattern"),
    ],
)
def test_what_was_changed_between_two_stages_is_found(chain, tmp_path, name, change, message):
    state = load_file(chain.pruned)
    state[name] = change(state[name])
    with safe_open(chain.pruned, "pt") as file:
        save_file(state, tmp_path / MODEL, file.metadata())
    with pytest.raises(GateError, match=message):
        loaded(task(tmp_path / "t", inputs={"start": tmp_path / MODEL}), "start")


def test_masks_are_compared_with_those_that_were_chosen(chain, tmp_path):
    masks = chain.root / "sparsify" / "out" / MASKS
    given = {"start": chain.tuned, "teacher": chain.dense, "masks": masks}
    assert loaded(task(tmp_path / "a", inputs=given), "start").sparsifier is not None
    assert loaded(task(tmp_path / "a", inputs=given), "teacher").sparsifier is None
    other = load_file(masks)
    other["layer1.conv1"] = other["layer1.conv1"].flip(0)
    save_file(other, tmp_path / MASKS)
    made = task(tmp_path / "b", inputs={**given, "masks": tmp_path / MASKS})
    with pytest.raises(GateError, match="masks are not those of"):
        loaded(made, "start")


def test_files_that_are_none_are_refused(chain, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(chain.pruned.read_bytes()[:500])
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    for name in ("cut", "plain", "missing"):
        made = task(tmp_path / "t", inputs={"start": tmp_path / f"{name}.safetensors"})
        with pytest.raises(InputError, match="cannot read the weights"):
            loaded(made, "start")
    other = task(tmp_path / "t", inputs={"start": chain.dense}, model=f"{CODE}:plain")
    with pytest.raises(InputError, match="of another model"):
        loaded(other, "start")
    with pytest.raises(InputError, match="needs the model 'teacher'"):
        finetune(task(tmp_path / "t", inputs={"start": chain.pruned}), SETTINGS)


# The user's checkpoint.


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["torch", "pickle", "nested"])
def test_no_pickle_is_executed(tmp_path, how):
    planted, path = tmp_path / "planted", tmp_path / "attack.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(Attack(planted)))
    else:
        state = recipe_code.Net().state_dict()
        torch.save({"state_dict": state, "more": Attack(planted)}, path)
    with pytest.raises(InputError, match="cannot read the checkpoint") as caught:
        load(task(tmp_path / "t", checkpoint=path))
    assert not planted.exists()
    assert "save the weights alone" in caught.value.fix
    assert not (tmp_path / "t" / "out" / MODEL).exists()


@pytest.mark.parametrize("form", ["pt", "nested", "parallel", "safetensors"])
def test_checkpoints_of_all_forms(tmp_path, form):
    state = recipe_code.Net().state_dict()
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        counters = [name for name in state if name.endswith("num_batches_tracked")]
        save_file({n: v for n, v in state.items() if n not in counters}, path)
    elif form == "nested":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif form == "parallel":
        torch.save({f"module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    made = task(tmp_path / "t", checkpoint=path)
    load(made)
    found = load_file(made.output / MODEL)
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert not bool((found["linear.bias"] == 0.25).any())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"linear.weight": torch.zeros(10, 32)}, "missing: conv1.weight"),
        ({"conv1.weight": torch.zeros(1)}, "size mismatch"),
        ({"epoch": 3}, "holds no weights"),
        ([torch.zeros(1)], "expected a mapping of names to tensors, got a list"),
    ],
)
def test_checkpoints_of_other_models_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(InputError, match=message):
        load(task(tmp_path / "t", checkpoint=tmp_path / "w.pt"))


# The user's functions.


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model", "no_such_module:model", "cannot import model no_such_module:model"),
        ("model", f"{CODE}:no_such", "no model function"),
        ("model", f"{CODE}:nothing", "expected a torch.nn.Module, got NoneType"),
        ("example", f"{CODE}:nothing", "expected tensors whose axis 0 counts samples"),
        ("example", f"{CODE}:two_arguments", "expected the first arguments of forward: x"),
        ("input_names", ("x", "z"), "expected a name for each tensor, got 2 names"),
    ],
)
def test_functions_that_do_not_fit_are_refused(tmp_path, field, value, message):
    with pytest.raises(InputError, match=message):
        load(task(tmp_path, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value", "settings", "message"),
    [
        ("train", None, {}, "the recipe has no data.train"),
        ("train", f"{CODE}:nothing", {}, "expected a list of batches"),
        ("train", f"{CODE}:train", {"loss": f"{CODE}:nothing", "distil": False}, "cannot train"),
        ("train", f"{CODE}:train", {"hidden": {"layer9": 1.0}}, "has no module 'layer9'"),
    ],
)
def test_training_that_cannot_be_done(chain, tmp_path, field, value, settings, message):
    both = {"start": chain.pruned, "teacher": chain.dense}
    made = task(tmp_path, inputs=both, **{field: value})
    with pytest.raises(InputError, match=message):
        finetune(made, replace(SETTINGS, **settings))
    assert not (made.output / MODEL).exists()


@pytest.mark.parametrize(
    ("calibrate", "message"),
    [
        (None, "the recipe has no data.calibrate"),
        (f"{CODE}:wrong_names", "has no array for input 'x'"),
        (f"{CODE}:nothing", "expected an iterable of dicts of arrays"),
    ],
)
def test_calibration_data_that_is_none(chain, tmp_path, calibrate, message):
    made = task(tmp_path, inputs={"start": chain.dense}, calibrate=calibrate)
    with pytest.raises(InputError, match=message):
        sparsify(made, replace(SPARSIFY, method="sparsegpt"))


def test_a_loss_of_ones_own_and_no_teacher(chain, tmp_path):
    settings = TrainSettings(epochs=1, lr=0.01, distil=False, loss=f"{CODE}:loss")
    done = finetune(task(tmp_path, inputs={"start": chain.pruned}), settings)
    assert done.document["epochs"][0]["accuracy"] is None
    masks_hold(tmp_path / "out" / MODEL)


def test_a_dense_model_is_trained_too(chain, tmp_path):
    settings = TrainSettings(epochs=1, lr=0.01, distil=False)
    made = task(tmp_path, inputs={"start": chain.dense})
    finetune(made, settings)
    assert not any(name.endswith("_mask") for name in load_file(made.output / MODEL))


def test_settings():
    found = settings_of(QatSettings, {"exclude": ["linear"], "dense": True, "weight_decay": 0.5})
    assert found.exclude == ("linear",)
    assert found.schedule(7).optimizer.weight_decay == 0.5
    assert found.schedule(7).seed == 7
    adam = TrainSettings(optimizer="adamw", momentum=0.5)
    assert adam.schedule(0).optimizer.weight_decay == 0.01
    with pytest.raises(InputError, match="unknown settings: epoch"):
        settings_of(TrainSettings, {"epoch": 3})
    for wrong in ({"optimizer": "lion"}, {"parallel": "tensor"}, {"loss": "a:b"}):
        with pytest.raises(InputError, match="cannot train like this"):
            TrainSettings(**wrong)


def test_qat_spreads_no_weights(chain, tmp_path):
    with pytest.raises(UnsupportedError, match="cannot spread weights"):
        qat(task(tmp_path, inputs={"start": chain.tuned}), QatSettings(parallel="fsdp2"))


def test_a_model_that_has_a_pattern_already_may_be_loaded_dense(chain, tmp_path):
    """What a file says counts, not what its zeros look like."""
    model = recipe_code.Net()
    Sparsifier(model, exclude=["linear"]).prune().remove()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    made = task(tmp_path / "t", checkpoint=tmp_path / "w.pt")
    load(made)
    assert read_facts(made.output / MODEL).patterns == {}
