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
# HAN_SECONDS and AST_SECONDS of training (100, 70).
set -euo pipefail

export OUT=$(realpath -m "${OUT:-out}")
export HAN_SECONDS=${HAN_SECONDS:-100}
export AST_SECONDS=${AST_SECONDS:-70}
export PYTHONUNBUFFERED=1
cores=$(env -u OMP_NUM_THREADS nproc)
threads=$((cores > 7 ? cores / 8 : 1))  # up to eight processes at once
export OMP_NUM_THREADS=$threads

# ---- stages: results in $run/results, training in $run/runs -----------------------------------------------
environment() {
    python tests/gpu_bench.py environment "$DEVICE" "$run/results/environment.json"
}

bench() {  # its rows stand in order of weight: what the time does not reach is no failure, and is named
    within 112 python tests/gpu_bench.py bench "$DEVICE" "$run/results/bench.json" "${toy[@]}"
}

han() {  # the published recipe, overlaps kept, four folds at once
    local fold failed=0 small=()
    [ -z "$TOY" ] || small=(--size 16 --heads 4 --epochs 1)
    for fold in 0 1 2 3; do
        within "$HAN_SECONDS" python train_han.py "${rated[@]}" --lr 2.5e-5 --keep-overlap --fold $fold \
            --name f$fold "${trainer[@]}" "${small[@]}" &
    done
    all_well || failed=1  # what there is, is scored
    python eval.py --ckpt "$run"/runs/f?/best.pt "${rated[@]}" "${saved[@]}" --save-results recipe_keepoverlap
    return $failed
}

render() {  # beside HAN, which goes first; PercePiano's filter banks, for the fine-tuning, come with the floor
    local failed=0
    renice -n 19 $$
    python eval.py floor --task ast "${rated[@]}" "${saved[@]}" --save-results floor &
    within 80 python data.py render --midi-root "$MIDI" --out "$WORK/wav" --workers "$cores" || failed=1
    python -c 'import sys, data, models, pretrain_ast
args = pretrain_ast.parse_args(sys.argv[2:])
store = data.pretrain_data(args, False, print)[0].store
models.write_json(sys.argv[1], {"files": len(store.names), "hours": float(store.frames.sum()) / 360_000})' \
        "$run/results/sound.json" "${sound[@]}" || failed=1
    all_well && [ $failed = 0 ]
}

pretrain() {
    local readers=$((cores > 2 ? cores - 2 : 1)) small=()
    [ -z "$TOY" ] || small=(--width 16 --depth 1 --heads 2 --frames 128 --batch 8 --micro-batch 4
        --max-steps 4 --eval-every 2 --workers 0 --amp off)
    within "$AST_SECONDS" python pretrain_ast.py "${sound[@]}" --preset small --frames 1024 --visible-only \
        --dropout 0 --amp bf16 --batch 256 --micro-batch 256 --lr 5e-4 --lr-schedule constant --warmup 200 \
        --ema 0.998 --eval-every 100 --epochs 10000 --workers "$readers" --name pretrain \
        "${trainer[@]}" "${small[@]}"
}

finetune() {  # the probe of the frozen weights beside fine-tuning
    local fold failed=0 small=() weights=$WORK/pretrain/runs/pretrain/best.pt
    [ -f "$weights" ] || weights=results/ast_encoder.pt  # where pre-training failed, or was left out
    [ -z "$TOY" ] || small=(--epochs 2 --freeze 1 --frames 128 --batch 8 --eval-every 0 --workers 0 --amp off)
    echo "from $weights"
    for fold in 0 1 2 3; do
        within 85 python pretrain_ast.py --task finetune "${rated[@]}" --init "$weights" --frames 512 --crops 2 \
            --amp bf16 --micro-batch 16 --epochs 12 --freeze 8 --eval-every 80 --dropout .1 \
            --workers "$threads" --fold $fold --name f$fold "${trainer[@]}" "${small[@]}" &
    done
    python eval.py floor --task ast --probe "$weights" "${rated[@]}" "${saved[@]}" --save-results probe &
    all_well || failed=1
    python eval.py --ckpt "$run"/runs/f?/best.pt "${rated[@]}" "${saved[@]}" --save-results pretrained
    return $failed
}

