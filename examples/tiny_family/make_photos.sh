#!/bin/sh
# Render the photos that the tiny family is trained and validated on: 256x192 pixels, 8 a person, with captions and truth.
# Usage: examples/tiny_family/make_photos.sh photos [PEOPLE]     About 15 photos a second on two cores. Run it again to go on.
set -eu
out=${1:-photos}
people=${2:-1200}
half=$((people / 2))
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
bolid synth --person-seed "0:$half" --photos 8 --size 192x256 --out "$out/train" --quiet >/dev/null &
bolid synth --person-seed "$half:$people" --photos 8 --size 192x256 --out "$out/train" --quiet >/dev/null &
wait
bolid synth --person-seed 100000:100160 --photos 8 --size 192x256 --out "$out/val" --quiet >/dev/null
