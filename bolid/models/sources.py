"""Where the weights of the full-size families are published, and under which licenses. Data; standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedPart:
    """Where one part of a full-size family is published, and under which license.

    No revision or hash is pinned: `bolid models pull` records the commit and the SHA-256 of the first fetch, and
    `bolid models verify` compares with that record.
    """

    part: str
    name: str
    megabytes: int  # of the download, approximately: from the number of parameters
    license: str
    repo: str = ""  # on the Hugging Face Hub, or
    url: str = ""  # one file or .zip
    files: tuple[str, ...] = ()  # of the repository: patterns
    file: str = ""  # of the repository: this one only; the part is this file
    commercial: bool = True  # False: its license forbids commercial use
    notice: str = ""  # what somebody who sells or distributes must know
    instead: str = ""  # what to use where commercial use is meant
    optional: bool = False  # fetched by `pull --only PART` alone


_OPENRAIL_NOTICE = "its license's list of forbidden uses goes with every copy"
_AGPL_NOTICE = (
    "ultralytics and its weights are AGPL-3.0: what is distributed, or served over a network, together with them falls "
    "under the AGPL, unless you hold ultralytics' enterprise license"
)
OWN_FACE_PACK = (
    "use an InsightFace-style pack of your own (an SCRFD detector and an ArcFace recogniser as .onnx files, trained on "
    "data that permits it) as the family's `face` folder, or get a commercial license from InsightFace"
)
_DIFFUSERS_CONFIGS = ("*.json", "*/*.json", "tokenizer*/*")
_DIFFUSERS_FP16 = (
    "model_index.json", "scheduler/*", "tokenizer*/*", "text_encoder*/config.json",
    "text_encoder*/model.fp16.safetensors", "unet/config.json", "vae/config.json",
    "vae/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
)  # fmt: skip
_SD15, _SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"
_EVA = "timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k"
_FACE_RELEASE = "https://github.com/deepinsight/insightface/releases/download/v0.7"
_POSE_RELEASE = "https://github.com/ultralytics/assets/releases/download/v8.3.0"
# The files by which InsightFace's published packs are known, wherever they lie.
RESEARCH_ONLY_FACE = {"w600k_r50.onnx", "w600k_mbf.onnx", "glintr100.onnx", "det_10g.onnx", "scrfd_10g_bnkps.onnx"}


def _common(face: PublishedPart) -> tuple[PublishedPart, ...]:
    """What every full-size family needs besides its base."""
    return (
        PublishedPart(
            "pose", "YOLO11x-pose", 118, "AGPL-3.0", url=f"{_POSE_RELEASE}/yolo11x-pose.pt", notice=_AGPL_NOTICE,
        ),
        face,
        PublishedPart(
            "image_text", "EVA02-CLIP L/14", 1711, "MIT", repo=_EVA,
            files=("open_clip_config.json", "open_clip_model.safetensors", "tokenizer*", "vocab.json", "merges.txt",
                   "special_tokens_map.json"),
        ),
        PublishedPart(
            "caption", "BLIP-2 OPT-2.7b", 15000, "MIT; its language model: OPT, non-commercial research",
            repo="Salesforce/blip2-opt-2.7b", files=("*.json", "*.txt", "model*.safetensors"), commercial=False,
            instead="write captions into .txt files beside the photos, or give --caption Salesforce/blip2-flan-t5-xl",
            optional=True,
        ),
    )  # fmt: skip


def _face(pack: str, megabytes: int) -> PublishedPart:
    return PublishedPart(
        "face", f"InsightFace {pack}", megabytes, "non-commercial research only", url=f"{_FACE_RELEASE}/{pack}.zip",
        commercial=False, instead=OWN_FACE_PACK,
    )  # fmt: skip


def _base(name: str, repo: str, megabytes: int, license: str, files: tuple[str, ...]) -> tuple[PublishedPart, ...]:
    return (
        PublishedPart("base", name, megabytes, license, repo=repo, files=files, notice=_OPENRAIL_NOTICE),
        PublishedPart(
            "base_config", f"{name}, without weights", 3, license, repo=repo, files=_DIFFUSERS_CONFIGS, optional=True
        ),
    )


_CONTROLNET_FILES = ("config.json", "diffusion_pytorch_model.fp16.safetensors")


def _depth(name: str, repo: str, megabytes: int, license: str) -> PublishedPart:
    return PublishedPart(
        "depth_controlnet", name, megabytes, license, repo=repo, files=_CONTROLNET_FILES, notice=_OPENRAIL_NOTICE,
        optional=True,
    )  # fmt: skip


_SDXL_DEPTH = _depth("ControlNet depth for SDXL", "diffusers/controlnet-depth-sdxl-1.0", 2502, "OpenRAIL++")
_LIGHTNING_FILE = "sdxl_lightning_4step_{}.safetensors"
SOURCES: dict[str, tuple[PublishedPart, ...]] = {
    "sd15": (
        *_base("Stable Diffusion 1.5", _SD15, 2133, "CreativeML OpenRAIL-M", _DIFFUSERS_FP16),
        *_common(_face("buffalo_l", 288)),
        PublishedPart(
            "few_steps_lora", "LCM-LoRA for SD 1.5", 135, "OpenRAIL++", repo="latent-consistency/lcm-lora-sdv1-5",
            file="pytorch_lora_weights.safetensors", notice=_OPENRAIL_NOTICE, optional=True,
        ),
        _depth("ControlNet 1.1 depth for SD 1.5", "lllyasviel/control_v11f1p_sd15_depth", 723, "CreativeML OpenRAIL-M"),
    ),
    "sdxl": (
        *_base("SDXL 1.0", _SDXL, 6940, "CreativeML OpenRAIL++-M", _DIFFUSERS_FP16),
        *_common(_face("antelopev2", 361)),
        PublishedPart(
            "few_steps_lora", "SDXL-Lightning LoRA, 4 steps", 394, "OpenRAIL++", repo="ByteDance/SDXL-Lightning",
            file=_LIGHTNING_FILE.format("lora"), notice=_OPENRAIL_NOTICE, optional=True,
        ),
        _SDXL_DEPTH,
    ),
    "sdxl-lightning": (
        # Its own UNet comes below; SDXL's would be 5 GB for nothing.
        *_base("SDXL 1.0, without its UNet", _SDXL, 1805, "CreativeML OpenRAIL++-M", _DIFFUSERS_FP16[:-1]),
        PublishedPart(
            "unet", "SDXL-Lightning UNet, 4 steps", 5135, "OpenRAIL++", repo="ByteDance/SDXL-Lightning",
            file=_LIGHTNING_FILE.format("unet"), notice=_OPENRAIL_NOTICE,
        ),
        *_common(_face("antelopev2", 361)),
        _SDXL_DEPTH,
    ),
}  # fmt: skip
