"""Methods that use feature maps instead of embeddings."""

import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn

from fewshot.config import compose
from fewshot.distances import l2
from fewshot.encoders import feature_maps
from fewshot.encoders.conv4 import Conv4
from fewshot.errors import FewShotError
from fewshot.methods.base import MetricMethod
from fewshot.training import make_data


class Densest(MetricMethod):
    """Compares regions of images, and records the shapes it gets."""

    def __init__(self, encoder, distance):
        super().__init__(encoder, distance)
        self.shapes = set()

    def embed_images(self, images):
        return feature_maps(self.encoder, images)

    def compare(self, embedded):
        self.shapes |= {tuple(embedded.support.shape[1:]), tuple(embedded.query.shape[1:])}
        members = torch.nn.functional.one_hot(embedded.support_labels, embedded.way).T.float()
        prototypes = (members @ embedded.support.flatten(1)) / members.sum(1, keepdim=True)
        return -self.distance(embedded.query.flatten(1), prototypes)


@pytest.mark.filterwarnings("ignore")
def test_a_method_gets_maps_in_training_evaluation_and_prediction(cache_dir):
    tiny = ["way=3", "query=2", "train.way=3", "train.episodes=2", "val.episodes=2", "test.episodes=2"]
    data = make_data(compose(*tiny, "run_dir=x", f"cache_dir={cache_dir}"))
    method = Densest(Conv4(1, 28, filters=8), l2)
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(method, data)
    trainer.test(method, data, verbose=False)
    method.classifier(torch.rand(2, 1, 28, 28), torch.tensor([0, 1]), 2)(torch.rand(4, 1, 28, 28))
    assert method.shapes == {(8, 1, 1)}


def test_error_names_an_encoder_without_feature_maps():
    with pytest.raises(FewShotError, match="the encoder Flatten has no feature maps; choose encoder=conv4"):
        feature_maps(nn.Flatten(), torch.rand(1, 1, 28, 28))
