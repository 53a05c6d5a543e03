"""The settings of `train-adapter`: one table of defaults, ranges, choices and help lines; presets; what goes together.

Eq. 14 of the paper weighs L_id with alpha and L_CLIP with beta. Here they are `id_weight` and `clip_weight`: alpha and
beta also name the noise schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from bolid.errors import BolidError
from bolid.models.families import Family
from bolid.settings import AT_LEAST_1, FRACTION, NOT_NEGATIVE, PROBABILITY, Range, check_settings, setting

LOSS, TRAINING, CONDITIONS, COMPUTE, OUTPUT = "Loss (Eq. 14)", "Training", "Conditions", "Memory and speed", "Output"

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "description": "Eq. 14 of the paper: L_diff, L_id on the 12 body keypoints, L_CLIP on the caption, each with a "
        "tenth of L_diff's gradient on the tiny family. To reproduce (examples/ablation/ablation.md, 300 steps of 16 "
        "from plain adapters, 60 held-out people): body R2 0.227 with L_id alone, 0.229 with L_CLIP alone, 0.220 with "
        "neither, standard error 0.08. Both at once were not run. Not run on a GPU.",
        "id_weight": 0.57, "id_loss": "keypoints", "clip_weight": 0.077, "clip_target": "text", "x_gen": "one-step",
    },
    "tiny": {
        "description": "The tiny family's first stage: L_diff alone, a quarter of each batch close-ups. Not run on "
        "a GPU.",
        "steps": 1700, "batch_size": 24, "learning_rate": 6e-4, "ema": 0.99, "close_up_fraction": 0.25,
        "build_word_dropout": 1.0, "face_dropout": 0.2,
    },
    "tiny-pictures": {
        "description": "The tiny family's second stage, with --branches body --init FIRST: Eq. 14 with L_id by the "
        "body encoder and L_CLIP, on pictures sampled in the family's six steps. Not run on a GPU.",
        "steps": 300, "batch_size": 12, "learning_rate": 6e-4, "ema": 0.97,
        "build_word_dropout": 1.0, "id_weight": 0.4, "id_loss": "body", "clip_weight": 0.3,
        "x_gen": "sampled", "x_gen_steps": 6, "x_gen_grad_steps": 2, "pixel_every": 1,
    },
    "sd15-12gb": {
        "description": "SD 1.5 at 512x512 on a card of 12 GB: 6.7 GB for the base, the adapters and a batch of 4, and "
        "0.3 GB for the VAE. Counted (bolid/train_adapter/step_cost.py), not measured. Not run on a GPU: no result.",
        "steps": 20000, "batch_size": 4, "gradient_accumulation_steps": 8, "learning_rate": 1e-4,
        "precision": "bf16", "face_tokens": 16,
    },
    "sdxl-24gb": {
        "description": "SDXL at 1024x1024 on a card of 24 GB: 12.3 GB for the base, the adapters (keys and values "
        "of rank 64) and a batch of 8 with gradient checkpointing, and 0.3 GB for the VAE. Counted "
        "(bolid/train_adapter/step_cost.py), not measured. Not run on a GPU: no result.",
        "steps": 20000, "batch_size": 8, "gradient_accumulation_steps": 4, "learning_rate": 1e-4,
        "precision": "bf16", "face_tokens": 16, "gradient_checkpointing": True, "kv_rank": 64,
    },
}  # fmt: skip


@dataclass(frozen=True)
class TrainAdapterConfig:
    """Settings of the face and the body branch and their training. Raises BolidError for values out of range."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    steps: int = setting(4000, "training steps", within=AT_LEAST_1, group=TRAINING)
    batch_size: int = setting(48, "photos in a batch, for each process", within=AT_LEAST_1, group=TRAINING)
    gradient_accumulation_steps: int = setting(
        1, "batches that make up one training step", within=AT_LEAST_1, group=TRAINING
    )
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW", within=NOT_NEGATIVE, group=TRAINING)
    schedule: str = setting(
        "cosine", "learning rate after the warm-up: cosine falls until the last step; constant stays, and a finished "
        "training typed again with more --steps goes on", choices=("cosine", "constant"), group=TRAINING,
    )  # fmt: skip
    weight_decay: float = setting(0.01, "weight decay of AdamW", within=NOT_NEGATIVE, group=TRAINING, advanced=True)
    max_grad_norm: float = setting(
        1.0, "gradients are clipped to this norm", group=TRAINING, advanced=True,
        within=Range(0, math.inf, "give more than 0; inf clips nothing", open_low=True),
    )  # fmt: skip
    ema: float = setting(
        0.999, "decay of the moving average of the weights, which is saved; 0: none", group=TRAINING, advanced=True,
        within=Range(0, 1, "give 0 (no average) to below 1 (nothing of what is learnt)", open_high=True),
    )  # fmt: skip
    init: str = setting("", "start from the adapters in this directory", group=TRAINING)
    branches: str = setting(
        "both", "which branches learn; with face or body alone, the other one stays as --init has it",
        choices=("both", "face", "body"), group=TRAINING,
    )  # fmt: skip

    id_weight: float = setting(0.0, "weight of the body identity loss L_id; 0: none", within=NOT_NEGATIVE, group=LOSS)
    id_loss: str = setting(
        "keypoints",
        "what L_id compares: the 12 body keypoints, ratios of bone lengths, or body: what the body encoder's decoder "
        "draws", choices=("keypoints", "bone-ratios", "body"), group=LOSS,
    )  # fmt: skip
    clip_weight: float = setting(0.0, "weight of the CLIP loss L_CLIP; 0: none", within=NOT_NEGATIVE, group=LOSS)
    clip_target: str = setting(
        "text", "embeddings that L_CLIP compares with: of the caption, of the photo, or both",
        choices=("text", "image", "both"), group=LOSS, advanced=True,
    )  # fmt: skip
    face_weight: float = setting(
        0.0, "weight of the face identity loss (after PuLID); 0: none", within=NOT_NEGATIVE, group=LOSS, advanced=True
    )
    face_detection_weight: float = setting(
        0.0, "weight of the face-detection loss: the detector's score against the photo's; 0: none",
        within=NOT_NEGATIVE, group=LOSS, advanced=True,
    )  # fmt: skip
    x_gen: str = setting(
        "one-step",
        "how the picture for L_id, L_CLIP and the face losses is made: one-step prediction from the noised photo, "
        "few-step rollout from there (distilled bases), or sampled from pure noise with guidance",
        choices=("one-step", "few-step", "sampled"), group=LOSS, advanced=True,
    )  # fmt: skip
    x_gen_steps: int = setting(
        4, "sampling steps of --x-gen few-step and sampled", within=AT_LEAST_1, group=LOSS, advanced=True
    )
    x_gen_grad_steps: int = setting(
        1, "how many of these carry the gradient: the last ones of few-step, evenly spaced ones of sampled",
        within=AT_LEAST_1, group=LOSS, advanced=True,
    )  # fmt: skip
    pixel_every: int = setting(
        8, "one step in so many has L_id, L_CLIP and the face losses", within=AT_LEAST_1, group=LOSS, advanced=True
    )
    pixel_alpha_bar: float = setting(
        0.5, "these losses count photos whose alpha-bar is at least this, with x_gen one-step and few-step", group=LOSS,
        advanced=True, within=Range(0, 1, "give 0 (all photos) to below 1 (none)", open_high=True),
    )  # fmt: skip
    decoder: str = setting(
        "", "AutoencoderTiny directory that decodes x_gen; default: the family's, else its VAE",
        group=LOSS, advanced=True,
    )  # fmt: skip
    # 0: min-SNR all but mutes the noisiest steps, and those settle a body's outline.
    min_snr_gamma: float = setting(
        0.0, "gamma of the min-SNR weighting of L_diff, say 5; 0: none", within=NOT_NEGATIVE, group=LOSS, advanced=True
    )

    text_dropout: float = setting(
        0.1, "probability of training without the caption", within=PROBABILITY, group=CONDITIONS, advanced=True
    )
    face_dropout: float = setting(
        0.3, "probability of training without the face", within=PROBABILITY, group=CONDITIONS, advanced=True
    )
    body_dropout: float = setting(
        0.1, "probability of training without the body", within=PROBABILITY, group=CONDITIONS, advanced=True
    )
    all_dropout: float = setting(
        0.05, "probability of training without any condition", within=PROBABILITY, group=CONDITIONS, advanced=True
    )
    build_word_dropout: float = setting(
        0.8, "probability that a caption loses words like tall or slim", within=PROBABILITY, group=CONDITIONS,
        advanced=True,
    )  # fmt: skip
    body_sampling: float = setting(
        0.5, "probability that the body is drawn from its Gaussian, not its mean", within=PROBABILITY,
        group=CONDITIONS, advanced=True,
    )  # fmt: skip
    max_context: int = setting(
        8, "largest number of other photos that a body is fused from", within=AT_LEAST_1, group=CONDITIONS,
        advanced=True,
    )  # fmt: skip
    close_up_fraction: float = setting(
        0.0, "fraction of each batch drawn from photos with a face and little of a body; 0: only by chance",
        within=FRACTION, group=CONDITIONS, advanced=True,
    )  # fmt: skip

    precision: str = setting(
        "auto", "precision of the network; auto: bf16 where the hardware has it",
        choices=("auto", "fp32", "bf16", "fp16"), group=COMPUTE,
    )  # fmt: skip
    gradient_checkpointing: bool = setting(
        False, "less memory for activations, about half as much time again", group=COMPUTE
    )
    kv_rank: int = setting(
        0, "rank of the trained key and value matrices, multiplied out in the files; 0: full matrices", group=COMPUTE,
        within=Range(0, math.inf, "give a rank, say 64, or 0 for full matrices"),
    )  # fmt: skip
    face_tokens: int = setting(
        4, "tokens of the face branch (the body has 4)", within=AT_LEAST_1, group=COMPUTE, advanced=True
    )
    text_cache: float = setting(
        8.0, "GiB of main memory for text-encoder states, computed once a caption; 0: computed at every step",
        within=NOT_NEGATIVE, group=COMPUTE, advanced=True,
    )  # fmt: skip
    compile: bool = setting(
        False, "compile the network first: a slow start, faster steps", group=COMPUTE, advanced=True
    )
    shard_branches: bool = setting(
        False, "shard the branches over the processes of accelerate launch (FSDP)", group=COMPUTE, advanced=True
    )
    checkpoint_minutes: float = setting(
        3.0, "minutes between checkpoints", within=NOT_NEGATIVE, group=OUTPUT, advanced=True
    )
    sample_every: int = setting(
        1000, "steps between contact sheets of samples; 0: none", within=NOT_NEGATIVE, group=OUTPUT
    )
    tensorboard: bool = setting(False, "also write the losses for TensorBoard", group=OUTPUT, advanced=True)

    def __post_init__(self) -> None:
        check_settings(self)
        for forbidden, message, hint in _conflicts(self):
            if forbidden:
                raise BolidError(message, hint)

    def learns(self, branch: str) -> bool:
        """Whether "face" or "body" is trained."""
        return self.branches in ("both", branch)

    @property
    def pixels(self) -> bool:
        """Whether a loss needs x_gen, the generated picture."""
        return bool(self.id_weight or self.clip_weight or self.faces)

    @property
    def faces(self) -> bool:
        """Whether a loss needs the face models."""
        return bool(self.face_weight or self.face_detection_weight)


