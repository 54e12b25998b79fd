#!/usr/bin/env bash
# Everything that needs a GPU in one go: tests, speed beside the plain networks, a short run of every task.
#
#   bash tests/gpu.sh [DATA ...]        under 9 minutes on an H100-class card with 16 cores
#   bash tests/gpu.sh --toy             the same commands at a tiny size on a CPU, 3 minutes on two cores
#   STAGES="bench decoder" bash tests/gpu.sh [DATA ...]        these stages only
#
# DATA: folders of PercePiano, of MAESTRO (its MIDI is enough), of a speech corpus, in any order; what is not
# given is synthetic. Nothing is downloaded. Every stage has its own time limit, its log and its JSON in OUT,
# and a stage that fails takes nothing from the others. Eight files stay: a JSON a stage, and results.tar.gz
# (logs, predictions, curves, metrics; no weights). A table ends the run; exit code 1 if a stage failed.
#
# Variables: OUT results (out); WORK caches and runs, kept if given (a temporary folder), of one run at a time;
# HAN_SECONDS and AST_SECONDS of training (130, 85).
set -euo pipefail

export OUT=$(realpath -m "${OUT:-out}")
export HAN_SECONDS=${HAN_SECONDS:-130}
export AST_SECONDS=${AST_SECONDS:-85}
export PYTHONUNBUFFERED=1
cores=$(env -u OMP_NUM_THREADS nproc)
threads=$((cores > 7 ? cores / 4 : 1))
export OMP_NUM_THREADS=$threads

# ---- stages: results in $run/results, training in $run/runs -----------------------------------------------
environment() {
    python tests/gpu_bench.py environment "$DEVICE" "$run/results/environment.json"
}

bench() {
    python tests/gpu_bench.py bench "$DEVICE" "$run/results/bench.json" "${toy[@]}"
}

han() {  # the published recipe, overlaps kept, four folds at once
    local fold small=()
    [ -z "$TOY" ] || small=(--size 16 --heads 4 --epochs 1)
    for fold in 0 1 2 3; do
        within "$HAN_SECONDS" python train_han.py "${rated[@]}" --lr 2.5e-5 --keep-overlap --fold $fold \
            --name f$fold "${trainer[@]}" "${small[@]}" &
    done
    all_well
    python eval.py --ckpt "$run"/runs/f?/best.pt "${rated[@]}" "${saved[@]}" --save-results recipe_keepoverlap
}

render() {  # beside HAN, which goes first; one step of a pre-training makes the filter banks
    renice -n 19 $$
    python data.py render --midi-root "$MIDI" --out "$WORK/wav" --workers "$cores"
    python pretrain_ast.py "${sound[@]}" --preset tiny --frames 128 --max-steps 1 --batch 2 \
        --workers 0 --amp off --device cpu --out "$WORK/prepared"
    python -c 'import json, sys, data
store = data.open_fbank(sys.argv[1])
print(json.dumps({"files": len(store.names), "hours": float(store.frames.sum()) / 360_000}))' \
        "$WORK"/cache/fbank-* >"$run/results/sound.json"
    python eval.py floor --task ast "${rated[@]}" "${saved[@]}" --save-results floor
}

pretrain() {
    local small=()
    [ -z "$TOY" ] || small=(--width 16 --depth 1 --heads 2 --frames 128 --batch 8 --micro-batch 4
        --max-steps 4 --eval-every 2 --workers 0 --amp off)
    within "$AST_SECONDS" python pretrain_ast.py "${sound[@]}" --preset small --frames 1024 --visible-only \
        --dropout 0 --amp bf16 --batch 256 --micro-batch 256 --lr 5e-4 --lr-schedule constant --warmup 200 \
        --ema 0.998 --eval-every 100 --epochs 10000 --workers "$cores" --name pretrain \
        "${trainer[@]}" "${small[@]}"
}

finetune() {  # the probe of the frozen weights beside fine-tuning
    local fold small=() weights=$WORK/pretrain/runs/pretrain/best.pt
    [ -z "$TOY" ] || small=(--epochs 2 --freeze 1 --frames 128 --batch 8 --workers 0 --amp off)
    for fold in 0 1 2 3; do
        within 85 python pretrain_ast.py --task finetune "${rated[@]}" --init "$weights" --frames 512 --crops 2 \
            --amp bf16 --micro-batch 16 --epochs 15 --freeze 10 --dropout .1 --workers "$threads" --fold $fold --name f$fold \
            "${trainer[@]}" "${small[@]}" &
    done
    python eval.py floor --task ast --probe "$weights" "${rated[@]}" "${saved[@]}" --save-results probe &
    all_well
    python eval.py --ckpt "$run"/runs/f?/best.pt "${rated[@]}" "${saved[@]}" --save-results pretrained
}

