#!/bin/sh
# The body encoder and both adapters of the tiny family, made by the program's own commands.
#
#   sh examples/tiny_family/train_body.sh PHOTOS WORK
#
# PHOTOS: rendered training people, beside the validation people in val (make_photos.sh); WORK: where shards and results go.
# For 2,000 people with 8 photos on one core: extract 8 minutes, shard 5, train-vae 14, train-adapter 40 (100 steps a
# minute). What follows looks at pictures that the base makes, with two processes, 24 photos a step: 2.7 hours (6 steps a
# minute), 50 minutes (16 steps a minute) and 65 minutes (7 steps a minute), 20 minutes without pictures, 65 minutes (11 steps a
# minute), an hour and a half, two hours, a quarter of an hour without training. Run it again after an interruption and it goes on where it stopped. Needs the
# family's base, pose, face and image-text models.
set -eu
photos=$1
work=$2
here=$(cd "$(dirname "$0")/../.." && pwd)
tiny=$here/examples/tiny_family

bolid extract "$photos" --out "$work/shards" --family tiny
bolid shard "$work/shards" --out "$work/train"
# The shipped encoder went on from such a one three times, on ever more people (--init and --anchor: the one before it),
# on 4,369: --views 6 --people 48 --steps 3000 --learning-rate 0.002 --anchor-weight 2 --spoil 0.1, 28 minutes. Then on 3,000
# others, anchored to that: --steps 5000 --learning-rate 0.003 --anchor-weight 0.5, and 3,000 of 40 people at --detail 1.5.
encoder=$work/body-encoder.safetensors
bolid train-vae "$work/train" --out "$encoder"
bolid train-adapter "$work/train" --body-encoder "$encoder" --out "$work/adapter"

# From here on the pictures' bodies are compared with the person's (examples/tiny_family/LEARNT.md says what each stage gave). The shipped
# ones came here in more parts, on 4,369 people, and their first 200 swapped steps were with --id-loss body; L_id did not yet
# look through windows, nor ask for what is expected of photos (examples/tiny_family/LEARNT.md).
go_on() {  # go_on OUT INIT OPTIONS...: a step of 24 photos, 12 for each of two processes; later options win
    out=$1 init=$2
    shift 2
    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        -m bolid_cli.main train-adapter "$work/train" --body-encoder "$encoder" --out "$out" --init "$init" --batch-size 12 \
        --device cpu --face-dropout 0.6 --build-word-dropout 1 --pixel-every 1 "$@"
}
go_on "$work/adapter-sampled" "$work/adapter" --steps 1000 --learning-rate 0.001 --ema 0.99 \
    --id-loss body --id-weight 0.3 --x-gen sampled --x-gen-steps 6 --x-gen-grad-steps 6
python "$tiny/measure_sliders.py" "$photos" --every-ratio --out "$work/readout.safetensors"
go_on "$work/adapter-swapped" "$work/adapter-sampled" --steps 840 --learning-rate 0.001 --ema 0.98 \
    --id-loss sliders --sliders "$work/readout.safetensors" --id-weight 0.4 --clip-weight 0.3 --x-gen swapped
# The face branch goes on from before: what it learnt while photos were swapped makes everybody broader.
mkdir -p "$work/both"
cp "$work/adapter-swapped/body.safetensors" "$work/adapter-sampled/face.safetensors" "$work/both/"
go_on "$work/adapter-last" "$work/both" --steps 470 --learning-rate 0.0007 --ema 0.97 \
    --id-loss sliders --sliders "$work/readout.safetensors" --id-weight 0.4 --clip-weight 0.3 \
    --x-gen sampled --x-gen-steps 8 --x-gen-grad-steps 4

# At full strength these branches override the text: the pose is as asked less often (examples/tiny_family/LEARNT.md has the figures).
mkdir -p "$work/weighed" "$work/longer"
python "$tiny/weigh_adapter.py" "$work/adapter-last/face.safetensors" 0.5 "$work/weighed/face.safetensors"
python "$tiny/weigh_adapter.py" "$work/adapter-last/body.safetensors" 0.72 "$work/weighed/body.safetensors"
# The shipped body branch changed to a finer encoder and a longer trained base here, and learnt 220 steps more of the kind above.

