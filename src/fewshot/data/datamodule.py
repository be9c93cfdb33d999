"""The Lightning data module: from a data set's configuration to normalised episodes on the device."""

from collections.abc import Callable, Iterable
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
from fewshot.errors import FewShotError
from fewshot.text import say

EVALUATED_TOGETHER = 20  # episodes of a process in a meta-batch of validation and test; changes no result
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
        trained: how many training episodes are done, over all processes.
        stage: the training episodes from the last checkpoint to the next, counted likewise.
        weights: of this process's batches in that stage, see ``MetaBatchSampler``.
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
        self.train_episodes, self._meta_batch = train.episodes, train.meta_batch
        self._every, self._checkpoint_every = val.every, checkpoint_every
        self.trained = 0
        self.stage = range(0)
        self.weights: list[float] = []
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
                rank_zero_only(say)(f"warning: {name}: {finding}")
        return self._bank

    def prepare_data(self) -> None:
        """Download and build on one process a machine; the others open what it built."""
        self.bank  # noqa: B018

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Check all three splits against what is asked of them before anything slow begins.

        Raises:
            FewShotError: there are too few classes, images of a class, or episodes for all processes.
        """
        for split, episodes in self.episodes.items():
            if episodes < self.processes:
                raise FewShotError(
                    f"{split}.episodes={episodes} cannot be shared out to {self.processes} processes; ask for at least "
                    "as many, or for fewer processes by hardware.devices"
                )
        self.datasets = {
            split: EpisodeDataset(self.bank, split, **(self.train_episode if split == "train" else self.episode))
            for split in ("train", "val", "test")
        }

    @property
    def processes(self) -> int:
        """How many share out the episodes."""
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def pieces(self) -> int:
        """Batches that each of them takes its part of a meta-batch in, to accumulate the gradient."""
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    @property
    def meta_batch(self) -> int:
        """Episodes in a training step: as many as asked for, or one for each piece of each process if that is more."""
        return max(self._meta_batch, self.processes * self.pieces)

    @property
    def every(self) -> int:
        """Training episodes from one validation to the next."""
        return self._in_whole_steps(self._every)

    @property
    def validates(self) -> bool:
        """Whether a validation follows the current stage."""
        return self.stage.stop % self.every == 0 or self.stage.stop == self.train_episodes

    def train_dataloader(self) -> DataLoader[Episode]:
        """The meta-batches from the episodes trained so far to the next checkpoint or validation."""
        epoch, first = divmod(self.trained, self.every)
        checkpoint_every = self._in_whole_steps(self._checkpoint_every)
        checkpoint = (first // checkpoint_every + 1) * checkpoint_every
        stop = min(epoch * self.every + min(checkpoint, self.every), self.train_episodes)
        self.stage = range(self.trained, stop)
        sampler = MetaBatchSampler(
            len(self.stage), self.meta_batch, epoch, first, self._rank, self.processes, self.pieces
        )
        self.weights = sampler.weights
        return self._loader("train", sampler)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"trained": self.trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the episodes that a checkpoint has been trained on."""
        self.trained = state_dict["trained"]

    def val_dataloader(self) -> DataLoader[Episode]:
        """The validation episodes, the same at every epoch."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Episode]:
        """The test episodes."""
        return self._evaluation_loader("test")

    def _in_whole_steps(self, episodes: int) -> int:
        return -(-episodes // self.meta_batch) * self.meta_batch

    def _evaluation_loader(self, split: str) -> DataLoader[Episode]:
        own = [EpisodeNumber(0, number) for number in range(self._rank, self.episodes[split], self.processes)]
        return self._loader(split, [own[i : i + EVALUATED_TOGETHER] for i in range(0, len(own), EVALUATED_TOGETHER)])

    def _loader(self, split: str, meta_batches: Iterable[list[EpisodeNumber]]) -> DataLoader[Episode]:
        # No worker processes: an episode is drawn far quicker than it could be sent from one. PyTorch's loaders draw a
        # number they do not need; from a generator of its own, so that a resumed run draws on as the first would have.
        generator = torch.Generator()
        return DataLoader(self.datasets[split], batch_sampler=meta_batches, collate_fn=stack, generator=generator)

    def embed(self, split: str, encoder: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Have the episodes of validation or test hold embeddings in place of images, each image embedded once.

        The processes share out the work. An embedding's last bit may depend on its batch, so the batches are those of a
        single process.

        Args:
            split: "val" or "test".
            encoder: ``[images, channels, height, width]`` to ``[images, features]``, each image by itself.
        """
        episodes = (self.datasets[split][EpisodeNumber(0, number)] for number in range(self.episodes[split]))
        device = self._method.device
        used = torch.cat([torch.cat([episode.support, episode.query]) for episode in episodes]).unique().to(device)
        rows = torch.zeros(len(self.bank.images), dtype=torch.int64, device=device)
        rows[used] = torch.arange(len(used), device=device)
        pieces = used.split(EMBEDDED_TOGETHER)
        # A process for which there is none embeds the first, to learn how many features an embedding has.
        own = [encoder(self.images_at(piece)) for piece in pieces[self._rank :: self.processes] or pieces[:1]]
        embeddings = own[0].new_zeros(len(used), own[0].shape[1])
        for place, of in zip(embeddings.split(EMBEDDED_TOGETHER)[self._rank :: self.processes], own, strict=False):
            place.copy_(of)
        self._embedded = rows, self.trainer.strategy.reduce(embeddings, reduce_op="sum")  # type: ignore[union-attr]

    def images_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Images of the bank as a method takes them: ``[..., channels, height, width]``, of the trainer's precision.

        Args:
            positions: in the bank, int64 ``[...]``, on the device the images are to be on.
        """
        images = self.bank.images
        if positions.is_cuda and self._resident is None and 4 * images.nbytes < torch.cuda.mem_get_info()[0]:
            self._resident = images.to(positions.device)  # gathered there from now on, without waiting for the host
        pixels = images[positions.cpu()].to(positions.device) if self._resident is None else self._resident[positions]
        images = normalise(pixels, self.dataset.normalise)
        return images if self.trainer is None else images.to(self._method.dtype)

    def load(self, episode: Episode) -> Episode:
        """An episode, or a meta-batch, with its images in place of their positions."""
        return episode._replace(support=self.images_at(episode.support), query=self.images_at(episode.query))

    def on_after_batch_transfer(self, batch: Episode, dataloader_idx: int) -> Episode:  # noqa: ARG002
        """Put images, or embeddings, where their positions are."""
        if self._embedded is not None and not self.trainer.training:  # type: ignore[union-attr]
            rows, embeddings = self._embedded
            return batch._replace(support=embeddings[rows[batch.support]], query=embeddings[rows[batch.query]])
        return self.load(batch)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _method(self) -> pl.LightningModule:
        assert self.trainer is not None
        return self.trainer.lightning_module
