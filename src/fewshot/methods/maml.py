"""Model-agnostic meta-learning (Finn, Abbeel & Levine, 2017, arXiv 1703.03400), first and second order."""

import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple, cast

import torch
from annotated_types import Ge, Le
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from fewshot.checks import Count, Natural, Positive, checked
from fewshot.data.episodes import Episode, MetaBatch
from fewshot.encoders import features_of
from fewshot.encoders.adaptable import BatchStatisticsNorm2d, draws_random, make_adaptable, solves_together
from fewshot.errors import FewShotError
from fewshot.methods.base import Classifier, FewShotMethod
from fewshot.methods.tasks import TaskBatching, for_each_task

Weights = dict[str, torch.Tensor]

# Loss scale of the inner steps in float16, which underflows below 6e-8; a power of 2, so that dividing by it is exact.
# A constant, so that training and test agree: the value a loss scaler finds in training is unknown in a test.
INNER_LOSS_SCALE = 2.0**10

# A thread solves tasks together up to this many pixels of support images: with fewer, starting the operations takes
# longer than their arithmetic, and with more, maps do not fit the cache.
PIXELS = 2**15


class MetaGradient(NamedTuple):
    """The meta-gradient of some tasks.

    Attributes:
        gradients: of the loss, one per trainable parameter, in order.
        loss: cross-entropy of the queries after adaptation, averaged over the tasks.
        logits: of the queries after adaptation, ``[tasks, queries, way]``.
    """

    gradients: list[torch.Tensor]
    loss: torch.Tensor
    logits: torch.Tensor