def _conflicts(config: TrainAdapterConfig) -> list[tuple[bool, str, str]]:
    """Settings that do not go together: (whether they are given, message, hint)."""
    photo_needed = (config.id_weight and config.id_loss != "body") or (
        config.clip_weight and config.clip_target != "text"
    )
    few = config.x_gen == "few-step"
    return [
        (
            config.branches != "both" and not config.init,
            f"--branches {config.branches}: there is no other branch that could stay as it is",
            "give --init, a directory with both adapters, or leave it out",
        ),
        (
            config.shard_branches and config.compile,
            "--shard-branches and --compile do not go together", "leave out one of the two",
        ),
        (
            config.shard_branches and config.precision == "fp16",
            "--shard-branches and --precision fp16 do not go together", "give --precision bf16",
        ),
        (
            config.x_gen != "one-step" and config.x_gen_grad_steps > config.x_gen_steps,
            f"--x-gen-grad-steps is {config.x_gen_grad_steps}, of {config.x_gen_steps} steps", "give at most as many",
        ),
        (
            config.x_gen == "sampled" and bool(photo_needed),
            "--x-gen sampled is a new picture: there is no photo to compare it with",
            "give --id-loss body and --clip-target text, which compare with the person and the caption",
        ),
        (
            few and config.gradient_checkpointing,
            "--x-gen few-step and --gradient-checkpointing do not go together",
            "the few-step LoRA is only on for some of the passes; leave out one of the two",
        ),
    ]  # fmt: skip


def check_kv_rank(unet: Any, config: TrainAdapterConfig, family: Family) -> None:
    """Raises BolidError for a --kv-rank that saves nothing on this base."""
    from bolid.method.body_condition import largest_kv_rank

    if config.kv_rank > (largest := largest_kv_rank(unet)):
        raise BolidError(
            f"--kv-rank is {config.kv_rank}: two matrices of that rank are larger than the full one of some layer of "
            f"family '{family.name}'",
            f"give at most {largest}, or 0 for full matrices",
        )