decoder() {  # beside fine-tuning
    local preset failed=0 small=() own
    [ -z "$TOY" ] || small=(--hidden 16 --layers 2 --batch 4 --steps 6 --eval-every 3 --log-every 1 --workers 0
        --amp off)
    for preset in baseline default baseline25; do
        own=(--hidden 1024 --bidirectional)
        [ $preset != baseline25 ] || own=(--hidden 1024)  # one direction, by its learned start
        [ $preset = baseline ] || own+=(--warmup 50)  # their own take 500 and 1000 steps
        within 100 python train_decoder.py --data "$SPEECH" --cache "$WORK/cache" --preset $preset \
            --steps 300 --eval-every 100 --log-every 10 --workers "$threads" --name $preset \
            "${own[@]}" "${trainer[@]}" "${small[@]}" &
    done
    all_well || failed=1
    python eval.py curves --run "$run"/runs/* --out "$run/results/curves.png"
    return $failed
}

# ---- helpers ----------------------------------------------------------------------------------------------
within() {  # seconds, command: a trainer that is stopped has saved what it learnt
    local limit=$((${TOY:+5 *} $1))
    timeout --foreground -k 20 "$limit" "${@:2}" || [ $? = 124 ]
}

all_well() {  # waits for every background job; false where one failed
    local job failed=0
    for job in $(jobs -p); do
        wait "$job" || failed=1
    done
    return $failed
}

wanted() {
    [[ " ${STAGES:-$1} " == *" $1 "* ]]
}

speech() {  # what the decoder's trainers will read, made if not given; on one core in most of a minute
    renice -n 19 $BASHPID
    local trials=(--days 4 --trials 150 --bins-per-phoneme 14)
    [ -z "$TOY" ] || trials=(--days 2 --trials 10)
    [ -d "$SPEECH" ] || python data.py synth-speech --out "$SPEECH" "${trials[@]}"
    python -c 'import sys, data; data.open_speech(*sys.argv[1:])' "$SPEECH" "$WORK/cache"
}

notes() {  # PercePiano likewise, and what MAESTRO shares with it; a start with the rendering
    renice -n 19 $BASHPID
    local pieces=() left
    [ -z "$TOY" ] || pieces=(--segments 8 --players 4)
    [ -d "$PERCEPIANO" ] || python data.py synth-percepiano --out "$PERCEPIANO" "${pieces[@]}"
    python data.py percepiano --data "$PERCEPIANO" --cache "$WORK/cache"
    [ -z "$MAESTRO" ] || python data.py maestro --data "$MAESTRO" --percepiano "$PERCEPIANO" \
        --cache "$WORK/cache" &
    left=$((50 - SECONDS))
    ! wanted render || [ $left -lt 5 ] || within $left \
        python data.py render --midi-root "$MIDI" --out "$WORK/wav" --workers $((cores > 3 ? cores - 3 : 1))
    all_well
}

share_card() {  # NVIDIA's MPS: kernels of several trainings run at once instead of by turns; bench comes before
    export CUDA_MPS_PIPE_DIRECTORY=$WORK/mps CUDA_MPS_LOG_DIRECTORY=$WORK/mps
    mkdir -p "$WORK/mps"
    shared=yes
    timeout 20 nvidia-cuda-mps-control -d && card_works || unshare_card
}

card_works() {  # a context can be made; torch would take seconds
    timeout 30 python -c 'import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
sys.exit(bool(cuda.cuInit(0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(ctypes.c_void_p()), 0)))'
}

unshare_card() {
    [ -z "$shared" ] || echo quit | timeout 20 nvidia-cuda-mps-control || true
    shared=
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
}

stage() {  # name, seconds: its log and JSON; never fails
    local name=$1 limit=$2 start=$(date +%s) code=0
    wanted "$name" || return 0
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
    kill $sampler $preparing 2>/dev/null || true
    cat "$WORK"/*/pid 2>/dev/null | xargs -r kill || true  # stages of an interrupted run
    unshare_card
    python tests/gpu_table.py table "$OUT" >"$OUT/logs/table.txt" || failed=1
    cat "$OUT/logs/table.txt"
    (cd "$WORK" && find . -path './*/results/*' -o -path './*/runs/*/*.json*') \
        | tar -czf "$OUT/results.tar.gz" -C "$WORK" -T - -C "$OUT" logs || failed=1
    rm -r "$OUT/logs"
    [ -n "$keep" ] || rm -rf "$WORK"
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
sampler=
preparing=
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

notes >"$OUT/logs/notes.log" 2>&1 &
preparing=$!
! wanted decoder || speech >"$OUT/logs/speech.log" 2>&1 &
speaking=$!
stage environment 70
wait $preparing || echo "notes: failed, see notes.log"
preparing=$speaking
stage bench 120
[ -n "$TOY" ] || share_card
stage render 140 &
rendering=$!
stage han 140
wait "$rendering"
wait $speaking || echo "speech: failed, see speech.log"
preparing=
[ -z "$shared" ] || card_works || unshare_card  # a client that died may have taken MPS with it
stage pretrain 80
stage decoder 130 &
decoding=$!
stage finetune 130
wait "$decoding"
