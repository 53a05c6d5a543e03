#!/bin/sh
# The body encoder and both adapters of the tiny family, made by the program's own commands with their defaults.
#
#   sh examples/tiny_family/train_body.sh PHOTOS WORK
#
# PHOTOS: rendered training people (make_photos.sh); WORK: where shards and results go. About an hour on one core for
# 2,000 people with 8 photos: extract 8 minutes, shard 5, train-vae 14, train-adapter 40 (100 steps a minute). Run it again
# after an interruption and it goes on where it stopped. Needs the family's base, pose, face and image-text models.
set -eu
photos=$1
work=$2
here=$(cd "$(dirname "$0")/../.." && pwd)

bolid extract "$photos" --out "$work/shards" --family tiny
bolid shard "$work/shards" --out "$work/train"
bolid train-vae "$work/train" --out "$work/body-encoder.safetensors"
bolid train-adapter "$work/train" --body-encoder "$work/body-encoder.safetensors" --out "$work/adapter"

mkdir -p "$here/bolid/tiny/adapter"
cp "$work/body-encoder.safetensors" "$here/bolid/tiny/"
cp "$work/adapter/face.safetensors" "$work/adapter/body.safetensors" "$here/bolid/tiny/adapter/"
