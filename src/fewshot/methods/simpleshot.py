"""SimpleShot (Wang, Chao, Weinberger & van der Maaten, 2019, arXiv 1911.04623)."""

import torch

from fewshot.methods.training_free import TrainingFree, prototypes, squared_distances


class SimpleShot(TrainingFree):
    """Nearest class mean of transformed embeddings: UN, L2N and CL2N of the paper, by ``features``.

    Args:
        encoder: see ``TrainingFree``.
        features: see ``TrainingFree``; the paper's transformations are its section 3.1.
        centre: see ``TrainingFree``; the paper uses the training classes.
    """

    def classify(self, support: torch.Tensor, labels: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """Return minus the squared distances to the class means; the nearest one is the paper's answer (equation 1)."""
        return -squared_distances(query, prototypes(support, labels))