# How long the body's vector is counts from here on. The face branch learns portraits beside a body branch that is left
# behind; then both see their pictures, and the face is compared too. The shipped ones did 595 of the last 720 steps.
go_on "$work/faces" "$work/weighed" --batch-size 24 --steps 1600 --ema 0.99 --face-dropout 0.2
cp "$work/faces/face.safetensors" "$work/longer/"
python "$tiny/keep_length.py" "$work/weighed/body.safetensors" "$work/train" "$work/longer/body.safetensors"
go_on "$work/adapter-both" "$work/longer" --steps 720 --stop-after 595 --learning-rate 0.0007 --ema 0.97 --face-dropout 0.3 \
    --id-loss sliders --sliders "$work/readout.safetensors" --id-weight 0.4 --clip-weight 0.3 --face-weight 0.5 \
    --x-gen sampled --x-gen-steps 8 --x-gen-grad-steps 4

# L_id took hair and faces away; it leaves heads alone from here on. Two trainings part after 355 steps, the second with a probe
# of its own among the readers, and their mean goes on. (The shipped ones, one process of 24 photos: 45 minutes to an hour for
# each 300 steps; what is above "asked" was not yet asked for the head's length, as --spare-heads now is.)
whole="--steps 1000 --learning-rate 0.0007 --ema 0.97 --face-dropout 0.3 --spare-heads
    --id-loss sliders --sliders $work/readout.safetensors --id-weight 0.4 --clip-weight 0.3 --face-weight 1
    --x-gen sampled --x-gen-steps 8 --x-gen-grad-steps 4"
mkdir -p "$work/parting" "$work/own" "$work/mixed"
if [ ! -f "$work/parting/body.safetensors" ]; then
    go_on "$work/heads" "$work/adapter-both" $whole --stop-after 355
    cp "$work/heads/face.safetensors" "$work/parting/"
    cp "$work/heads/body.safetensors" "$work/parting/"
fi
go_on "$work/heads" "$work/adapter-both" $whole --stop-after 640
python "$tiny/train_probe.py" --photos "$photos" --val "$photos/../val" --out "$work/reader/probe" --work "$work/reader-work" \
    --steps 4500 --lr 0.002 --smallest 0.72 --seed 77
cp -R "$here/bolid/tiny/pose" "$work/own/"
read_too="$whole --readers $work/own,$work/reader"
go_on "$work/heads-read" "$work/parting" $read_too --stop-after 199
for branch in face body; do
    python "$tiny/mix_adapters.py" "$work/heads/$branch.safetensors" "$work/heads-read/$branch.safetensors" "$work/mixed/$branch.safetensors"
done
go_on "$work/asked" "$work/mixed" $read_too --stop-after 521
go_on "$work/asked-on" "$work/asked" $read_too --steps 1100 --stop-after 847

# The mean of before and after, the body stretched. Then its pictures of people it was not trained on say what they lack.
mkdir -p "$work/mean" "$work/stretched" "$work/calibrated" "$here/bolid/tiny/adapter"
for branch in face body; do
    python "$tiny/mix_adapters.py" "$work/mixed/$branch.safetensors" "$work/asked-on/$branch.safetensors" "$work/mean/$branch.safetensors"
done
cp "$work/mean/face.safetensors" "$work/stretched/"
python "$tiny/stretch_body.py" "$work/mean/body.safetensors" "$work/train" 1.35 "$work/stretched/body.safetensors"
bolid synth --person-seed 15000:15300 --photos 8 --size 192x256 --out "$work/new-people" --quiet > /dev/null
cp "$encoder" "$here/bolid/tiny/"
python "$tiny/calibrate_body.py" "$work/stretched" "$work/new-people" "$work/calibrated/body.safetensors" --part 0.4
cp "$work/mean/face.safetensors" "$here/bolid/tiny/adapter/"
python "$tiny/weigh_adapter.py" "$work/calibrated/body.safetensors" 0.88 "$here/bolid/tiny/adapter/body.safetensors"
