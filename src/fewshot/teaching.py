"""Learn classes from photos once, for later use without them."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fewshot.checkpoints import NOWHERE
from fewshot.checks import Place, misfits, refuse
from fewshot.data.kinds import is_drawn, warn_of_mismatch
from fewshot.errors import FewShotError
from fewshot.prediction import find_support, read_support
from fewshot.predictor import make_trained, predictor_of
from fewshot.taught import extend, load_taught, save_taught
from fewshot.text import say
from fewshot.trained import FROM_CHECKPOINT, REPLACEABLE, choices_of

TYPES: dict[str, Any] = {"out": Place, "mirror": bool | None}
TYPES |= dict.fromkeys(("checkpoint", "model", "support", "cache_dir"), Place | None)


def teach(config: DictConfig) -> None:
    """Learn classes from photos, and write what was learned to one file; see ``fewshot.taught``.

    Args:
        config: the composed ``conf/teach.yaml``.

    Raises:
        FewShotError: see ``predict``.
    """
    refuse(misfits(config, TYPES))
    out, left_out = Path(config.out).expanduser(), list[str]()
    if config.model is not None:
        decided = choices_of(config.overrides, (*FROM_CHECKPOINT, *REPLACEABLE, "checkpoint", "crop", "mirror"))
        if decided:
            raise FewShotError(f"{decided[0]}: model={config.model} decides that; remove one of them")
        taught = load_taught(config.model, config.hardware, config.trust)
        predictor, run = taught.predictor, taught.config
        support, _, files = read_support(find_support(config.support, least=1), predictor.read, left_out)
        learned, names = extend(taught, support, [file.name for file in files])
    else:
        trained = make_trained(config, NOWHERE)
        predictor = predictor_of(trained, config.hardware, config.crop, config.cache_dir)
        run = trained.config
        support, _, files = read_support(find_support(config.support), predictor.read, left_out)
        learned, names = predictor.learn(support), [file.name for file in files]
    warn_of_mismatch(
        predictor.knows, [is_drawn(pixels) for images in support.values() for pixels in images], "examples"
    )
    for line in learned.describe(names):
        say(line)
    save_taught(out, predictor, learned, run, names)
    kept = "their embeddings" if learned.examples.is_floating_point() else "the examples themselves"
    say(
        f"{out}: {len(learned.classes)} classes, {len(learned.labels):,} examples ({kept}), "
        f"{out.stat().st_size:,} bytes; use it with fewshot predict model={out} query=DIR"
    )
