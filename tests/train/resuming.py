"""Fine-tuning that stops in the middle of an epoch, and goes on."""

import pytest
import torch

from twofour.train import finetune


class Stop(Exception):
    """Raised by a run's progress."""


def stopped_and_resumed(prepare, batches, schedule, folder, stop_in):
    """Runs straight, and stopped in an epoch and resumed; both have to end with the same bits.

    Args:
        prepare: makes a model and the method that it is trained by.
        batches: as of `finetune`.
        schedule: as of `finetune`.
        folder: for checkpoints; `run.pt` is that of the run that was stopped.
        stop_in: number of the epoch.

    Returns:
        The history, and the state of the model.
    """

    def run(path, stop_in=None):
        def progress(at):
            if at.epoch == stop_in:
                raise Stop

        model, method = prepare()
        history = finetune(
            model, batches, schedule, method=method, checkpoint=path, progress=progress
        )
        method.sparsifier.verify()
        return history, model.state_dict()

    history, expected = run(folder / "straight.pt")
    with pytest.raises(Stop):
        run(folder / "run.pt", stop_in)
    for _ in range(2):  # the second time it is finished already
        again, state = run(folder / "run.pt")
        assert again == history
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    return history, expected
