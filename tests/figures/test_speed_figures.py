import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from figures.speed import time_profile

pytestmark = pytest.mark.usefixtures("legible")


def test_the_time_of_a_step_is_compared_with_the_peak(tmp_path, monkeypatch):
    labels = []
    text = Axes.text
    monkeypatch.setattr(
        Axes, "text", lambda *arguments, **named: (labels.append(arguments[3]), text(*arguments, **named))
    )
    layer, images = torch.nn.Conv2d(1, 2, 3), torch.randn(2, 1, 8, 8)
    for name in ("bare_loop", "ours"):
        monkeypatch.setattr(f"figures.speed.{name}", lambda *_: lambda: layer(images).sum().backward())
    (picture,) = time_profile(1, tmp_path)
    assert Image.open(picture).width > 1000
    assert len(labels) == 3 and all(text.endswith("% of the peak") for text in labels)
