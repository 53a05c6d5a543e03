#!/usr/bin/env bash
# Make the tiny family's base on one large GPU, within MINUTES: decoder, base, few-step base, at 256x192 pixels.
# The encoder is the shipped one: 8 times smaller, 12 channels. So are the words that the text encoder begins with.
#
#   python examples/tiny_family/pack_photos.py photos/train photos.zip --megabytes 40     # here, beforehand
#   PHOTOS=photos.zip OUT=out examples/tiny_family/on_device.sh                           # there
#   DRY=1 PHOTOS=photos.zip OUT=out examples/tiny_family/on_device.sh                     # here: a hundredth, on the CPU
#   cat out/weights.tar.* | tar x                                                         # here, afterwards
#
# It needs torch, diffusers, transformers, safetensors, numpy and Pillow, and of this repository bolid/*.py, bolid/synth,
# bolid/tiny/base and examples/tiny_family. Each stage is a time box and exports what it has: what was finished is
# packed, whatever happens later. OUT then holds a log, a sample sheet and weights.tar.NN in pieces of 16 MiB.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-out}
PHOTOS=${PHOTOS:-photos.zip}
MINUTES=${MINUTES:-9.5} # of training; starting four programs takes another one
WORK=${WORK:-/tmp/bolid-device}
INIT=${INIT:-bolid/tiny/base} # the earlier base
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
device=cuda widths="128 128 256 384" crops=192 samples=768 few=384 photos=40000
if [ "${DRY:-}" ]; then
  MINUTES=0.6 device=cpu widths="32 32 64" crops=4 samples=4 few=4 photos=64
fi
share() { awk "BEGIN { print $MINUTES * $1 }"; }
mkdir -p "$OUT" "$WORK"
recipe=examples/tiny_family

pack() { # both UNets and, once, what they share; without a base, the decoder alone
  rm -rf "$WORK/weights" && mkdir -p "$WORK/weights"
  if [ -f "$WORK/decoder/config.json" ]; then
    mkdir -p "$WORK/weights/vae"
    cp "$WORK/decoder"/*.json "$WORK/decoder"/*.safetensors "$WORK/weights/vae"
  fi
  if [ -d "$WORK/base/export" ]; then
    rm -rf "$WORK/weights/vae" && cp -r "$WORK/base/export" "$WORK/weights/base"
  fi
  if [ -d "$WORK/few-steps/export" ]; then cp -r "$WORK/few-steps/export/unet" "$WORK/weights/few-steps-unet"; fi
  for sheet in "$WORK"/base/sheet-*.png "$WORK"/few-steps/sheet-*.png; do
    if [ -f "$sheet" ]; then cp "$sheet" "$OUT/sheet.png"; fi
  done
  rm -f "$OUT"/weights.tar.*
  tar -C "$WORK" -cf - weights | split -b 16m -d - "$OUT/weights.tar."
}
trap pack EXIT

{
  date
  $PYTHON $recipe/pack_photos.py "$PHOTOS" "$WORK/photos"
  # Part 1: the decoder against a discriminator, encoder frozen.
  $PYTHON $recipe/train_autoencoder.py "$WORK/photos" --out "$WORK/decoder" --minutes "$(share 0.25)" \
    --device $device --batch $crops --lr 3e-4 --limit $photos --init "$INIT/vae" --adversarial 0.5
  # Part 2: the base, then its few-step version.
  $PYTHON $recipe/train_base.py "$WORK/photos" --vae "$WORK/decoder" --out "$WORK/base" --minutes "$(share 0.55)" \
    --device $device --batch $samples --widths $widths --lr 1e-3 --limit $photos --sheet-minutes 2 --init "$INIT"
  $PYTHON $recipe/distill_guidance.py "$WORK/photos" --base "$WORK/base" --out "$WORK/distilled" \
    --minutes "$(share 0.10)" --device $device --batch $few --limit $photos --sheet-minutes 1
  $PYTHON $recipe/train_adversarial.py "$WORK/photos" --base "$WORK/base" --start "$WORK/distilled" \
    --out "$WORK/few-steps" --minutes "$(share 0.10)" --device $device --batch $few --limit $photos --sheet-minutes 1
  # Part 4, to come: train-vae --preset tiny and train-adapter --preset tiny on shards made beforehand.
  date
} 2>&1 | tee "$OUT/log.txt"