class MAML(FewShotMethod):
    """Learn initial weights from which a few gradient steps on a support set give a good classifier.

    The optimizer's learning rate is the paper's beta.

    As published, batch norm always uses the statistics of its current batch: queries are classified together, and the
    logits of each depend on the others. That makes it transductive, which raises its accuracy (Nichol, Achiam &
    Schulman, 2018, arXiv 1803.02999, section 6.1). An encoder without batch norm makes it inductive.

    Variants of MAML override one method: ``adapts`` (which parameters the inner steps change), ``update`` (one inner
    step), ``adapt`` (all inner steps) or ``task_gradient`` (the gradient of a task). They need not care how tasks are
    run, see ``fewshot.methods.tasks``; with vmap, all tensors have a leading dimension of tasks.

    Args:
        encoder: maps images to embeddings and has a number of ``features``; its batch norms are replaced.
        way: of every episode, since the head has one row per class.
        order: 2 differentiates through the inner steps (equation 1 and algorithm 2); 1 takes the gradient at the
            adapted weights (section 5.2).
        inner_learning_rate: the paper's alpha.
        learn_rates: learn a rate for each tensor of weights and each inner step, starting from ``inner_learning_rate``:
            LSLR of MAML++ (Antoniou, Edwards & Storkey, 2019, arXiv 1810.09502, section 4). They may become negative.
            Inner steps of a test beyond those of the training use the rates of the last one. None: one fixed rate.
        inner_steps: gradient steps on the support set in training.
        test_inner_steps: gradient steps on the support set in validation and test.
        clip_norm: largest norm of the meta-gradient; larger ones are scaled down to it. None: no clipping.
        task_batching: "loop" solves the tasks of a meta-batch one after another, "threads" on CPU threads, "vmap"
            several in one batch; "auto" is threads on the CPU and vmap elsewhere. A thread solves several small tasks
            at once if the encoder allows it, see ``solves_together``. With dropout and other layers that draw random
            numbers, see ``draws_random``, tasks are always solved one after another.
        vmap_tasks: number of tasks that vmap solves at once; memory grows with it, not with the meta-batch.
        recompute: recompute the activations of the inner steps when the meta-gradient needs them instead of storing
            them, so that memory does not grow with the number of steps.

    Raises:
        FewShotError: a number is out of range, ``task_batching`` is unknown, there are rates to learn but no inner
            steps, or a layer of the encoder cannot be adapted.
    """

    automatic_optimization = False

    @checked("method")
    def __init__(
        self,
        encoder: nn.Module,
        way: Count,
        order: Annotated[int, Ge(1), Le(2), "1 or 2"] = 2,
        inner_learning_rate: Positive = 0.4,
        inner_steps: Natural = 1,
        test_inner_steps: Natural = 3,
        clip_norm: Positive | None = None,
        task_batching: TaskBatching = "auto",
        vmap_tasks: Count = 8,
        recompute: bool = False,
        learn_rates: bool | None = None,
    ) -> None:
        if learn_rates and not inner_steps:
            raise FewShotError("method.learn_rates=true needs method.inner_steps of at least 1")
        super().__init__(encoder)
        make_adaptable(encoder, twice=order == 2)
        self.transductive = any(isinstance(module, BatchStatisticsNorm2d) for module in encoder.modules())
        self.head = nn.Linear(features_of(encoder), way)
        self.order, self.inner_learning_rate = order, inner_learning_rate
        self.compilable = order == 1
        self.inner_steps, self.test_inner_steps = inner_steps, test_inner_steps
        self.clip_norm, self.recompute = clip_norm, recompute
        self.task_batching, self.vmap_tasks = task_batching, vmap_tasks
        self._scaler: torch.amp.GradScaler | None = None
        rates = torch.full((max(inner_steps, 1),), inner_learning_rate)
        learned = {_rate_of(name): rates.clone() for name in self.weights()} if learn_rates else {}
        self.rates = nn.ParameterDict(learned)

    def forward(self, episode: Episode) -> torch.Tensor:
        """Adapt to the support samples, then classify the queries: logits ``[queries, way]``.

        For a way that differs from the head's, see ``weights``.
        """
        weights = self._adapted(episode.support, episode.support_labels, episode.way)
        return self.classify(weights, episode.query)[:, : episode.way]

    @property
    def needs_all_queries(self) -> bool:
        """See ``FewShotMethod``; False, as ``classifier`` puts the support set into every batch."""
        return False

    def classifier(self, support: torch.Tensor, labels: torch.Tensor, way: int) -> Classifier:
        """See ``FewShotMethod``; images classified in one batch share its batch norm statistics.

        Samples of smaller classes are repeated up to the shot of the largest class, so that every class has the same
        influence on the loss and the statistics. Every batch includes the support set: the statistics of a single
        image, or of a few similar ones, would be nothing like those seen in training.
        """
        of_class = [(labels == label).nonzero()[:, 0] for label in range(way)]
        shot = max(map(len, of_class))
        order = torch.cat([members.repeat(-(-shot // len(members)))[:shot] for members in of_class])
        support = support[order]
        weights = {name: weight.detach() for name, weight in self._adapted(support, labels[order], way).items()}
        return lambda images: self.classify(weights, torch.cat([support, images]))[len(support) :, :way]

    def _adapted(self, support: torch.Tensor, labels: torch.Tensor, way: int) -> Weights:
        with torch.enable_grad():
            return self.adapt(self.weights(way), support, labels, self.test_inner_steps)

    def weights(self, way: int | None = None) -> Weights:
        """Return the trainable parameters by name: the paper's theta.

        Args:
            way: of an episode whose number of classes differs from the head's rows. With fewer classes, the extra rows
                are kept, as rows of classes without samples. With more, rows are reused: classes that share a row start
                out equal, and the inner steps separate them. (Starting every class from the mean of the rows would
                favour none, but then the first inner step would not change the encoder, and it may be the only one.)
        """
        weights: Weights = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        if way is None or way <= self.head.out_features:
            return weights
        row = torch.arange(way, device=self.head.weight.device) % self.head.out_features
        return weights | {name: weight[row] for name, weight in weights.items() if name.startswith("head.")}

    def features(self, weights: Weights, images: torch.Tensor) -> torch.Tensor:
        """Compute embeddings ``[images, features]`` with the given encoder weights.

        With a leading dimension of tasks in both arguments: ``[tasks, images, features]``.
        """
        if images.ndim == 5:
            return self._features_of_tasks(weights, images)
        prefix = "encoder."
        encoder = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        return functional_call(self.encoder, encoder, images)

    def _features_of_tasks(self, weights: Weights, images: torch.Tensor) -> torch.Tensor:
        if not solves_together(self.encoder):
            return vmap(self.features)(weights, images)
        side_by_side = images.movedim(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        features = self.features(weights, side_by_side)
        return features.unflatten(1, (len(images), -1)).movedim(0, 1)

    def logits(self, weights: Weights, features: torch.Tensor) -> torch.Tensor:
        """Compute logits ``[images, way]`` from embeddings with the given head weights.

        With a leading dimension of tasks in both arguments: ``[tasks, images, way]``.
        """
        weight, bias = weights["head.weight"], weights["head.bias"]
        return vmap(linear)(features, weight, bias) if weight.ndim == 3 else linear(features, weight, bias)

    def classify(self, weights: Weights, images: torch.Tensor) -> torch.Tensor:
        """Compute the logits of images with the given weights: the paper's f. Shapes as in ``logits``."""
        return self.logits(weights, self.features(weights, images))

    def adapts(self, name: str) -> bool:
        """Whether the inner steps change the parameter ``name``; in MAML they change all but the rates."""
        return not name.startswith("rates.")

    def update(self, weights: Weights, gradients: Weights, number: int) -> Weights:
        """One inner step: theta - alpha * gradient.

        Args:
            weights: all weights, by name.
            gradients: of the weights that the inner steps change, by name.
            number: of the inner step, from 0.

        Returns:
            New weights for the names in ``gradients``.
        """
        if not self.rates:
            return {
                name: torch.sub(weights[name], gradient, alpha=self.inner_learning_rate)
                for name, gradient in gradients.items()
            }
        updated = {}
        for name, gradient in gradients.items():
            rates = weights[f"rates.{_rate_of(name)}"]
            rate = rates[..., min(number, rates.shape[-1] - 1)]
            # With a leading dimension of tasks, each task has its rate.
            updated[name] = weights[name] - rate.reshape(*rate.shape, *[1] * (gradient.ndim - rate.ndim)) * gradient
        return updated

    def adapt(
        self, weights: Weights, support: torch.Tensor, labels: torch.Tensor, steps: int, differentiable: bool = False
    ) -> Weights:
        """Take gradient steps on the support set: line 6 of algorithm 2.

        Args:
            weights: theta, or with a leading dimension one theta per task.
            support: ``[support samples, channels, height, width]``, or with a leading dimension of tasks.
            labels: int64 ``[support samples]``, or with a leading dimension of tasks.
            steps: number of steps.
            differentiable: whether to differentiate through the gradients of the steps.

        Returns:
            The adapted weights, the paper's theta'.
        """
        return self.descend(weights, lambda adapted: self.classify(adapted, support), labels, steps, differentiable)

    def descend(
        self,
        weights: Weights,
        classify: Callable[[Weights], torch.Tensor],
        labels: torch.Tensor,
        steps: int,
        differentiable: bool,
    ) -> Weights:
        """Take the steps of ``adapt`` with any function from weights to the logits of the support samples."""
        names = [name for name in weights if self.adapts(name)]

        def step(number: int, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            current = weights | dict(zip(names, values, strict=True))
            loss = total_cross_entropy(classify(current), labels)
            # Without create_graph the gradients are constants to autograd, and the derivative of
            # theta' = theta - alpha * constant is the identity: the meta-gradient is then the gradient at theta', which
            # is the definition of first order.
            scale = _inner_loss_scale(loss.device.type)
            if scale is not None:
                loss = loss * scale
            gradients = torch.autograd.grad(
                loss, values, create_graph=differentiable, allow_unused=True, materialize_grads=True
            )
            if scale is not None:
                gradients = tuple(gradient / scale for gradient in gradients)
            updated = self.update(current, dict(zip(names, gradients, strict=True)), number)
            return tuple(updated[name] for name in names)

        values = tuple(weights[name] for name in names)
        recompute = differentiable and self.recompute
        random = recompute and draws_random(self)  # if not, restoring the generator would only disturb other threads
        for number in range(steps):
            if recompute:
                values = checkpoint(step, number, *values, use_reentrant=False, preserve_rng_state=random)
            else:
                values = step(number, *values)
        return weights | dict(zip(names, values, strict=True))

    def solve(self, episode: Episode) -> torch.Tensor:
        """Compute the logits of the queries after the training inner steps, differentiable in the parameters.

        Args:
            episode: one episode, or a meta-batch.

        Returns:
            ``[queries, way]``, or with a leading dimension of tasks.
        """
        weights = self.weights()
        if episode.support_labels.ndim == 2:
            tasks = len(episode.support_labels)
            weights = {name: weight.expand(tasks, *weight.shape) for name, weight in weights.items()}
        adapted = self.adapt(weights, episode.support, episode.support_labels, self.inner_steps, self.order == 2)
        return self.classify(adapted, episode.query)

    def task_gradient(self, episode: Episode) -> MetaGradient:
        """Compute the gradient and loss of a task, or their sums (not means) over the tasks of a meta-batch.

        The gradients are those of the ``scaled`` loss. Threads call this on copies of the method, so it must not store
        anything in ``self``.

        Raises:
            FewShotError: a layer of the encoder has no second derivatives, which ``order=2`` needs.
        """
        logits = self.solve(episode)
        loss = total_cross_entropy(logits, episode.query_labels)
        weights = list(self.weights().values())
        try:
            gradients = torch.autograd.grad(self.scaled(loss), weights, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            missing = re.search(r"derivative for (\S+) is not implemented", str(error))
            if missing is None:
                raise
            raise FewShotError(
                f"method.order=2: PyTorch has no second derivative of a layer of the encoder ({missing[1]}); choose "
                "method.order=1, or a different encoder"
            ) from error
        return MetaGradient(list(gradients), loss.detach(), logits.detach())

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Multiply a loss by the loss scale if training in 16-mixed precision.

        Otherwise the gradient of a small loss would be zero in float16. The trainer unscales gradients before the
        optimizer step.
        """
        return loss if self._scaler is None else self._scaler.scale(loss)

    def on_fit_start(self) -> None:
        """Keep the trainer's loss scaler, if it has one: the copies on threads have no trainer."""
        self._scaler = getattr(self.trainer.precision_plugin, "scaler", None)

    def on_fit_end(self) -> None:
        """Drop the loss scaler: nothing outside a training is scaled."""
        self._scaler = None

    def meta_gradient(self, meta_batch: Episode) -> MetaGradient:
        """The gradient of the mean loss of the tasks after adaptation: line 10 of algorithm 2.

        Each task's graph is freed before the next, so memory does not grow with the meta-batch.

        Raises:
            FewShotError: the number of classes in the episodes is not the head's.
        """
        self._check(meta_batch)
        gradients = [torch.zeros_like(parameter) for parameter in self.weights().values()]
        losses, logits = [], []
        # A variant's own task_gradient may be written for one task.
        able = type(self).task_gradient is MAML.task_gradient and solves_together(self.encoder)
        together = max(1, PIXELS // meta_batch.support[0, :, 0].numel()) if able else 1
        for task in for_each_task(
            self, type(self).task_gradient, meta_batch, self.task_batching, self.vmap_tasks, together
        ):
            torch._foreach_add_(gradients, task.gradients)
            losses.append(task.loss)
            logits.append(task.logits.reshape(-1, *task.logits.shape[-2:]))
        tasks = len(meta_batch.query)
        torch._foreach_div_(gradients, tasks)
        return MetaGradient(gradients, torch.stack(losses).sum() / tasks, torch.cat(logits))

    def training_step(self, meta_batch: MetaBatch, batch_idx: int) -> torch.Tensor:  # noqa: ARG002
        """Do one meta-update (algorithm 2); return the mean loss of the tasks after adaptation."""
        optimizer: Any = self.optimizers()
        episodes = meta_batch.load()
        gradients, loss, logits = self.meta_gradient(episodes)
        if self.trainer.world_size > 1:
            gradients = self._mean_over_processes(gradients, meta_batch.share.weight)
        for parameter, gradient in zip(self.weights().values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        if schedule is not None:
            schedule.step()
        self.log_training(loss, logits, episodes.query_labels)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the meta-gradient, which no longer has the loss scale of 16-mixed."""
        if self.clip_norm is not None:
            self.clip_gradients(optimizer, gradient_clip_val=self.clip_norm, gradient_clip_algorithm="norm")

    def _mean_over_processes(self, gradients: list[torch.Tensor], weight: float) -> list[torch.Tensor]:
        """Average the gradients of this process with those of the others, weighted by their numbers of tasks."""
        flat = torch.cat([gradient.flatten() for gradient in gradients]) * weight
        means = cast(torch.Tensor, self.trainer.strategy.reduce(flat, reduce_op="mean")).split(
            [gradient.numel() for gradient in gradients]
        )
        return [mean.view_as(gradient) for mean, gradient in zip(means, gradients, strict=True)]

    def _check(self, episode: Episode) -> None:
        if episode.way != self.head.out_features:
            raise FewShotError(
                f"this MAML was made for {self.head.out_features} classes, and the episode has {episode.way}: its "
                f"head has one row per class, so train.way, way and the way it is tested at must be the same"
            )


def _rate_of(name: str) -> str:
    return name.replace(".", "/")  # a name in a module has no dot


def _inner_loss_scale(device: str) -> float | None:
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return INNER_LOSS_SCALE if half else None


def total_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over the tasks of the mean cross-entropy of each task's samples.

    Args:
        logits: ``[samples, way]``, or ``[tasks, samples, way]``.
        labels: int64 ``[samples]``, or ``[tasks, samples]``.

    Returns:
        A scalar.
    """
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum") / labels.shape[-1]
