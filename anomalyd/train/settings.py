"""Every setting of training, defined once: recipes and flags are derived from it."""

from __future__ import annotations

from dataclasses import dataclass

from anomalyd.config import setting

__all__ = ["TrainSettings"]


@dataclass(frozen=True)
class TrainSettings:
    """The [train] table of a recipe."""

    frozen: tuple[str, ...] = setting(
        (), help="parts that keep the weights they start with, such as main or main.labeller"
    )
    epochs: float = setting(
        10.0, help="passes over the training split; 0 trains nothing", low=0.0, high=1e6
    )
    batch_size: int = setting(16, help="images a step", low=1)
    optimizer: str = setting(
        "muon", help="rule for the convolution kernels", choices=("muon", "adamw")
    )
    learning_rate: float = setting(0.006, help="of the kernels, at its peak", low=0.0)
    adamw_learning_rate: float = setting(0.002, help="of all other parameters", low=0.0)
    warmup: int = setting(100, help="steps of linear warm-up, at most a tenth of the run", low=0)
    ema: float = setting(0.999, help="decay of the averaged weights, a step", low=0.0, high=1.0)
    clip: float = setting(1.0, help="largest gradient norm", low=0.0)
    bayes: float = setting(
        0.0, help="weight of -log p(y|x) by Bayes' rule beside -log p(x|y), both in nats", low=0.0
    )
    shift: int = setting(0, help="pixels by which images move at random in that term", low=0)
    mirror: bool = setting(False, help="mirror half of the images in that term")
    dither: bool = setting(
        False, help="draw the levels of each image anew each time it is seen, where there are few"
    )
    compile: bool = setting(
        False, help="fuse the model with torch.compile: a minute at the start, a third off after"
    )
    evaluations: int = setting(20, help="validations over the whole run", low=1)
    patience: int = setting(10, help="validations without progress before an early stop", low=1)
    checkpoint_seconds: float = setting(30.0, help="seconds between checkpoints, at most", low=0.0)
    half: bool = setting(
        False, help="round the trained weights to half precision, for a bundle of half the size"
    )
    codes: bool = setting(
        True, help="let the score read an encoder's codes, where there is one and no classes"
    )
    seed: int = setting(0, help="seed of weights, splits and data order", low=0, high=2**63 - 1)
