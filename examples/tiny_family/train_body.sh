#!/bin/sh
# The body encoder and the adapters of the tiny family, made by the program's own commands from rendered photos.
#
#   sh examples/tiny_family/train_body.sh PHOTOS WORK       PHOTOS: make_photos.sh; WORK: shards and results
#
# Needs the family's base, pose, face and image-text models. Typed again after an interruption it goes on.
set -eu
bolid extract "$1" --out "$2/shards" --family tiny
bolid shard "$2/shards" --out "$2/train"
bolid train-vae "$2/train" --out "$2/body-encoder.safetensors" --preset tiny
bolid train-adapter "$2/train" --body-encoder "$2/body-encoder.safetensors" --out "$2/first" --preset tiny
bolid train-adapter "$2/train" --body-encoder "$2/body-encoder.safetensors" --out "$2/adapter" --preset tiny-pictures \
    --branches body --init "$2/first"
