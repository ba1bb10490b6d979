"""What a recipe would name as `tests.train.recipe_code:...`: a small network, and real scans."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from twofour.train.digits import Block, load_digits

CLASSES = 10


class Net(nn.Module):
    """One residual block and a classifier."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = Block(16, 32, 2)
        self.linear = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = self.layer1(functional.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


class Plain(nn.Module):
    """Nothing that looks at a whole batch: several processes compute what one does."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, x):
        return self.layers(x.flatten(1))


def model(pretrained=True):
    made = Net()
    if pretrained:
        with torch.no_grad():
            made.linear.bias.fill_(0.25)
            for _ in range(30):  # BatchNorm's statistics
                made(torch.from_numpy(load_digits().train_x[:256]))
    return made


def plain():
    return Plain()


def example():
    return torch.from_numpy(load_digits().train_x[:2])


def batches(first, count=4, size=32):
    digits = load_digits()
    x, labels = torch.from_numpy(digits.train_x), torch.from_numpy(digits.train_y)
    at = [slice(i * size, (i + 1) * size) for i in range(first, first + count)]
    return [(x[rows] + 0.1 * torch.randn(x[rows].shape), labels[rows]) for rows in at]


def train(epoch):
    return batches(4 * (epoch % 3))


def killed(epoch):
    """As `train`, but where the file that KILL_ONCE names is gone, the process is killed."""
    path = Path(os.environ["KILL_ONCE"])
    if epoch == 2 and not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return train(epoch)


def stuck(epoch):
    """Tells which process it is, and never returns."""
    Path(os.environ["STUCK"], str(os.getpid())).touch()
    time.sleep(3600)


def talks(epoch):
    print("seen by nobody but the log")
    return train(epoch)


def raises(*arguments):
    raise ValueError("no such scan")


def raises_in_the_second(epoch):
    if os.environ["RANK"] == "1":
        raise ValueError("the second process alone")
    return train(epoch)


def small(epoch):
    x, labels = batches(0, 1)[0]
    return [(x[:1], labels[:1])]


def nothing(*arguments):
    return None


def two_arguments():
    return {"x": torch.zeros(2, 1, 8, 8), "y": torch.zeros(2, 1)}


def loss(model, batch):
    x, labels = batch
    return functional.cross_entropy(model(x), labels)


def calibrate():
    yield {"x": load_digits().train_x[:64]}


def wrong_names():
    yield {"image": load_digits().train_x[:64]}
