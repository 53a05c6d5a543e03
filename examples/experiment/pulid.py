"""PuLID (Guo et al., arXiv:2404.16022): alignment and ID losses on pictures of a few steps from pure noise.

The condition is a face and an image embedding through an IP-Adapter. Beside the diffusion loss, each EVERY-th step runs
a second, "Lightning T2I" branch: from pure noise, by a prompt alone, in STEPS steps, with the person and without. The
person shall not change how the UNet answers the prompt: its features at the text's cross-attention, Q, shall be alike
(layout: |Q_id - Q|^2; semantics: the text's attention over Q, |A(K, Q_id, Q_id) - A(K, Q, Q)|^2). And the face of the
picture shall be the person's: 1 - cosine. The gradient goes through all the steps.

Simplified: few-step pictures by the base itself with DDIM (the paper: SDXL-Lightning); one embedding of each kind
through four tokens (the paper: features of several layers and a perceiver); every EVERY-th step, for a part of the
batch. Weights of the losses are the paper's.

Shapes: B batch, P latent positions, L tokens, F = 512, E image embedding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from mechanism import FACE, Draw, Mechanism, Person, Table

from bolid.backends.face import DifferentiableFaces
from bolid.method.body_condition import drop_condition, initial_state, install
from bolid.method.losses import alpha_bar, loss_face, noise_from_x0, noise_level, x0_from_prediction
from bolid.models.families import Family
from bolid.train_adapter.denoiser import training_schedule

EVERY, ROWS, STEPS = 4, 4, 4
SEMANTICS, LAYOUT, IDENTITY = 0.6, 0.1, 1.0  # weights


class PuLid(Mechanism):
    """See the module."""

    def __init__(self, pipe: Any, family: Family, size: int, seed: int) -> None:
        super().__init__(pipe, family, size, seed)
        (self.parameters,) = install(pipe.unet, [initial_state(pipe.unet, "body", FACE + size, seed=seed)])

    @cached_property
    def schedule(self) -> Any:
        return training_schedule(self.pipe)

    @cached_property
    def faces(self) -> DifferentiableFaces:
        return DifferentiableFaces(self.family.require("face"), all_sizes=True)

    def condition(self, table: Table, draw: Draw) -> torch.Tensor:
        """[B, F + E]"""
        rows = draw.context[:, 0]
        return torch.cat([table.faces[rows], table.embeds[rows]], 1)

    def predict(self, table: Table, draw: Draw) -> torch.Tensor:
        embeds = drop_condition(self.condition(table, draw)[:, None], draw.drop_image)
        return self._unet(draw.noisy, draw.timesteps, draw.text, embeds)

    def _unet(self, z: torch.Tensor, t: torch.Tensor, text: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        return self.unet(z, t, encoder_hidden_states=text, added_cond_kwargs={"image_embeds": [embeds]}).sample

    def extra_loss(self, table: Table, draw: Draw) -> torch.Tensor | None:
        if draw.step % EVERY:
            return None
        rows = min(ROWS, len(draw.rows))
        person, text = self.condition(table, draw)[:rows, None], draw.text[:rows]
        noise = torch.randn(draw.noisy[:rows].shape, generator=draw.generator)
        plain = self.without_person(noise, text, person)
        x0, own = self.few_steps(noise, text, person)
        layout, semantics = alignment(own, plain)
        known = table.faces[draw.context[:rows, 0]]
        with torch.autocast("cpu", enabled=False):
            pixels = self.pipe.vae.decode(x0.float() / self.pipe.vae.config.scaling_factor).sample
            identity = loss_face(self.faces(pixels), known) * known.any(1)
        return SEMANTICS * semantics + LAYOUT * layout + IDENTITY * identity.mean()

    @torch.no_grad()
    def without_person(
        self, noise: torch.Tensor, text: torch.Tensor, person: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What `few_steps` sees with the branch switched off."""
        self.pipe.set_ip_adapter_scale([0.0])
        try:
            return self.few_steps(noise, text, person)[1]
        finally:
            self.pipe.set_ip_adapter_scale([1.0])

    def few_steps(
        self, noise: torch.Tensor, text: torch.Tensor, person: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """(x0 after STEPS steps of DDIM, (Q [B, P, H], K of the text [B, L, H]) at each cross-attention and step)."""
        last = self.schedule.config.num_train_timesteps - 1
        times = torch.linspace(last, 0, STEPS + 1).long()[:-1]
        z, x0, seen = noise, noise, []
        for i, time in enumerate(times):
            t = time.expand(len(z))
            with queries(self.unet, text, seen):
                prediction = self._unet(z, t, text, person)
            alphas = alpha_bar(self.schedule, t)
            x0 = x0_from_prediction(prediction, z, alphas, self.schedule.config.prediction_type)
            if i + 1 < STEPS:
                following = alpha_bar(self.schedule, times[i + 1].expand(len(z)))
                z = noise_level(x0, noise_from_x0(x0, z, alphas), following)
        return x0, seen

    def vectors(self, person: Person) -> list[torch.Tensor]:
        """The face of the first photo that shows one, and that photo's embedding."""
        shown = [i for i, face in enumerate(person.faces) if bool(face.any())]
        row = shown[0] if shown else 0
        return [torch.cat([person.faces[row], person.embeds[row]])]


@contextlib.contextmanager
def queries(unet: Any, text: torch.Tensor, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """Inside, each cross-attention of a forward pass adds its Q and the text's K to `seen`."""
    modules = dict(unet.named_modules())
    attentions = [modules[name.removesuffix(".processor")] for name in unet.attn_processors]
    handles = [
        one.to_q.register_forward_hook(lambda layer, inputs, q, one=one: seen.append((q, one.to_k(text))))
        for one in attentions
        if one.is_cross_attention
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def alignment(
    own: list[tuple[torch.Tensor, torch.Tensor]], plain: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layout, semantics): mean squared differences of the features with the person and without, over all places."""
    layout, semantics = [], []
    for (q_id, k), (q, _) in zip(own, plain, strict=True):
        layout.append(F.mse_loss(q_id, q))
        answers = [F.scaled_dot_product_attention(k, one, one) for one in (q_id, q)]
        semantics.append(F.mse_loss(*answers))
    return torch.stack(layout).mean(), torch.stack(semantics).mean()
