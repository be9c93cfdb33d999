import numpy as np
import pytest

from conftest import layout_faults, make_bank
from fewshot.data.episodes import EpisodeDataset, EpisodeNumber
from fewshot.pictures import draw_classes, draw_confusion, draw_episode


@pytest.mark.parametrize(("way", "channels"), [(3, 1), (12, 3)])
def test_an_episode_is_drawn_with_its_wrong_answers(way, channels):
    bank = make_bank({"test": [30] * way}, channels=channels)
    episode = EpisodeDataset(bank, "test", way=way, shot=2, query=9, seed=0)[EpisodeNumber(0, 0)]
    answers = episode.query_labels.numpy().copy()
    answers[0] = 1
    figure = draw_episode(bank, episode, answers)
    assert not layout_faults(figure) and not layout_faults(draw_episode(bank, episode, answers, 1, 4))
    (axes,) = figure.axes
    wrong, support, queries = (text.get_text() for text in axes.texts)
    assert (wrong, support) == ("2", "support")
    assert queries.startswith(f"queries: {len(answers) - 1} of {len(answers)} right")
    assert sorted(patch.get_linewidth() for patch in axes.patches) == [0.8] * (min(way, 10) * 9 - 1) + [3.5]
    (unsolved,) = draw_episode(bank, episode).axes
    assert [text.get_text() for text in unsolved.texts] == ["support", "queries"] and not unsolved.patches


def test_few_classes_are_drawn_as_a_matrix_and_many_by_their_accuracy():
    for count, panels in ((5, 2), (40, 2)):
        together = np.full((count, count), 4)
        together[-1] = together[:, -1] = 0  # a class that was in no episode
        predicted = np.where(np.eye(count, dtype=bool), 3, 0) * (together > 0)
        predicted[0, 0], predicted[0, 1] = 1, 3
        figure = draw_classes(together, predicted, [f"$class {number}" for number in range(count)])
        assert len(figure.axes) == panels
        assert not layout_faults(figure)
        if count == 5:
            assert figure.axes[0].images[0].get_array()[0].tolist() == [0.25, 0.75, 0, 0]
        else:
            hardest, every = figure.axes
            assert "all 39 test classes" in every.get_xlabel()
            assert hardest.patches[0].get_width() == 25
            assert hardest.texts[0].get_text() == r"\$class 1"  # not a formula


def test_confusions_are_relative_to_queries_whose_episode_contained_both_classes():
    together, predicted = np.array([[2, 0, 2], [0, 2, 2], [2, 2, 4]]), np.array([[1, 0, 1], [0, 0, 2], [0, 0, 4]])
    axes, _ = draw_confusion(together, predicted, ["a", "b", "c"], np.array([2, 0, 1])).axes
    expected = np.ma.masked_invalid([[1, 0, 0], [0.5, 0.5, np.nan], [1, np.nan, 0]])
    np.testing.assert_array_equal(axes.images[0].get_array().filled(-1), expected.filled(-1))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c", "a", "b"]
