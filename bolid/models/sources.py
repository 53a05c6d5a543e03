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
    members: tuple[tuple[str, PublishedPart], ...] = ()  # file name in the part's folder -> where that one is published

    @property
    def place(self) -> str:
        """The repository or address, or those of its members."""
        return self.repo or self.url or ", ".join(source.place for _, source in self.members)


_OPENRAIL_NOTICE = "its license's list of forbidden uses goes with every copy"
_AGPL_NOTICE = (
    "ultralytics and its weights are AGPL-3.0: what is distributed, or served over a network, together with them falls "
    "under the AGPL, unless you hold ultralytics' enterprise license"
)
OWN_FACE_PACK = (
    "remove that folder, then: bolid models pull FAMILY --only face --commercial (AuraFace, Apache-2.0); or use an "
    "InsightFace-style pack of your own, trained on data that permits it, or get a commercial license from InsightFace"
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
# SHA-256 of w600k_r50.onnx, the recogniser of buffalo_l, whose embeddings the FaceID-Portrait adapters understand.
PORTRAIT_FACE_MODEL = "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"
# The files by which InsightFace's published packs are known, wherever they lie.
RESEARCH_ONLY_FACE = {"w600k_r50.onnx", "w600k_mbf.onnx", "glintr100.onnx", "det_10g.onnx", "scrfd_10g_bnkps.onnx"}


def _common() -> tuple[PublishedPart, ...]:
    """What every full-size family needs besides its base."""
    return (
        PublishedPart(
            "pose", "YOLO11x-pose", 118, "AGPL-3.0", url=f"{_POSE_RELEASE}/yolo11x-pose.pt", notice=_AGPL_NOTICE,
        ),
        PublishedPart(
            "segmentation", "YOLO11x-seg", 125, "AGPL-3.0", url=f"{_POSE_RELEASE}/yolo11x-seg.pt", notice=_AGPL_NOTICE,
        ),
        _FACE,
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
        PublishedPart(
            "upscaler", "Real-ESRGAN, 4 times larger", 67, "BSD-3-Clause", repo="Comfy-Org/Real-ESRGAN_repackaged",
            file="RealESRGAN_x4plus.safetensors", optional=True,
        ),
    )  # fmt: skip


# The pack that the published face adapters were trained with.
_FACE = PublishedPart(
    "face", "InsightFace buffalo_l", 288, "non-commercial research only", url=f"{_FACE_RELEASE}/buffalo_l.zip",
    commercial=False, instead=OWN_FACE_PACK,
)  # fmt: skip


def _portrait(base: str, megabytes: int) -> PublishedPart:
    return PublishedPart(
        "face_portrait", f"IP-Adapter FaceID-Portrait for {base}", megabytes, "non-commercial research only",
        repo="h94/IP-Adapter-FaceID", file=f"ip-adapter-faceid-portrait_{base}.bin", commercial=False, optional=True,
        instead="train a face adapter of your own: bolid train-adapter",
        notice="its makers release it for research only, since InsightFace's packs are",
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
        *_common(),
        _portrait("sd15", 65),
        PublishedPart(
            "few_steps_lora", "LCM-LoRA for SD 1.5", 135, "OpenRAIL++", repo="latent-consistency/lcm-lora-sdv1-5",
            file="pytorch_lora_weights.safetensors", notice=_OPENRAIL_NOTICE, optional=True,
        ),
        _depth("ControlNet 1.1 depth for SD 1.5", "lllyasviel/control_v11f1p_sd15_depth", 723, "CreativeML OpenRAIL-M"),
    ),
    "sdxl": (
        *_base("SDXL 1.0", _SDXL, 6940, "CreativeML OpenRAIL++-M", _DIFFUSERS_FP16),
        *_common(),
        _portrait("sdxl", 749),
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
        *_common(),
        _portrait("sdxl", 749),
        _SDXL_DEPTH,
    ),
}  # fmt: skip


def _member(part: str, name: str, megabytes: int, license: str, **where: str) -> PublishedPart:
    return PublishedPart(part, name, megabytes, license, **where)  # type: ignore[arg-type]


_RTMPOSE = "https://download.openmmlab.com/mmpose/v1/projects/rtmposev1/onnx_sdk"
_WEIGHTS_NOTICE = (
    "its makers publish it under this license; the photos that it was trained on have terms of their own, and whether "
    "these bind the weights nobody has decided"
)
# What --commercial takes in place of a part that forbids commercial use, or comes under the AGPL.
CLEAN: dict[str, PublishedPart] = {
    "pose": PublishedPart(
        "pose", "RTMPose-m behind YOLOX-S", 91, "Apache-2.0", notice=_WEIGHTS_NOTICE,
        members=(
            ("detector.onnx", _member("pose", "YOLOX-S", 36, "Apache-2.0", repo="opencv/object_detection_yolox",
                                      file="object_detection_yolox_2022nov.onnx")),
            ("pose.onnx", _member("pose", "RTMPose-m, body7, 256x192", 55, "Apache-2.0", url=f"{_RTMPOSE}/"
                                  "rtmpose-m_simcc-body7_pt-body7_420e-256x192-e48f03d0_20230504.zip")),
        ),
    ),
    "segmentation": PublishedPart(
        "segmentation", "Mask R-CNN ResNet-50 FPN v2", 186, "BSD-3-Clause", notice=_WEIGHTS_NOTICE,
        url="https://download.pytorch.org/models/maskrcnn_resnet50_fpn_v2_coco-73cbd019.pth",
    ),
    "face": PublishedPart(
        "face", "AuraFace behind YuNet", 261, "Apache-2.0; YuNet: MIT", notice=_WEIGHTS_NOTICE,
        members=(
            ("yunet.onnx", _member("face", "YuNet", 1, "MIT", repo="opencv/face_detection_yunet",
                                   file="face_detection_yunet_2023mar.onnx")),
            # The other files of this repository are InsightFace's, for research only.
            ("auraface.onnx", _member("face", "AuraFace", 260, "Apache-2.0", repo="fal/AuraFace-v1",
                                      file="glintr100.onnx")),
        ),
    ),
}  # fmt: skip


def published(family: str, commercial: bool = False) -> tuple[PublishedPart, ...]:
    """The published parts of a family; with ``commercial`` those of `CLEAN` in the place of others."""
    return tuple(CLEAN.get(source.part, source) if commercial else source for source in SOURCES.get(family, ()))
