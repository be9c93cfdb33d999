import pytest
from matplotlib.figure import Figure

from fewshot.errors import FewShotError
from figures.scale import scale

pytestmark = pytest.mark.usefixtures("legible")


def test_each_size_is_built_and_drawn_from(tmp_path, monkeypatch):
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k)))
    (picture,) = scale([400 * 4, 800 * 4], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [picture.name]  # the banks are removed
    for axes in figures[0].axes:
        assert all(line.get_xdata().tolist() == [1600, 3200] for line in axes.lines)
        assert all((line.get_ydata() > 0).all() for line in axes.lines)
    images = next(line for line in figures[0].axes[3].lines if line.get_label() == "images")
    assert images.get_ydata().tolist() == [1600 * 28**2 / 2**20, 3200 * 28**2 / 2**20]


@pytest.mark.parametrize("images", [[], [1000, 100]])
def test_a_data_set_too_small_for_the_episodes_is_named(tmp_path, images):
    with pytest.raises(FewShotError, match=r"figure\.images=\[.*\] must be numbers of at least 1600 images"):
        scale(images, tmp_path)
