#!/usr/bin/env bash
# Runs every study, for a machine with the data sets and a GPU: experiments/run_all.sh [KEY=VALUE ...]   (added to every run)
# Resumable: a finished point is not run again, an interrupted training goes on; Ctrl-C or a signal ends the whole.
# WEIGHTS names the folder of weight files. STUDIES="fixed_point_ladder aciq" runs these alone; FAST=1 tries everything on a few images.
# BACKGROUND=1 starts it apart from the terminal, behind all other work, on THREADS threads; the log is in run_all.log (LOG=FILE).
set -uo pipefail
set -m  # else a study in the background would not hear an interrupt
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
weights=${WEIGHTS:-${QEXP_DATA_DIR:-data}/weights}
resnet20="weights=$weights/cifar10_resnet20-12fca82f.th"
fast=${FAST:+debug=fast}
threads=${THREADS:+trainer.threads=$THREADS}

if [ -n "${BACKGROUND:-}" ]; then
    log=${LOG:-run_all.log}
    BACKGROUND='' nohup nice -n 19 bash experiments/run_all.sh "$@" >>"$log" 2>&1 </dev/null &
    echo "started as process $!: kill $! ends it, the same command continues it; tail -f $log shows where it is"
    exit
fi

declare -A options=(
    [method_shelf]="$resnet20" [ptq_ladder]="$resnet20" [low_bit_resnet20]="$resnet20" [low_bit_resnet20_full]="$resnet20"
    [one_bit_methods]="$resnet20" [one_bit_bwn]="$resnet20" [one_bit_xnor]="$resnet20"
    [detection]="weights=$weights/MobileNetV2-YOLOv3-Nano-voc.weights" [detection_qat]="weights=$weights/MobileNetV2-YOLOv3-Nano-voc.weights"
    [detection_ssd]="model.net.backbone=$weights/imagenet_squeezenet1_1.pt"
)
studies=${STUDIES:-method_shelf ptq_ladder fixed_point_ladder fixed_point_ladder_cifar aciq caq caq_winograd caq_googlenet caq_faces
    caq_detection dorefa_pact_toynet dorefa_pact dorefa_pact_mobilenet mobilenetv2_cfg1s
    one_bit one_bit_methods one_bit_bwn one_bit_xnor one_bit_thresholds low_bit_resnet20 low_bit_resnet20_full
    mobilenet_collapse mobilenet_collapse_edits detection detection_qat detection_ssd}

failed=() running=
stop() {  # the study that runs is ended too, and no other is started
    [ -n "$running" ] && kill -INT "$running" 2>/dev/null && wait "$running"
    echo "interrupted; the same command continues"
    exit 130
}
trap stop INT TERM
for study in $studies; do
    echo "== $study"
    # shellcheck disable=SC2086 -- options are words
    $python run.py -m experiment=$study ${options[$study]:-} $threads $fast "$@" &
    running=$!
    wait "$running"
    status=$?
    [ $status -eq 130 ] && stop
    [ $status -eq 0 ] || failed+=("$study")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "points failed in: ${failed[*]} (each study's page and table name them)"
    exit 1
fi
