"""The Lightning data module: from a data set's configuration to normalised episodes on the device."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from fewshot.data.bank import ImageBank, open_bank
from fewshot.data.episodes import Episode, EpisodeDataset, EpisodeNumber, MetaBatchSampler, stack
from fewshot.data.images import normalise
from fewshot.errors import printable

EVALUATED_TOGETHER = 20  # episodes in a meta-batch of validation and test; changes no result
EMBEDDED_TOGETHER = 256  # images


class EpisodeDataModule(pl.LightningDataModule):
    """Serves n-way k-shot episodes of the three splits of a data set, by the meta-batch.

    Args:
        dataset: the configuration group ``dataset``.
        way: classes in an episode of validation and test.
        shot: support samples a class there.
        query: queries a class there.
        train: the same for training, with ``episodes`` in all and in a ``meta_batch``.
        val: ``episodes`` of one validation, and how many training episodes lie between two (``every``, rounded up to
            whole meta-batches).
        test: ``episodes`` of the test.
        seed: draws the training episodes.
        eval_seed: draws those of validation and test: whatever the training's seed, they stay the same.
        checkpoint_every: training episodes from one checkpoint to the next, likewise; a validation brings one too.
        cache_dir: where image banks are kept.

    Attributes:
        trained: how many training episodes are done, over all ranks.
        stage: the training episodes from the last checkpoint to the next, counted likewise.
    """

    def __init__(
        self,
        dataset: DictConfig,
        *,
        way: int,
        shot: int,
        query: int,
        train: DictConfig,
        val: DictConfig,
        test: DictConfig,
        seed: int,
        eval_seed: int,
        checkpoint_every: int,
        cache_dir: str,
    ) -> None:
        super().__init__()
        self.dataset, self.cache_dir = dataset, cache_dir
        self.episode = {"way": way, "shot": shot, "query": query, "seed": eval_seed}
        self.train_episode = {"way": train.way, "shot": train.shot, "query": train.query, "seed": seed}
        self.train_episodes, self.meta_batch = train.episodes, train.meta_batch
        self.every, self.checkpoint_every = (
            -(-every // train.meta_batch) * train.meta_batch for every in (val.every, checkpoint_every)
        )
        self.trained = 0
        self.stage = range(0)
        self.episodes = {"val": val.episodes, "test": test.episodes}
        self._bank: ImageBank | None = None
        self._resident: torch.Tensor | None = None  # the bank's images on the GPU
        # For each image of the bank its row in the embeddings of those that the last evaluation used, and these.
        self._embedded: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def bank(self) -> ImageBank:
        """The images of the data set; opened, or built, when first asked for."""
        if self._bank is None:
            source = self.dataset.source
            name = source._target_.rpartition(".")[2]
            settings = OmegaConf.to_container(source, resolve=True)
            self._bank = open_bank(name, instantiate(source), settings, self.cache_dir)
            for finding in self._bank.findings:
                rank_zero_only(print)(f"warning: {name}: {printable(finding)}", flush=True)
        return self._bank

    def prepare_data(self) -> None:
        """Download and build on one process a machine; the others open what it built."""
        self.bank  # noqa: B018

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Check all three splits against what is asked of them before anything slow begins."""
        self.datasets = {
            split: EpisodeDataset(self.bank, split, **(self.train_episode if split == "train" else self.episode))
            for split in ("train", "val", "test")
        }

    @property
    def validates(self) -> bool:
        """Whether a validation follows the current stage."""
        return self.stage.stop % self.every == 0 or self.stage.stop == self.train_episodes

    def train_dataloader(self) -> DataLoader[Episode]:
        """The meta-batches from the episodes trained so far to the next checkpoint or validation."""
        epoch, first = divmod(self.trained, self.every)
        checkpoint = (first // self.checkpoint_every + 1) * self.checkpoint_every
        stop = min(epoch * self.every + min(checkpoint, self.every), self.train_episodes)
        self.stage = range(self.trained, stop)
        return self._loader("train", len(self.stage), self.meta_batch, epoch, first)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"trained": self.trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the episodes that a checkpoint has been trained on."""
        self.trained = state_dict["trained"]

    def val_dataloader(self) -> DataLoader[Episode]:
        """The validation episodes, the same at every epoch."""
        return self._loader("val", self.episodes["val"], EVALUATED_TOGETHER)

    def test_dataloader(self) -> DataLoader[Episode]:
        """The test episodes."""
        return self._loader("test", self.episodes["test"], EVALUATED_TOGETHER)

    def _loader(
        self, split: str, episodes: int, meta_batch: int, epoch: int = 0, first: int = 0
    ) -> DataLoader[Episode]:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = MetaBatchSampler(episodes, max(meta_batch, world_size), epoch, first, rank, world_size)
        # No worker processes: an episode is drawn far quicker than it could be sent from one. PyTorch's loaders draw a
        # number they do not need; from a generator of its own, so that a resumed run draws on as the first would have.
        generator = torch.Generator()
        return DataLoader(self.datasets[split], batch_sampler=sampler, collate_fn=stack, generator=generator)

    def embed(self, split: str, encoder: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Have the episodes of validation or test hold embeddings in place of images, each image embedded once.

        Args:
            split: "val" or "test".
            encoder: ``[images, channels, height, width]`` to ``[images, features]``, each image by itself.
        """
        episodes = (self.datasets[split][EpisodeNumber(0, number)] for number in range(self.episodes[split]))
        # All processes embed the images of all, in the same order: an embedding's last bit may depend on its batch.
        used = torch.cat([torch.cat([episode.support, episode.query]) for episode in episodes]).unique()
        device = self._method.device
        rows = torch.zeros(len(self.bank.images), dtype=torch.int64, device=device)
        rows[used.to(device)] = torch.arange(len(used), device=device)
        pieces = (self.images_at(piece.to(device)) for piece in used.split(EMBEDDED_TOGETHER))
        self._embedded = rows, torch.cat([encoder(images) for images in pieces])

    def images_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Images of the bank as a method takes them: ``[..., channels, height, width]``, floating point.

        Args:
            positions: in the bank, int64 ``[...]``, on the device the images are to be on.
        """
        images = self.bank.images
        if positions.is_cuda and self._resident is None and 4 * images.nbytes < torch.cuda.mem_get_info()[0]:
            self._resident = images.to(positions.device)  # gathered there from now on, without waiting for the host
        pixels = images[positions.cpu()].to(positions.device) if self._resident is None else self._resident[positions]
        return normalise(pixels, self.dataset.normalise).to(self._method.dtype)

    def on_after_batch_transfer(self, batch: Episode, dataloader_idx: int) -> Episode:  # noqa: ARG002
        """Put images, or embeddings, where their positions are."""
        if self._embedded is not None and not self.trainer.training:  # type: ignore[union-attr]
            rows, embeddings = self._embedded
            return batch._replace(support=embeddings[rows[batch.support]], query=embeddings[rows[batch.query]])
        return batch._replace(support=self.images_at(batch.support), query=self.images_at(batch.query))

    @property
    def _method(self) -> pl.LightningModule:
        assert self.trainer is not None
        return self.trainer.lightning_module
