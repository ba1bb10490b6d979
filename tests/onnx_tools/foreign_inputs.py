"""What the foreign files of the data folder are given: photos, text, speech, where simple.

Every function returns the whole DATA: axis 0 counts the samples, see `twofour/core/feeds.py`.
"""

from __future__ import annotations

import io
import tarfile
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

Arrays = dict[str, np.ndarray]
COUNT = 8
FILES = (
    "basic_pitch_nmp",
    "dtln_2",
    "fastestdet",
    "har_cnn",
    "mlperftiny_ad01",
    "mlperftiny_resnet8",
    "openseeface_detection",
    "ppocr_mobile_v2_cls",
    "ppocrv2_det",
    "silero_vad_16k_op15",
    "ultraface_rfb_320_simplified",
    "ultraface_slim_320",
)


def samples(folder: Path, name: str) -> Arrays:
    """Samples for one of `FILES`."""
    return _MAKERS[name](folder)


def cifar10(folder: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first test images, float32 [count, 3, 32, 32] in 0..255, and their labels."""
    from PIL import Image

    images, labels = [], np.zeros(0)
    with tarfile.open(folder / "cifar10" / "cifar10_test.tar") as archive:
        for member in archive:
            content = archive.extractfile(member).read()
            if member.name.endswith(".webp") and len(images) * 500 < count:
                strip = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
                images.append(strip.reshape(-1, 32, 32, 3))
            elif member.name == "labels.npy":
                labels = np.load(io.BytesIO(content))
    x = np.concatenate(images)[:count].transpose(0, 3, 1, 2)
    return x.astype(np.float32), labels[:count]


def _photo(folder: Path, name: str, size: tuple[int, int]) -> np.ndarray:
    """Crops of a photo, the first of them whole: float32 [COUNT, 3, height, width], 0..255."""
    from PIL import Image

    photo = Image.open(folder / "real_inputs" / name).convert("RGB")
    width, height = photo.size
    crops = []
    for i in range(COUNT):
        cut = 0.06 * i
        box = (cut * width / 2, cut * height / 3, width * (1 - cut / 2), height * (1 - cut / 3))
        crops.append(np.asarray(photo.resize(size[::-1], box=box)))
    return np.stack(crops).transpose(0, 3, 1, 2).astype(np.float32)


def _normalized(x: np.ndarray) -> np.ndarray:
    """0..255 with the mean and deviation that ImageNet networks expect."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return ((x / 255 - mean[:, None, None]) / std[:, None, None]).astype(np.float32)


def _text(size: tuple[int, int], lines: int) -> np.ndarray:
    """White sheets with lines of text: float32 [COUNT, 3, height, width], 0..255."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = size
    rng = np.random.default_rng(0)
    sheets = []
    for _ in range(COUNT):
        sheet = Image.new("RGB", (width, height), tuple(int(c) for c in rng.integers(180, 256, 3)))
        draw = ImageDraw.Draw(sheet)
        for line in range(lines):
            font = ImageFont.load_default(size=int(height / lines * rng.uniform(0.5, 0.7)))
            words = " ".join("".join(rng.choice(list("abcdefgnorstuEHT148"), 5)) for _ in range(9))
            draw.text((width * 0.05, (line + 0.2) * height / lines), words, "black", font)
        sheets.append(np.asarray(sheet))
    return np.stack(sheets).transpose(0, 3, 1, 2).astype(np.float32)


def _speech(folder: Path) -> np.ndarray:
    """20 seconds at 16 kHz: float32 [320000] in -1..1."""
    with wave.open(str(folder / "real_inputs" / "speech_16k_20s.wav")) as file:
        raw = file.readframes(file.getnframes())
    return np.frombuffer(raw, np.int16).astype(np.float32) / 32768


def _faces(folder: Path) -> Arrays:
    return {"input": (_photo(folder, "faces.jpg", (240, 320)) - 127) / 128}


def _seeface(folder: Path) -> Arrays:
    return {"input": _normalized(_photo(folder, "faces.jpg", (224, 224)))}


def _street(folder: Path) -> Arrays:
    return {"input.1": _photo(folder, "street.jpg", (352, 352))[:, ::-1] / 255}


def _silero(folder: Path) -> Arrays:
    """Windows of 576, the state that the windows before left, and one sample rate for all."""
    speech = _speech(folder)[32000:]
    session = ort.InferenceSession(folder / "onnx" / "silero_vad_16k_op15.onnx")
    state, inputs, states = np.zeros((2, 1, 128), np.float32), [], []
    for i in range(4 * COUNT):
        window = speech[512 * i : 512 * i + 576][None]
        inputs.append(window)
        states.append(state)
        feeds = {"input": window, "state": state, "sr": np.array(16000)}
        state = session.run(None, feeds)[1]
    step = slice(None, None, 4)
    return {"input": np.stack(inputs)[step], "state": np.stack(states)[step], "sr": np.array(16000)}


def _dtln(folder: Path) -> Arrays:
    """Windows of 512 as the first stage hands them on: about the speech itself; and the states."""
    speech = _speech(folder)[32000:]
    session = ort.InferenceSession(folder / "onnx" / "dtln_2.onnx")
    state, inputs, states = np.zeros((1, 2, 128, 2), np.float32), [], []
    for i in range(4 * COUNT):
        window = speech[128 * i : 128 * i + 512][None, None]
        inputs.append(window)
        states.append(state)
        state = session.run(None, {"input_4": window, "input_5": state})[1]
    step = slice(None, None, 4)
    return {"input_4": np.concatenate(inputs)[step], "input_5": np.concatenate(states)[step]}


def _basic_pitch(folder: Path) -> Arrays:
    speech = _speech(folder)
    starts = np.linspace(0, len(speech) - 43844, COUNT).astype(int)
    windows = np.stack([speech[i : i + 43844] for i in starts])
    return {"serving_default_input_2:0": windows[..., None]}


def _random(name: str, *shape: int) -> Callable[[Path], Arrays]:
    def make(folder: Path) -> Arrays:
        rng = np.random.default_rng(0)
        return {name: rng.standard_normal((COUNT, *shape)).astype(np.float32)}

    return make


_MAKERS: dict[str, Callable[[Path], Arrays]] = {
    "basic_pitch_nmp": _basic_pitch,
    "dtln_2": _dtln,
    "fastestdet": _street,
    "har_cnn": _random("inputs:0", 9, 128),
    "mlperftiny_ad01": _random("input_1", 640),
    "mlperftiny_resnet8": lambda folder: {"input_1": cifar10(folder, 64)[0]},
    "openseeface_detection": _seeface,
    "ppocr_mobile_v2_cls": lambda folder: {"x": _text((48, 192), 1) / 127.5 - 1},
    "ppocrv2_det": lambda folder: {"x": _normalized(_text((320, 320), 8))},
    "silero_vad_16k_op15": _silero,
    "ultraface_rfb_320_simplified": _faces,
    "ultraface_slim_320": _faces,
}
