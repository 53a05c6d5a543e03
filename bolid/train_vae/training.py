"""A training of the body encoder, step by step: `command.py` calls these methods in a loop.

Shapes: P people and M views of each in a step, D body dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.run import derive_seed
from bolid.train_vae.config import TrainVaeConfig
from bolid.train_vae.data import ViewTable, draw_halves, unpack
from bolid.train_vae.distillation import Teacher

CONSTANT_STEPS = 3000  # what the warm-ups are fractions of with --schedule constant

if TYPE_CHECKING:
    import torch

    from bolid.method.body_vae import BodyVAE
    from bolid.method.body_views import Views


@dataclass(frozen=True)
class ViewBatch:
    """A step's views: P people, M of each."""

    views: Views  # P * M
    rows: torch.Tensor  # of the table [P * M]
    in_a: torch.Tensor  # bool [P, M]: in the first half, not in the second
    noise: torch.Tensor  # [2, P, D], to draw z


class VaeTraining:
    """The network, its optimizer and the moving averages of its losses."""

    def __init__(
        self, table: ViewTable, config: TrainVaeConfig, teacher: Teacher | None, device: str, seed: int
    ) -> None:
        import torch

        self.table, self.config, self.teacher, self.device, self.seed = table, config, teacher, device, seed
        self.people = [rows for rows in table.people if len(rows) >= 2]
        if len(self.people) < 2:
            raise BolidError(
                f"the training shards hold {len(self.people)} people with two photos or more",
                "the body encoder learns from several photos of several people: collect more, then run extract and "
                "shard",
            )
        self.model = new_model(table, config, seed).to(device, memory_format=torch.channels_last).train()
        self.readout = new_readout(table, config, seed).to(device)
        parameters = [*self.model.parameters(), *self.readout.parameters()]
        decayed = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True,
        )  # fmt: skip
        names = ["reconstruction", "kl", "identity", "accuracy", *(["distillation"] if teacher else [])]
        names += ["ratios"] if config.ratio_weight else []
        self.metrics = {name: torch.full((), float("nan"), dtype=torch.float64) for name in names}
        self.step = 0  # steps done

    def draw_batch(self) -> ViewBatch:
        """The next step's views, on the device."""
        import torch

        from bolid.method import body_views

        config, n_people = self.config, min(self.config.people, len(self.people))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "train-vae", self.step))
        rows, in_a = draw_halves(self.people, n_people, config.photos_per_person, generator, self.seed, self.step)
        views = body_views.augment(
            unpack(self.table.views, rows), generator, grayscale=config.grayscale,
            head_occlusion=config.head_occlusion, degradation=config.degradation,
        ).to(self.device)  # fmt: skip
        noise = torch.randn(2, n_people, config.body_dim, generator=generator).to(self.device)
        return ViewBatch(views, rows, in_a.to(self.device), noise)

    def losses(self, batch: ViewBatch) -> dict[str, torch.Tensor]:
        """The terms without their weights, scalars, and "accuracy", InfoNCE's."""
        import torch

        from bolid.method import body_vae as bv
        from bolid.method.body_views import view_confidence

        model, in_a, views = self.model, batch.in_a, batch.views
        mean, logvar = (part.view(*in_a.shape, -1) for part in model.encode(views))
        confidence = view_confidence(views.keypoints).view(in_a.shape)
        half_a = bv.fuse(mean, logvar, confidence * in_a)
        half_b = bv.fuse(mean, logvar, confidence * ~in_a)

        # -ELBO. Each half rebuilds the *other* half's views: leave-one-out, a view is never in its own context.
        z_a, z_b = (m + (0.5 * v).exp() * e for (m, v), e in zip((half_a, half_b), batch.noise, strict=True))
        z = torch.where(in_a[..., None], z_b[:, None], z_a[:, None]).flatten(0, 1)
        reconstruction = bv.loss_view_reconstruction(model, z, views).mean()
        kl = (bv.kl_divergence(*half_a) + bv.kl_divergence(*half_b)).mean() / 2

        identity, accuracy = bv.loss_identity(half_a, half_b)
        terms = {"reconstruction": reconstruction, "kl": kl, "identity": identity, "accuracy": accuracy}
        if self.teacher is not None:
            distilled = [
                self.teacher.loss(half[0], batch.rows, used) for half, used in ((half_a, in_a), (half_b, ~in_a))
            ]
            terms["distillation"] = (distilled[0] + distilled[1]) / 2
        if self.config.ratio_weight and self.table.ratios is not None:
            truth = self.table.ratios[batch.rows.view(in_a.shape)[:, 0]].to(self.device)
            errors = [(self.readout(half[0]) - truth).square().mean() for half in (half_a, half_b)]
            terms["ratios"] = (errors[0] + errors[1]) / 2
        return terms

    def update(self, terms: dict[str, torch.Tensor]) -> None:
        """One step of AdamW on the weighted sum of the terms. Raises BolidError when that is not finite."""
        import torch

        from bolid.method.optim import constant_schedule, cosine_schedule

        config, steps = self.config, self.config.steps
        if config.schedule == "constant":
            steps = CONSTANT_STEPS
            rate = constant_schedule(self.step, warmup=0.03 * steps)
        else:
            rate = cosine_schedule(self.step, steps, warmup=max(1.0, 0.03 * steps), floor=0.01)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        kl_weight = config.kl_weight * min(1.0, self.step / max(1.0, config.kl_warmup * steps))
        loss = config.reconstruction_weight * terms["reconstruction"] + kl_weight * terms["kl"]
        loss = loss + config.identity_weight * terms["identity"]
        if "distillation" in terms:
            loss = loss + config.distill_weight * terms["distillation"]
        if "ratios" in terms:
            loss = loss + config.ratio_weight * terms["ratios"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.step += 1
        for name, metric in self.metrics.items():
            value = float(terms[name].detach())
            metric.fill_(value if metric.isnan() else 0.9 * float(metric) + 0.1 * value)
        if not torch.isfinite(loss):
            raise BolidError(f"the training diverged at step {self.step}", "lower --learning-rate")

    def summary(self) -> str:
        """The metrics in one line."""
        return " ".join(f"{name} {float(value):.3f}" for name, value in self.metrics.items())

    def rounded_metrics(self) -> dict[str, float]:
        """The metrics as they are recorded."""
        return {name: round(float(value), 4) for name, value in self.metrics.items()}

    def load(self, path: Path, record: dict[str, Any]) -> None:
        """Go on from a checkpoint, if there is one."""
        from bolid.formats.checkpoint import load_checkpoint

        self.step = load_checkpoint(path, record, self._tensors(), self.optimizer)

    def save_checkpoint(self, path: Path, record: dict[str, Any]) -> None:
        """Everything that the next step needs."""
        from bolid.formats.checkpoint import save_checkpoint

        save_checkpoint(path, self.step, record, self._tensors(), self.optimizer)

    def _tensors(self) -> dict[str, torch.Tensor]:
        metrics = {f"metrics.{name}": value for name, value in self.metrics.items()}
        readout = {f"readout.{name}": value for name, value in self.readout.state_dict(keep_vars=True).items()}
        return {**self.model.state_dict(keep_vars=True), **readout, **metrics}


def new_readout(table: ViewTable, config: TrainVaeConfig, seed: int) -> torch.nn.Module:
    """The linear map from a body vector to the body ratios, which is not part of the encoder; empty where unused.

    Raises BolidError for `config.ratio_weight` on shards that do not hold the ratios.
    """
    import torch

    if not config.ratio_weight:
        return torch.nn.Identity()
    if table.ratios is None:
        raise BolidError(
            "--ratio-weight: the training shards do not hold the true body ratios", "leave it out: only renders can"
        )
    torch.manual_seed(derive_seed(seed, "train-vae", "readout"))
    return torch.nn.Linear(config.body_dim, table.ratios.shape[1])


def new_model(table: ViewTable, config: TrainVaeConfig, seed: int) -> BodyVAE:
    """A network of random weights, or those of `config.init`. Raises BolidError for weights of another shape."""
    import torch

    from bolid.backends.body import read_body_encoder
    from bolid.method import body_vae as bv

    feature_dim = 0 if table.views.features is None else table.views.features.shape[-1]
    if config.view in bv.POOLED and not feature_dim:
        raise BolidError("the training shards hold no image-text features", "use --view crop, or run extract again")
    torch.manual_seed(derive_seed(seed, "train-vae", "init"))
    model = bv.BodyVAE(
        config.body_dim, width=config.width, view=config.view, feature_dim=feature_dim, detail=config.detail
    )
    if config.init:
        weights, _population, record = read_body_encoder(config.init)
        detail = record.get("config", {}).get("detail", 1.0)
        try:
            model.load_state_dict(bv.at_detail(weights, detail, config.detail))
        except RuntimeError as error:
            raise BolidError(
                f"--init {config.init} is a body encoder of another shape", "give its --body-dim, --width and --view"
            ) from error
    return model
