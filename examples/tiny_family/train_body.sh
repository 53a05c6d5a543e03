#!/bin/sh
# The body encoder and both adapters of the tiny family, made by the program's own commands.
#
#   sh examples/tiny_family/train_body.sh PHOTOS WORK
#
# PHOTOS: rendered training people (make_photos.sh); WORK: where shards and results go. For 2,000 people with 8 photos on
# one core: extract 8 minutes, shard 5, train-vae 14, train-adapter 40 (100 steps a minute). The second train-adapter makes
# pictures from captions and pure noise in every step: 2.7 hours (12 steps of 12 photos a minute on each of two cores).
# Run it again after an interruption and it goes on where it stopped. Needs the family's base, pose, face and image-text
# models.
set -eu
photos=$1
work=$2
here=$(cd "$(dirname "$0")/../.." && pwd)

bolid extract "$photos" --out "$work/shards" --family tiny
bolid shard "$work/shards" --out "$work/train"
# The shipped encoder went on from such a one three times, on ever more people (--init and --anchor: the one before it),
# last on 4,369: --views 6 --people 48 --steps 3000 --learning-rate 0.002 --anchor-weight 2 --spoil 0.1. 28 minutes.
bolid train-vae "$work/train" --out "$work/body-encoder.safetensors"
bolid train-adapter "$work/train" --body-encoder "$work/body-encoder.safetensors" --out "$work/adapter"
bolid train-adapter "$work/train" --body-encoder "$work/body-encoder.safetensors" --out "$work/adapter-sampled" \
    --init "$work/adapter" --steps 1000 --batch-size 24 --learning-rate 0.001 --ema 0.99 --face-dropout 0.6 \
    --build-word-dropout 1 --id-loss body --id-weight 0.3 --x-gen sampled --x-gen-steps 6 --x-gen-grad-steps 6 --pixel-every 1

mkdir -p "$here/bolid/tiny/adapter"
cp "$work/body-encoder.safetensors" "$here/bolid/tiny/"
# At full strength the branches override the text: the pose is as asked less often (docs/design.md has the figures).
python "$here/examples/tiny_family/weigh_adapter.py" "$work/adapter-sampled/face.safetensors" 0.5 "$here/bolid/tiny/adapter/face.safetensors"
python "$here/examples/tiny_family/weigh_adapter.py" "$work/adapter-sampled/body.safetensors" 0.8 "$here/bolid/tiny/adapter/body.safetensors"
