"""The settings of `train-adapter`: ranges, choices, conflicts, presets."""

from __future__ import annotations

import dataclasses

import pytest

from bolid.errors import BolidError
from bolid.train_adapter import TrainAdapterConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"kv_rank": -1}, "--kv-rank is -1"),
        ({"text_cache": -1.0}, "--text-cache is -1"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"face_dropout": 1.5}, "--face-dropout is 1.5"),
        ({"max_context": 0}, "--max-context is 0"),
        ({"precision": "bf8"}, "--precision is 'bf8'"),
        ({"id_loss": "poses"}, "--id-loss is 'poses'"),
        ({"clip_target": "sound"}, "--clip-target is 'sound'"),
        ({"x_gen": "no-step"}, "--x-gen is 'no-step'"),
        ({"x_gen": "sampled", "id_weight": 1.0}, "--x-gen sampled is a new picture"),
        ({"x_gen": "sampled", "clip_weight": 1.0, "clip_target": "both"}, "--x-gen sampled is a new picture"),
        ({"x_gen": "few-step", "x_gen_grad_steps": 5}, "--x-gen-grad-steps is 5, of 4 steps"),
        ({"id_weight": float("nan")}, "--id-weight is nan"),
        ({"clip_weight": -1.0}, "--clip-weight is -1.0"),
        ({"pixel_alpha_bar": 1.0}, "--pixel-alpha-bar is 1.0"),
        ({"pixel_every": 0}, "--pixel-every is 0"),
        ({"learning_rate": -0.001}, "--learning-rate is -0.001"),
        ({"weight_decay": float("inf")}, "--weight-decay is inf"),
        ({"ema": 1.0}, "--ema is 1.0"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm is 0.0"),
        ({"face_weight": float("nan")}, "--face-weight is nan"),
        ({"face_detection_weight": -1.0}, "--face-detection-weight is -1"),
        ({"close_up_fraction": 1.5}, "--close-up-fraction is 1.5"),
        ({"branches": "face"}, "--branches face: there is no other branch"),
        ({"shard_branches": True, "compile": True}, "--shard-branches and --compile do not go together"),
        ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps is 0"),
        ({"x_gen": "few-step", "gradient_checkpointing": True}, "do not go together"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    with pytest.raises(BolidError, match=message):
        TrainAdapterConfig(**change)


def test_half_a_screen_of_settings_is_shown_and_each_is_explained():
    fields = dataclasses.fields(TrainAdapterConfig)
    assert sum(not field.metadata["advanced"] for field in fields) <= 16
    assert all(field.metadata["help"] and field.metadata["group"] for field in fields)


@pytest.mark.parametrize("name", TrainAdapterConfig.PRESETS)
def test_a_preset_is_a_valid_training_with_a_description(name):
    preset = dict(TrainAdapterConfig.PRESETS[name])
    assert len(preset.pop("description")) > 50
    TrainAdapterConfig(**preset)
