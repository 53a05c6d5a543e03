"""The settings of `train-adapter`: names, defaults, help lines, and which go together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bolid.errors import BolidError, require_not_negative, require_parts
from bolid.models.families import Family

CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "id_loss": ("keypoints", "bone-ratios", "body", "sliders"),
    "clip_target": ("text", "image", "both"),
    "x_gen": ("one-step", "few-step", "sampled", "swapped"),
    "branches": ("both", "face", "body"),
}
OF_THE_PERSON = ("body", "sliders")  # kinds of L_id that compare with the person and not with one photo
NO_TARGET = ("sampled", "swapped")  # ways to make an x_gen that no photo shows


@dataclass(frozen=True)
class TrainAdapterConfig:
    """Settings of the face and the body branch and their training."""

    steps: int = field(default=4000, metadata={"help": "training steps"})
    batch_size: int = field(default=48, metadata={"help": "photos in a batch, for each process"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches that make up one training step"})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "less memory for activations, about half as much time again"}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate of AdamW"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay of AdamW"})
    face_tokens: int = field(default=4, metadata={"help": "tokens of the face branch (the body has 4)"})
    kv_rank: int = field(
        default=0,
        metadata={
            "help": "train each key and value matrix as two thin ones of this rank, multiplied out in the files; "
            "0: as a full one"
        },
    )
    # None by default: min-SNR all but mutes the noisiest steps, and those settle a body's outline.
    min_snr_gamma: float = field(default=0.0, metadata={"help": "gamma of the min-SNR weighting, say 5; 0: none"})
    id_weight: float = field(default=0.0, metadata={"help": "weight of the body identity loss L_id; 0: none"})
    id_loss: str = field(
        default="keypoints",
        metadata={
            "help": "what L_id compares: keypoints, bone-ratios, or what the body encoder sees: body, as its decoder "
            "draws it, or sliders, as the body sliders read it"
        },
    )
    sliders: str = field(default="", metadata={"help": "file of the sliders; by default the family's"})
    readers: str = field(
        default="",
        metadata={
            "help": "folders, separated by commas, each with another pose model (pose/) or body encoder "
            "(body-encoder.safetensors), or both, or for sliders a probe (probe/), that look at the body instead of "
            "the family's for --id-loss body and sliders; L_id is the mean"
        },
    )
    spare_heads: bool = field(
        default=False,
        metadata={"help": "--id-loss body and sliders leave the head's pixels alone: they see them, without gradient"},
    )
    clip_weight: float = field(default=0.0, metadata={"help": "weight of the CLIP loss L_CLIP; 0: none"})
    clip_target: str = field(default="text", metadata={"help": "what L_CLIP compares with: text, image or both"})
    face_weight: float = field(
        default=0.0, metadata={"help": "weight of L_face, how unlike the person's the face is; 0: none"}
    )
    found_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of L_found, how much less surely a large face is to be seen than in the photo with the "
            "same caption; 0: none"
        },
    )
    close_ups: float = field(
        default=0.0,
        metadata={
            "help": "part of each batch that is drawn from the photos with a face and little of a body, which L_face "
            "and L_found need; 0: all as they come"
        },
    )
    x_gen: str = field(
        default="one-step",
        metadata={
            "help": "the picture that these losses look at: one-step, few-step where the base can, sampled: "
            "made from the caption and pure noise, with guidance, or swapped: from a noised photo that is told to be "
            "of somebody else; L_id must be body or sliders for the last two"
        },
    )
    x_gen_steps: int = field(default=4, metadata={"help": "steps of --x-gen few-step and sampled"})
    x_gen_grad_steps: int = field(
        default=1, metadata={"help": "how many carry the gradient: few-step the last, sampled evenly spaced ones"}
    )
    pixel_every: int = field(default=8, metadata={"help": "steps from one with these losses to the next"})
    pixel_alpha_bar: float = field(
        default=0.5, metadata={"help": "least alpha-bar of the photos that they look at, 0 to 1"}
    )
    decoder: str = field(
        default="", metadata={"help": "AutoencoderTiny directory for them; by default the family's, else its VAE"}
    )
    text_dropout: float = field(default=0.1, metadata={"help": "part of the photos trained without their caption"})
    face_dropout: float = field(default=0.3, metadata={"help": "part trained without the face"})
    body_dropout: float = field(default=0.1, metadata={"help": "part trained without the body"})
    all_dropout: float = field(default=0.05, metadata={"help": "part trained without any condition"})
    build_word_dropout: float = field(
        default=0.8, metadata={"help": "part whose caption loses words like tall or slim"}
    )
    text_cache: float = field(
        default=8.0,
        metadata={
            "help": "GiB of main memory for what the text encoders say of each caption, computed once; where it does "
            "not fit, and at 0, they compute at every step"
        },
    )
    max_context: int = field(default=8, metadata={"help": "most other photos that a body is made of"})
    body_sampling: float = field(
        default=0.5, metadata={"help": "part that draws the body from its Gaussian, not its mean"}
    )
    ema: float = field(default=0.999, metadata={"help": "decay of the moving average that is saved; 0: none"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    precision: str = field(
        default="auto",
        metadata={"help": "what the network computes in: fp32, bf16, fp16, or auto: bf16 where the hardware has it"},
    )
    compile: bool = field(default=False, metadata={"help": "compile the network first: a slow start, faster steps"})
    shard_branches: bool = field(
        default=False, metadata={"help": "spread the branches over the processes of accelerate launch (FSDP)"}
    )
    checkpoint_minutes: float = field(default=3.0, metadata={"help": "minutes between checkpoints"})
    sample_every: int = field(default=1000, metadata={"help": "steps between sample sheets; 0: none"})
    tensorboard: bool = field(default=False, metadata={"help": "also write the losses for TensorBoard"})
    init: str = field(default="", metadata={"help": "start from the adapters in this directory"})
    branches: str = field(
        default="both", metadata={"help": "which learn: both, or with --init face or body alone, the other one stays"}
    )

    def __post_init__(self) -> None:
        require_parts(
            self,
            ("text_dropout", "face_dropout", "body_dropout", "all_dropout", "build_word_dropout", "close_ups"),
        )
        if not 0 <= self.pixel_alpha_bar < 1:
            raise BolidError(f"--pixel-alpha-bar is {self.pixel_alpha_bar}", "give 0 (all photos) to below 1 (none)")
        require_not_negative(
            self,
            (
                "id_weight", "clip_weight", "face_weight", "found_weight", "text_cache", "learning_rate",
                "weight_decay",
            ),
        )  # fmt: skip
        if not 0 <= self.ema < 1:
            raise BolidError(f"--ema is {self.ema}", "give 0 (no average) to below 1 (nothing of what is learnt)")
        if not self.max_grad_norm > 0:
            raise BolidError(f"--max-grad-norm is {self.max_grad_norm}", "give more than 0; inf clips nothing")
        if self.kv_rank < 0:
            raise BolidError(f"--kv-rank is {self.kv_rank}", "give a rank, say 64, or 0 for full matrices")
        for name in (
            "steps", "batch_size", "gradient_accumulation_steps", "face_tokens", "max_context", "x_gen_steps",
            "x_gen_grad_steps", "pixel_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise BolidError(f"--{name.replace('_', '-')} is {getattr(self, name)}", "give at least 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise BolidError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)!r}", f"choose one of {', '.join(choices)}"
                )
        if self.branches != "both" and not self.init:
            raise BolidError(
                f"--branches {self.branches}: there is no other branch that could stay as it is",
                "give --init, a directory with both adapters, or leave it out",
            )
        if self.shard_branches and (self.compile or self.precision == "fp16"):
            raise BolidError(
                f"--shard-branches and {'--compile' if self.compile else '--precision fp16'} do not go together",
                "leave out one of the two" if self.compile else "give --precision bf16",
            )
        if self.x_gen_grad_steps > self.x_gen_steps and self.x_gen in ("few-step", "sampled"):
            raise BolidError(
                f"--x-gen-grad-steps is {self.x_gen_grad_steps}, of {self.x_gen_steps} steps", "give at most as many"
            )
        if self.x_gen in NO_TARGET and (
            (self.id_weight and self.id_loss not in OF_THE_PERSON) or (self.clip_weight and self.clip_target != "text")
        ):
            raise BolidError(
                f"--x-gen {self.x_gen} is a new picture: there is no photo for it to be like",
                "give --id-loss body or sliders and --clip-target text, which compare with the person and the caption",
            )
        if self.sliders and not (self.id_weight and self.id_loss == "sliders"):
            raise BolidError(
                f"--sliders {self.sliders}: nothing reads them",
                "give --id-weight and --id-loss sliders, or leave it out",
            )
        if self.readers and not (self.id_weight and self.id_loss in OF_THE_PERSON):
            raise BolidError(
                f"--readers {self.readers}: nobody asks them",
                "give --id-weight and --id-loss body or sliders, or leave it out",
            )
        if self.spare_heads and not (self.id_weight and self.id_loss in OF_THE_PERSON):
            raise BolidError(
                "--spare-heads: no loss looks at whole bodies", "give --id-weight and --id-loss body or sliders"
            )
        if self.x_gen == "few-step" and self.gradient_checkpointing:
            raise BolidError(
                "--x-gen few-step and --gradient-checkpointing do not go together",
                "the few-step LoRA is only on for some of the passes; leave out one of the two",
            )

    def learns(self, branch: str) -> bool:
        """Whether "face" or "body" is trained."""
        return self.branches in ("both", branch)

    @property
    def pixels(self) -> bool:
        """Whether a loss needs the picture."""
        return bool(self.id_weight or self.clip_weight or self.faces)

    @property
    def faces(self) -> bool:
        """Whether a loss looks at the face."""
        return bool(self.face_weight or self.found_weight)


def check_kv_rank(unet: Any, config: TrainAdapterConfig, family: Family) -> None:
    """BolidError for a --kv-rank that saves nothing on this base."""
    from bolid.method.body_condition import largest_kv_rank

    if config.kv_rank > (largest := largest_kv_rank(unet)):
        raise BolidError(
            f"--kv-rank is {config.kv_rank}: two matrices of that rank are larger than the full one of some layer of "
            f"family '{family.name}'",
            f"give at most {largest}, or 0 for full matrices",
        )
