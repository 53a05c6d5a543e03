"""Captioning models of transformers, small and random, from their own configs: BLIP-2, and LLaVA, which is asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import bolid.extract.command
from bolid.backends.caption import Captioner, captioner_path
from bolid.errors import BolidError
from bolid.extract.command import extract
from bolid.formats.shards import read_index, read_shards
from bolid.models.families import get_family
from bolid.views import View

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *(f"word{n}" for n in range(40))]
TEMPLATE = "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% endif %}word7{% endfor %}{% endfor %}"  # noqa: E501


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


def write_blip2(folder) -> str:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}  # fmt: skip
    qformer = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "intermediate_size": 16, "encoder_hidden_size": 16}  # fmt: skip
    text = {"model_type": "opt", "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16,
            "num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=4
    )
    return write(folder, transformers.Blip2ForConditionalGeneration(config), transformers.Blip2Processor(
        transformers.BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer(), num_query_tokens=4
    ))  # fmt: skip


def write_llava(folder) -> str:
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 16, "projection_dim": 16}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    image_processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return write(folder, transformers.LlavaForConditionalGeneration(config), transformers.LlavaProcessor(
        image_processor, tokenizer(), patch_size=16, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    ))  # fmt: skip


def write(folder, network, processor) -> str:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # large, so that the picture decides the text
        parameter.data = torch.randn(parameter.shape, generator=generator)
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[write_blip2, write_llava])
def model(request, tmp_path_factory):
    torch.manual_seed(0)
    return request.param(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (40 + 8 * n, 32, 3), dtype=np.uint8) // (n + 1) for n in range(3)]


def test_a_batch_says_what_each_picture_says_alone(model, pictures):
    captioner = Captioner(model)
    together = captioner.caption(pictures)
    assert together == [captioner.caption([picture])[0] for picture in pictures]
    assert len(set(together)) > 1 and all(set(words.split()) <= set(WORDS[5:]) for words in together)
    assert "word7 word7" not in together[0][:11]  # the question is not part of the answer
    assert captioner.caption([]) == []


def test_which_captioner(tmp_path, monkeypatch):
    tiny, sd15 = get_family("tiny"), get_family("sd15")
    assert captioner_path("none", tiny) == captioner_path("sidecar", tiny) == ""
    assert captioner_path("someone/model", tiny) == "someone/model"
    with pytest.raises(
        BolidError, match="no captioning model for --caption blip2: looked for .*sd15/caption"
    ) as caught:
        captioner_path("blip2", sd15)
    assert "bolid models pull FAMILY --only caption" in caught.value.hint
    sd15.caption.mkdir(parents=True)
    (sd15.caption / "config.json").write_text("{}")
    assert captioner_path("blip2", sd15) == str(sd15.caption)
    monkeypatch.setenv("BOLID_COMMERCIAL", "1")
    with pytest.raises(BolidError, match="OPT, non-commercial research") as caught:
        captioner_path("blip2", sd15)
    assert ".txt files" in caught.value.hint


def test_what_is_no_captioner(tmp_path):
    with pytest.raises(BolidError, match="no captioning model someone/absent: .* cache does not have it") as caught:
        Captioner("someone/absent")
    assert caught.value.hint == "fetch it with: hf download someone/absent"
    with pytest.raises(BolidError, match="no captioning model") as caught:
        Captioner(str(get_family("tiny").base / "text_encoder"))
    assert "image-text-to-text" in caught.value.hint


class Reader:
    """Stands in for pose, face and image-text models: a person in every photo."""

    def __init__(self, family, device, person):
        pass

    def read(self, images):
        box, keypoints = np.array([1, 1, 30, 60], np.float32), np.full((17, 3), 0.9, np.float32)
        features = np.zeros((17, 4), np.float16)
        return [View(image, box, 0.9, keypoints, None, None, np.zeros(4, np.float32), features) for image in images]


def test_extract_takes_the_text_beside_a_photo_first(model, tmp_path, monkeypatch):
    monkeypatch.setattr(bolid.extract.command, "ViewReader", Reader)
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "anna").mkdir(parents=True)
    for number in range(3):
        picture = Image.fromarray(rng.integers(0, 256, (64, 48, 3), dtype=np.uint8))
        picture.save(tmp_path / "photos" / "anna" / f"{number}.jpg")
    (tmp_path / "photos" / "anna" / "1.txt").write_text("her own words")

    def captions(how: str) -> list[str]:
        out = tmp_path / how.replace("/", "_")
        extract(tmp_path / "photos", out, caption=how, device="cpu", force=True)
        return [sample.caption for sample in read_shards(out)]

    assert captions("sidecar") == ["", "her own words", ""] and captions("none") == ["", "", ""]
    first, own, last = captions(model)
    assert own == "her own words" and first and last
    assert read_index(tmp_path / model.replace("/", "_"))["record"]["config"]["caption"] == model
    assert "caption" not in read_index(tmp_path / "sidecar")["record"]["config"]