decoder() {  # beside fine-tuning
    local preset small=() own
    [ -z "$TOY" ] || small=(--hidden 16 --layers 2 --batch 4 --steps 6 --eval-every 3 --log-every 1 --workers 0
        --amp off)
    for preset in baseline default baseline25; do
        own=(--hidden 1024 --bidirectional)
        [ $preset != baseline25 ] || own=(--hidden 1024)  # one direction, by its learned start
        [ $preset != default ] || own+=(--warmup 50)  # its own takes 500 steps
        within 100 python train_decoder.py --data "$SPEECH" --cache "$WORK/cache" --preset $preset \
            --steps 300 --eval-every 100 --log-every 10 --workers "$threads" --name $preset \
            "${own[@]}" "${trainer[@]}" "${small[@]}" &
    done
    all_well
    python eval.py curves --run "$run"/runs/* --out "$run/results/curves.png"
}

# ---- helpers ----------------------------------------------------------------------------------------------
within() {  # seconds, command: a trainer that is stopped has saved what it learnt
    timeout --foreground -k 20 "$@" || [ $? = 124 ]
}

all_well() {  # waits for every background job; false where one failed
    local job failed=0
    for job in $(jobs -p); do
        wait "$job" || failed=1
    done
    return $failed
}

corpora() {  # what DATA does not give; what several trainers will read is cached before they start
    local pieces=() trials=(--days 4 --trials 150 --bins-per-phoneme 14)
    [ -z "$TOY" ] || pieces=(--segments 8 --players 4)
    [ -z "$TOY" ] || trials=(--days 2 --trials 10)
    [ -d "$PERCEPIANO" ] || python data.py synth-percepiano --out "$PERCEPIANO" "${pieces[@]}"
    [ -d "$SPEECH" ] || python data.py synth-speech --out "$SPEECH" "${trials[@]}"
    python data.py percepiano --data "$PERCEPIANO" --cache "$WORK/cache"
    python -c 'import sys, data; data.open_speech(*sys.argv[1:])' "$SPEECH" "$WORK/cache"
}

share_card() {  # NVIDIA's MPS: kernels of several trainings run at once instead of by turns; bench comes before
    export CUDA_MPS_PIPE_DIRECTORY=$WORK/mps CUDA_MPS_LOG_DIRECTORY=$WORK/mps
    mkdir -p "$WORK/mps"
    if nvidia-cuda-mps-control -d; then
        shared=yes
        timeout 30 python -c 'import torch; torch.ones(1, device="cuda")' || unshare_card
    else
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
}

unshare_card() {
    [ -z "$shared" ] || echo quit | nvidia-cuda-mps-control || true
    shared=
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

stage() {  # name, seconds: its log and JSON; never fails
    local name=$1 limit=$2 start=$(date +%s) code=0
    [[ " ${STAGES:-$name} " == *" $name "* ]] || return 0
    [ -z "$TOY" ] || limit=$((5 * limit))
    rm -rf "${WORK:?}/$name" "$OUT/$name.json"
    mkdir -p "$WORK/$name/results"
    timeout -k 10 "$limit" bash tests/gpu.sh --stage "$name" >"$OUT/logs/$name.log" 2>&1 &
    echo $! >"$WORK/$name/pid"
    wait $! || code=$?
    rm "$WORK/$name/pid"
    python tests/gpu_table.py summary "$WORK/$name" "$OUT/$name.json" \
        exit=$code start="$start" seconds=$(($(date +%s) - start)) limit="$limit" || true
    echo "$name: exit code $code"
}

finish() {  # the table, the archive; exit code 1 if a stage failed
    local failed=0
    [ -z "${sampler:-}" ] || kill "$sampler"
    cat "$WORK"/*/pid 2>/dev/null | xargs -r kill || true  # stages of an interrupted run
    unshare_card
    python tests/gpu_table.py table "$OUT" >"$OUT/logs/table.txt" || failed=1
    (cd "$WORK" && find . -path './*/results/*' -o -path './*/runs/*/*.json*') \
        | tar -czf "$OUT/results.tar.gz" -C "$WORK" -T - -C "$OUT" logs
    cat "$OUT/logs/table.txt"
    rm -r "$OUT/logs"
    [ -n "$keep" ] || rm -r "$WORK"
    exit $failed
}

# ---- one stage, called below ------------------------------------------------------------------------------
if [ "${1:-}" = --stage ]; then
    run=$WORK/$2
    rated=(--data "$PERCEPIANO" --cache "$WORK/cache")
    sound=(--data "$WORK/wav" --cache "$WORK/cache")
    [ -z "$MAESTRO" ] || sound=(--data "$MAESTRO" --audio "$WORK/wav" --cache "$WORK/cache"
        --exclude-overlap "$PERCEPIANO")
    trainer=(--out "$run/runs" --device "$DEVICE")
    saved=(--results-dir "$run/results" --device "$DEVICE")
    toy=(${TOY:+toy})
    "$2"
    exit
fi

# ---- all of them ------------------------------------------------------------------------------------------
keep=${WORK:-}
shared=
export WORK=$(realpath -m "${WORK:-$(mktemp -d)}")
export TOY= DEVICE=cuda MAESTRO= PERCEPIANO=$WORK/percepiano SPEECH=$WORK/speech
for folder in "$@"; do
    if [ "$folder" = --toy ]; then
        TOY=yes
        DEVICE=cpu
    elif [ -d "$folder/virtuoso" ]; then
        PERCEPIANO=$(realpath "$folder")
    elif compgen -G "$folder/maestro-v*.csv" >/dev/null; then
        MAESTRO=$(realpath "$folder")
    elif [ -d "$folder" ]; then
        SPEECH=$(realpath "$folder")
    else
        echo "tests/gpu.sh: $folder: expected --toy or a folder of data" >&2
        exit 2
    fi
done
export MIDI=${MAESTRO:-$PERCEPIANO/virtuoso/data/all_2rounds}
cd "$(dirname "$0")/.."
mkdir -p "$OUT/logs" "$WORK"
trap finish EXIT
if [ -z "$TOY" ]; then
    nvidia-smi --query-gpu=timestamp,utilization.gpu,memory.used --format=csv,noheader,nounits -l 1 \
        >"$WORK/gpu.csv" &
    sampler=$!
fi

corpora >"$OUT/logs/corpora.log" 2>&1 &
preparing=$!
stage environment 60
wait "$preparing" || echo "corpora: failed, see corpora.log"
stage bench 100
[ -n "$TOY" ] || share_card
stage render 160 &
rendering=$!
stage han 160
wait "$rendering"
stage pretrain 100
stage decoder 120 &
decoding=$!
stage finetune 120
wait "$decoding"
