"""The Lightning data module: from a data set's configuration to normalised episodes on the device."""

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader

from fewshot.data.bank import ImageBank, open_bank
from fewshot.data.episodes import Episode, EpisodeDataset, EpisodeSampler, MetaBatchSampler, meta_batch
from fewshot.data.images import normalise


class EpisodeDataModule(pl.LightningDataModule):
    """Serves n-way k-shot episodes of the three splits of a data set: training by the meta-batch, the others singly.

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
        cache_dir: where image banks are kept.
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
        cache_dir: str,
    ) -> None:
        super().__init__()
        self.dataset, self.cache_dir = dataset, cache_dir
        self.episode = {"way": way, "shot": shot, "query": query, "seed": eval_seed}
        self.train_episode = {"way": train.way, "shot": train.shot, "query": train.query, "seed": seed}
        self.train_episodes, self.meta_batch = train.episodes, train.meta_batch
        self.every = -(-val.every // train.meta_batch) * train.meta_batch
        self.episodes = {"val": val.episodes, "test": test.episodes}
        self._bank: ImageBank | None = None

    @property
    def bank(self) -> ImageBank:
        """The images of the data set; opened, or built, when first asked for."""
        if self._bank is None:
            source = self.dataset.source
            name = source._target_.rpartition(".")[2]
            settings = OmegaConf.to_container(source, resolve=True)
            self._bank = open_bank(name, instantiate(source), settings, self.cache_dir)
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
    def epochs(self) -> int:
        """Of the training; each ends with a validation."""
        return -(-self.train_episodes // self.every)

    def episodes_by(self, epoch: int) -> int:
        """How many training episodes come before an epoch."""
        return min(epoch * self.every, self.train_episodes)

    # No worker processes in the loaders: making an episode is one gather, far quicker than sending it from one.
    def train_dataloader(self) -> DataLoader[Episode]:
        """The meta-batches of the current epoch; the last epoch may be shorter."""
        epoch = self.trainer.current_epoch if self.trainer else 0
        episodes = self.episodes_by(epoch + 1) - self.episodes_by(epoch)
        rank, world_size = self._place()
        sampler = MetaBatchSampler(episodes, max(self.meta_batch, world_size), epoch, rank, world_size)
        return DataLoader(self.datasets["train"], batch_sampler=sampler, collate_fn=meta_batch)

    def val_dataloader(self) -> DataLoader[Episode]:
        """The validation episodes, the same at every epoch."""
        return self._evaluation("val")

    def test_dataloader(self) -> DataLoader[Episode]:
        """The test episodes."""
        return self._evaluation("test")

    def _evaluation(self, split: str) -> DataLoader[Episode]:
        sampler = EpisodeSampler(self.episodes[split], *self._place())
        return DataLoader(self.datasets[split], batch_size=None, sampler=sampler)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def on_after_batch_transfer(self, batch: Episode, dataloader_idx: int) -> Episode:  # noqa: ARG002
        """Normalise the images where they are used, in the precision of the method's weights."""
        episode, dtype = self.normalise(batch), self.trainer.lightning_module.dtype  # type: ignore[union-attr]
        return episode._replace(support=episode.support.to(dtype), query=episode.query.to(dtype))

    def normalise(self, episode: Episode) -> Episode:
        """The episode as a method takes it: float32 images, ``[..., channels, height, width]``."""
        kind = self.dataset.normalise
        return episode._replace(support=normalise(episode.support, kind), query=normalise(episode.query, kind))
