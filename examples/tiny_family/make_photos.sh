#!/bin/sh
# Render the photos that the tiny family is trained and validated on: 256x192 pixels, 8 a person, with captions and truth.
# Usage: examples/tiny_family/make_photos.sh photos [PEOPLE]     About 15 photos a second on two cores. Run it again to go on.
set -eu
out=${1:-photos}
people=${2:-1200}
half=$((people / 2))
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
bolid synth --people "0:$half" --photos 8 --size 256x192 --out "$out/train" --quiet >/dev/null &
bolid synth --people "$half:$people" --photos 8 --size 256x192 --out "$out/train" --quiet >/dev/null &
wait
bolid synth --people 100000:100160 --photos 8 --size 256x192 --out "$out/val" --quiet >/dev/null
