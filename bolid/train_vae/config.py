"""The settings of `train-vae`: one table of defaults, ranges, choices and help lines."""

from __future__ import annotations

from dataclasses import dataclass

from bolid.settings import AT_LEAST_1, FRACTION, NOT_NEGATIVE, PROBABILITY, Range, check_settings, setting

TRAINING, LOSS, NETWORK, AUGMENTATION, OUTPUT = "Training", "Loss", "Network", "Augmentation", "Output"


@dataclass(frozen=True)
class TrainVaeConfig:
    """Settings of the body encoder and its training. Raises BolidError for values out of range."""

    steps: int = setting(3000, "training steps", within=AT_LEAST_1, group=TRAINING)
    people: int = setting(
        64, "people in a step", group=TRAINING,
        within=Range(2, float("inf"), "telling people apart needs at least 2 of them in a step"),
    )  # fmt: skip
    photos_per_person: int = setting(
        4, "photos of each person in a step", group=TRAINING,
        within=Range(2, float("inf"), "one half of a person's views rebuilds the other: at least 2"),
    )  # fmt: skip
    learning_rate: float = setting(2e-3, "peak learning rate of AdamW", within=NOT_NEGATIVE, group=TRAINING)
    schedule: str = setting(
        "cosine", "learning rate after the warm-up: cosine falls until the last step; constant stays, and a finished "
        "training typed again with more --steps goes on", choices=("cosine", "constant"), group=TRAINING,
    )  # fmt: skip
    weight_decay: float = setting(0.05, "weight decay of AdamW", within=NOT_NEGATIVE, group=TRAINING, advanced=True)
    init: str = setting("", "start from this body encoder, of the same shape", group=TRAINING)
    distill_from: str = setting("", "keep the vector space of this body encoder (distillation)", group=TRAINING)

    body_dim: int = setting(64, "dimensions of the body vector", within=AT_LEAST_1, group=NETWORK)
    view: str = setting(
        "crop", "input of a photo: patches cut along the bones; the same of the person's mask, without colour; "
        "image-text features pooled at the keypoints; or both features and crop",
        choices=("crop", "mask", "pooled", "both"), group=NETWORK,
    )  # fmt: skip
    width: int = setting(
        24, "channels of the crop network's first layer", within=AT_LEAST_1, group=NETWORK, advanced=True
    )
    detail: float = setting(1.0, "sampling density of the patches", choices=(1.0, 1.5, 2.0), group=NETWORK)

    # At 0.1 InfoNCE all but decides alone what z holds, and proportions are read worse from it.
    reconstruction_weight: float = setting(
        1.0, "weight of rebuilding held-out views", within=NOT_NEGATIVE, group=LOSS, advanced=True
    )
    kl_weight: float = setting(
        0.005, "weight of the KL term once warmed up", within=NOT_NEGATIVE, group=LOSS, advanced=True
    )
    kl_warmup: float = setting(
        0.2, "fraction of the training over which the KL weight grows from 0; of 3000 steps with --schedule "
        "constant", within=FRACTION, group=LOSS,
        advanced=True,
    )  # fmt: skip
    identity_weight: float = setting(
        1.0, "weight of InfoNCE between people", within=NOT_NEGATIVE, group=LOSS, advanced=True
    )
    ratio_weight: float = setting(
        0.0, "weight of a regression from the vector to the true body ratios, where the shards hold them (renders)",
        within=NOT_NEGATIVE, group=LOSS, advanced=True,
    )  # fmt: skip
    distill_weight: float = setting(
        5.0, "weight of the distillation loss of --distill-from", within=NOT_NEGATIVE, group=LOSS, advanced=True
    )

    grayscale: float = setting(
        0.3, "probability that a training view loses its colour", within=PROBABILITY, group=AUGMENTATION, advanced=True
    )
    head_occlusion: float = setting(
        0.0, "probability that a training view loses the head", within=PROBABILITY, group=AUGMENTATION, advanced=True
    )
    degradation: float = setting(
        0.0, "probability that a training view is blurred or half hidden", within=PROBABILITY, group=AUGMENTATION
    )
    checkpoint_minutes: float = setting(
        2.0, "minutes between checkpoints", within=NOT_NEGATIVE, group=OUTPUT, advanced=True
    )

    def __post_init__(self) -> None:
        check_settings(self)
