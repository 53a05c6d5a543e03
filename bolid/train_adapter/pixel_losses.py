"""L_id and L_CLIP of a training step (BoLID Eq. 14), L_face and L_found: what frozen networks see in x_gen.

x_gen's latents are decoded, and the family's pose and image-text models read the picture. Its target is the photo that
was to be denoised, read the same way from its own latents, so that a perfect prediction costs exactly nothing. With
`id_loss` "body" or "sliders" a body encoder reads it, or several do, and the target is what is said of the person.

Shapes: B photos, C latent channels, (h, w) latent positions, D body dimension, E embedding dimension, R sliders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bolid.errors import BolidError
from bolid.models.families import Family
from bolid.run import sha256_file
from bolid.train_adapter.config import OF_THE_PERSON

if TYPE_CHECKING:
    import torch

    from bolid.backends.body import BodyEncoder
    from bolid.backends.face import DifferentiableFaces
    from bolid.backends.pose import PoseModel
    from bolid.backends.probe import BodyProbe
    from bolid.method.sliders import Calibration

TINY_DECODER = "tiny-decoder"  # an AutoencoderTiny directory beside a family's other models
SHOWS_A_FACE = 0.5  # score, from which a photo does
_CHUNK = 20  # pictures looked at together without gradient


@dataclass
class Reader:
    """What says what a body is like: a pose model that finds the keypoints and a body encoder that reads there, or a
    probe, which reads the ratios off the picture by itself."""

    pose: PoseModel
    body_encoder: BodyEncoder
    probe: BodyProbe | None = None
    expectation: Calibration | None = None  # of its readings, see `PixelLosses.calibrate`


class PixelLosses:
    """The losses or some of them: `id_loss` is "keypoints", "bone-ratios", "body", "sliders" or ""; `clip_target`
    "text", "image", "both" or ""; `face`, `found`: whether L_face, L_found. "body" and "sliders" need the
    `body_encoder`, "sliders" also the file `sliders` (by default the family's), measured for it. `readers`: folders,
    separated by commas, each with a pose model or a body encoder or both, or with a probe, in files named like a
    family's, that look at the body instead; L_id is the mean. What only pleases one network rarely pleases another. A
    probe knows nothing of body vectors: it is asked for the ratios that the sliders are named after, and must not be
    the one that measures the family.
    `spare_heads`: with "body" and "sliders" no gradient reaches the head's pixels.

    `vae`: of the base; `decoder`: directory of an AutoencoderTiny for the same latents, which is several times faster.
    By default the family's `tiny-decoder`, and without one the base's own VAE. `inputs`: name -> sha256 of the models
    that the losses depend on. Raises BolidError when the family lacks a model.
    """

    def __init__(
        self, family: Family, vae: Any, *, id_loss: str, clip_target: str, decoder: str = "", device: str = "cpu",
        body_encoder: Any = None, sliders: str = "", readers: str = "", spare_heads: bool = False, face: bool = False,
        found: bool = False,
    ) -> None:  # fmt: skip
        import torch

        from bolid.backends.face import DifferentiableFaces
        from bolid.backends.image_text import WEIGHTS, ImageTextModel
        from bolid.formats.sliders import load_sliders

        self.id_loss, self.clip_target, self.view_size = id_loss, clip_target, family.view_size
        self.spare_heads, self.face, self.found = spare_heads, face, found
        self.inputs: dict[str, str] = {}
        self.vae, self.judge = vae, family.probe
        if folder := find_decoder(family, decoder):
            self.vae = _load_decoder(folder, vae, device)
            self.inputs["decoder"] = sha256_file(sorted(folder.glob("*.safetensors"))[0])
        if id_loss:
            self.pose = self._pose_model(family.require("pose"), device, "pose")
        self.readers: list[Reader] = []
        if id_loss == "sliders":
            file = Path(sliders) if sliders else family.require("body_sliders")
            measured = load_sliders(file, body_encoder.space)
            self.slider_names = measured.names
            self.readout = measured.readout.to(device)
            self.inputs["body_sliders"] = sha256_file(file)
        if id_loss in OF_THE_PERSON:
            folders = [Path(folder) for folder in readers.split(",") if folder]
            self.readers = [self._reader(folder, body_encoder, device, i) for i, folder in enumerate(folders, start=1)]
            self.readers = self.readers or [Reader(self.pose, body_encoder)]
        for reader in self.readers:
            if reader.body_encoder.needs_features:
                raise BolidError(
                    f"--id-loss {id_loss}: {reader.body_encoder.path} looks at image-text features, which pass no "
                    "gradient",
                    "give a body encoder trained with --view crop",
                )
        if clip_target:
            path = family.require("image_text")
            self.image_text = ImageTextModel(path, device)
            self.inputs["image_text"] = sha256_file(path / WEIGHTS)
        self.faces: DifferentiableFaces | None = None
        if face or found:
            self.faces = DifferentiableFaces(family.require("face"), device)
            self.inputs |= {"face": self.faces.sha256, "face_detector": self.faces.detector_sha256}
        self.vae.to(memory_format=torch.channels_last)  # a third less time for most of what these losses cost
        self._targets: dict[int, tuple[torch.Tensor, ...]] = {}
        self._certainties: dict[int, torch.Tensor] = {}
        self._texts: dict[str, torch.Tensor] = {}

    def _pose_model(self, path: Path, device: str, name: str) -> PoseModel:
        """The pose model at `path`, which is one of the inputs by this `name`."""
        from bolid.backends.pose import PoseModel, weights_file

        pose = PoseModel(path, device)
        if not pose.differentiable:
            raise BolidError(
                f"L_id needs a gradient, which a pose model in ONNX has not ({path})",
                "take one in safetensors: bolid models convert yolo11n-pose.pt",
            )
        self.inputs[name] = sha256_file(weights_file(path))
        return pose

    def _reader(self, folder: Path, own: BodyEncoder, device: str, number: int) -> Reader:
        """Reader `number`, from 1 on; what `folder` lacks is the family's pose model or the `own` body encoder."""
        from bolid.backends.body import BodyEncoder
        from bolid.models.families import path_of

        pose_path, encoder_path, probe_path = (path_of(part, folder) for part in ("pose", "body_encoder", "probe"))
        if not (pose_path.exists() or encoder_path.exists() or probe_path.exists()):
            raise BolidError(
                f"--readers: {folder} holds neither {pose_path.name}/ nor {encoder_path.name} nor {probe_path.name}/",
                "give folders with a pose model or a body encoder, or both, or a probe, in files named like a family's",
            )
        pose, encoder = self.pose, own
        if probe_path.exists():
            probe = self._probe(probe_path, device, f"reader_{number}_probe")
            return Reader(pose, encoder, probe)
        if pose_path.exists():
            pose = self._pose_model(pose_path, device, f"reader_{number}_pose")
        if encoder_path.exists():
            encoder = BodyEncoder(encoder_path, device)
            if encoder.space != own.space:
                raise BolidError(
                    f"--readers: what {encoder_path} says is not comparable with what {own.path} says",
                    "give one that was trained with --anchor and that one",
                )
            self.inputs[f"reader_{number}_body_encoder"] = encoder.sha256
        return Reader(pose, encoder)

    def _probe(self, path: Path, device: str, name: str) -> BodyProbe:
        """The probe at `path`, for the ratios of the sliders, which is one of the inputs by this `name`."""
        from bolid.backends.probe import FILE, BodyProbe

        probe = BodyProbe(path, device)
        self.inputs[name] = sha256_file(path / FILE)
        if self.judge and (self.judge / FILE).is_file() and sha256_file(self.judge / FILE) == self.inputs[name]:
            raise BolidError(
                f"--readers: {path} is the probe that measures this family's pictures; nothing may be trained by it",
                "train another: examples/tiny_family/train_probe.py --seed N",
            )
        if self.id_loss != "sliders":
            raise BolidError(f"--readers: {path} reads ratios and no body vector", "give --id-loss sliders")
        missing = [name for name in self.slider_names if name not in probe.ratio_names]
        if missing:
            raise BolidError(
                f"--readers: the probe {path} does not read the slider {missing[0]!r}",
                f"give sliders (measure_sliders.py --every-ratio) of what it reads: {', '.join(probe.ratio_names)}",
            )
        return probe

    def calibrate(self, latents: torch.Tensor, bodies: torch.Tensor) -> None:
        """Find out what each reader says, by the sliders, of pictures of people like `bodies` [N, D]: photos of theirs,
        of which `latents` [N,C,h,w] are. From then on that is what it is to say of x_gen.

        So neither a reader's own bias nor what the VAE does to a photo is asked of x_gen.
        """
        import torch

        from bolid.method.sliders import fit_calibration

        told = bodies @ self.readout.T
        for reader in self.readers:
            parts = []
            with torch.no_grad():
                for start in range(0, len(latents), _CHUNK):
                    parts.append(self._said(reader, self._decode(latents[start : start + _CHUNK])))
            said, weight = (torch.cat(part) for part in zip(*parts, strict=True))
            reader.expectation = fit_calibration(told, said, weight)

    def __call__(
        self, latents: torch.Tensor, targets: torch.Tensor, rows: Sequence[int], captions: Sequence[str],
        bodies: torch.Tensor | None = None, faces: torch.Tensor | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """(L_id [B], L_CLIP [B], L_face [B], L_found [B]) of x_gen's `latents` [B,C,h,w] against the photos' own,
        `targets`; 0 for what is off.

        `rows` name the photos: what is seen in a target is remembered. `bodies` [B, D]: what x_gen's body is to be
        like, for "body" and "sliders"; `faces` [B, 512], L2-normed: and its face. Zeros are for nobody. With
        `generators` [B] L_id and L_found look through windows drawn from them. A photo with an empty caption has no
        text to be like, and what is not recognised as a person counts little: L_id is weighted by the scores.
        """
        import torch

        from bolid.method import losses

        zero = latents.new_zeros(len(latents))
        if not len(latents):
            return zero, zero, zero, zero
        pixels = self._decode(latents)
        seen = self._read(pixels)
        target: list[torch.Tensor] = []
        if self.id_loss not in ("", *OF_THE_PERSON) or self.clip_target not in ("", "text"):
            target = [torch.stack(parts) for parts in zip(*map(self._target, rows, targets), strict=True)]
        identity, clip, face, found = zero, zero, zero, zero
        if self.id_loss in OF_THE_PERSON:
            unlike = [self._unlike(reader, pixels, bodies, generators) for reader in self.readers]
            identity = torch.stack(unlike).mean(0)
        elif self.id_loss:
            keypoints, _box, score = seen[:3]
            if self.id_loss == "keypoints":
                error = losses.loss_keypoints(keypoints, target[0], target[1][:, 3] - target[1][:, 1])
            else:
                error = losses.loss_bone_ratios(keypoints, target[0])
            identity = error * score.detach() * target[2]
        if self.clip_target:
            parts = []
            if self.clip_target != "image":
                has_text = torch.tensor([bool(caption) for caption in captions], device=latents.device)
                texts = torch.stack([self._text(caption) for caption in captions])
                parts.append(losses.loss_clip(seen[-1], texts) * has_text)
            if self.clip_target != "text":
                parts.append(losses.loss_clip(seen[-1], target[-1]))
            clip = torch.stack(parts).mean(0)
        if self.faces is not None and faces is not None:
            # Whether its photo shows a face, and not whether x_gen does: painting none would pay.
            photos = zip(rows, targets, strict=True)
            of_photo = torch.stack([self._certainty(row, latents, self.faces) for row, latents in photos])
            asked = (of_photo >= SHOWS_A_FACE) & faces.any(1)
            if self.face:
                face = losses.loss_face(self.faces(pixels), faces) * asked
            if self.found:
                windows = through_windows(pixels, generators) if generators else pixels
                found = losses.loss_found(self.faces.certainty(windows), of_photo) * asked
        return identity, clip, face, found

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[B,3,H,W] in -1..1."""
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents).sample.float().clamp(-1, 1)

    def _read(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keypoints, box and score for L_id of a photo, then the embedding for L_CLIP."""
        seen = self.pose.best_person(pixels) if self.id_loss not in ("", *OF_THE_PERSON) else ()
        return (*seen, self.image_text.encode_pixels(pixels)) if self.clip_target else seen

    def _unlike(
        self, reader: Reader, pixels: torch.Tensor, bodies: torch.Tensor, generators: Sequence[torch.Generator]
    ) -> torch.Tensor:
        """How far the pictures' bodies are from `bodies` [B, D], as far as they can be seen, 0 for nobody, [B]."""
        import torch

        from bolid.method.body_vae import body_distance
        from bolid.method.sliders import reading_distance

        if generators:
            pixels = through_windows(pixels, generators)
        if self.spare_heads:
            with torch.no_grad():
                keypoints, _box, _score = reader.pose.best_person(pixels)
            head = heads(keypoints, pixels.shape[2:])
            pixels = torch.where(head, pixels.detach(), pixels)
        if self.id_loss == "sliders":
            said, weight = self._said(reader, pixels)
            distance = reading_distance(said, bodies @ self.readout.T, reader.expectation)
        else:
            mean, views, weight = reader.body_encoder.read_pixels(pixels, reader.pose, self.view_size)
            distance = body_distance(reader.body_encoder.model, mean, bodies, views)
        return distance * weight.detach() * bodies.any(1)

    def _said(self, reader: Reader, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(what a reader says of pictures [B,3,H,W] by the sliders [B, R], how far that is to be believed [B])."""
        if reader.probe is not None:
            columns = [reader.probe.ratio_names.index(name) for name in self.slider_names]
            return reader.probe.read(pixels)[:, columns], pixels.new_ones(len(pixels))
        mean, _, weight = reader.body_encoder.read_pixels(pixels, reader.pose, self.view_size)
        return mean @ self.readout.T, weight

    def _target(self, row: int, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What L_id and L_CLIP see in a photo."""
        if row not in self._targets:
            self._targets[row] = tuple(part[0] for part in self._alone(self._read, latents))
        return self._targets[row]

    def _certainty(self, row: int, latents: torch.Tensor, faces: DifferentiableFaces) -> torch.Tensor:
        """How surely a photo shows a large face, a scalar."""
        if row not in self._certainties:
            self._certainties[row] = self._alone(faces.certainty, latents)[0]
        return self._certainties[row]

    def _alone(self, see: Callable[[torch.Tensor], Any], latents: torch.Tensor) -> Any:
        """What is seen in one photo: the numbers must not depend on what shares the batch, or a resumed run, which no
        longer knows what was seen, would differ."""
        import torch

        with torch.no_grad():
            return see(self._decode(latents[None]))

    def _text(self, caption: str) -> torch.Tensor:
        if caption not in self._texts:
            self._texts[caption] = self.image_text.encode_text([caption])[0]
        return self._texts[caption]


SMALLEST, FARTHEST = 0.75, 0.05  # of a picture in its window; how far its middle is moved, in parts of the window


def through_windows(pixels: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Each of the pictures [B,3,H,W] mirrored or not, a little smaller and a little aside, its edge repeated outside.

    None of this changes a body; what pleases a network only from one place it takes away (expectation over
    transformation, Athalye et al. 2018).
    """
    import torch
    import torch.nn.functional as F

    drawn = torch.stack([torch.rand(4, generator=generator) for generator in generators]).to(pixels)
    shrink = 1 / (SMALLEST + (1 - SMALLEST) * drawn[:, 0])
    window = pixels.new_zeros(len(pixels), 2, 3)
    window[:, 0, 0] = torch.where(drawn[:, 1] < 0.5, shrink, -shrink)
    window[:, 1, 1] = shrink
    window[:, :, 2] = 2 * FARTHEST * (2 * drawn[:, 2:] - 1)
    grid = F.affine_grid(window, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def heads(keypoints: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Where heads are in pictures of `size` (H, W) with COCO `keypoints` [B,17,3], bool [B,1,H,W]: above the shoulders
    and around the nose, in a strip a little wider than they are.

    What L_id wants of a head, that it be as small as the body is to look long, takes its hair and face away; that it
    be seen, so that a body has its proportions, does no harm.
    """
    import torch

    nose, left, right = keypoints[:, 0, :2], keypoints[:, 5, :2], keypoints[:, 6, :2]
    width = (left - right).norm(dim=-1).clamp_min(0.08 * size[0])[:, None, None]
    middle = ((left + right + 2 * nose)[:, 0] / 4)[:, None, None]
    top = torch.minimum(left[:, 1], right[:, 1])[:, None, None]
    y = torch.arange(size[0]).to(keypoints).view(1, -1, 1)
    x = torch.arange(size[1]).to(keypoints).view(1, 1, -1)
    return ((y < top - 0.1 * width) & ((x - middle).abs() < 0.6 * width))[:, None]


def find_decoder(family: Family, decoder: str) -> Path | None:
    """The directory of the tiny decoder that is asked for, or the family's; None: decode with the base's VAE."""
    folder = Path(decoder) if decoder else family.root / TINY_DECODER
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return folder
    if decoder:
        raise BolidError(
            f"--decoder {decoder} holds no AutoencoderTiny",
            "give a directory with its config.json and safetensors weights, or leave it out to decode with the VAE",
        )
    return None


def _load_decoder(folder: Path, vae: Any, device: str) -> Any:
    from diffusers import AutoencoderTiny

    from bolid.backends.diffusion import loading, require_whole

    wanted = "it must be a directory that diffusers' AutoencoderTiny.from_pretrained loads"
    with loading(f"the tiny decoder in {folder}", wanted):
        decoder = AutoencoderTiny.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
    require_whole(decoder, folder)
    if decoder.config.latent_channels != vae.config.latent_channels:
        raise BolidError(
            f"the tiny decoder in {folder} takes {decoder.config.latent_channels} latent channels, "
            f"the base has {vae.config.latent_channels}",
            "give one that was made for this base's latents",
        )
    return decoder.requires_grad_(False).eval().to(device)
