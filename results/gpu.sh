#!/usr/bin/env bash
# What this program does on your GPU: is it right, how fast is it, what comes out? One command:
#
#     bash results/gpu.sh IMAGES OUT SECONDS [STEP ...]
#
# IMAGES is a folder with train/CLASS/ and test/CLASS/, or a .tar.xz of one. Each step has its own
# limit, and the next one begins whatever became of it. What is done lies in OUT at any moment:
#
#   test      tests/test_gpu.py                                              test.txt
#   speed     images/s, share of the card's peak, memory                     speed.txt, speed.jsonl
#   evidence  the paper's claims at PASSES (100) passes, JOBS (4) at a time  evidence.txt, logs
#   few       500, 5,000 and all images, STEPS (8000) steps each             few.txt, logs
#   small     the README's model for CIFAR-10, SMALL (60) passes             small.txt, logs
#
# Without STEP the first three run, and the evidence goes on until SECONDS are over. Logs of runs,
# and checkpoints of the evidence's unfinished ones, are packed into OUT/logs.tar.gz: unpacked here
# or on another machine, the same command goes on with them.
set -u
cd "$(dirname "$0")/.."
if [ $# -lt 3 ]; then
  sed -n '2,4p' "$0" >&2
  exit 2
fi
images=$1
out=$2
end=$((SECONDS + $3 - 10)) # ten seconds for the last packing
shift 3
steps=${*:-test speed evidence}
python=${PYTHON:-python3}
logs=runs/gpu
mkdir -p "$out" "$logs"

left() { # the smaller of $1 and the seconds that are left
  local rest=$((end - SECONDS))
  echo $((rest < $1 ? (rest > 1 ? rest : 1) : $1))
}

limited() { # limited SECONDS NAME COMMAND ...: its output goes to OUT/NAME.txt
  local limit name=$2
  limit=$(left "$1")
  shift 2
  echo "$name: at most $limit s"
  timeout -k 5 "$limit" "$@" >>"$out/$name.txt" 2>&1 &
  wait $! # so that a signal is heard at once
  echo "$name: exit code $?, $((end - SECONDS)) s are left"
}

pack() {
  {
    find "$logs" -name '*.jsonl' -o -name config.json -o -name '*.txt'
    for run in runs/hundred/*; do
      [ -f "$logs/hundred/${run##*/}.jsonl" ] || find "$run" -name checkpoint.pt 2>/dev/null
    done
  } | tar -czf "$out/logs.part" -T - && mv "$out/logs.part" "$out/logs.tar.gz"
}
trap 'kill $(jobs -p) 2>/dev/null; pack; exit 1' INT TERM
(while sleep 15; do pack; done) &
packer=$!

{
  nvidia-smi
  nproc
  "$python" -c 'import torch, torchvision; print(torch.__version__, torchvision.__version__)'
  git log -1 --format=%h
} >"$out/system.txt" 2>&1
if [ -f "$images" ]; then
  folder=data/$(basename "$images" .tar.xz)
  [ -d "$folder" ] || "$python" -m tarfile -e "$images" "$folder"
else
  folder=$images
fi

for step in $steps; do
  case $step in
  test) limited 90 test "$python" -m pytest -rA --durations=10 tests/test_gpu.py ;;
  speed) limited 120 speed "$python" results/speed.py --out "$out/speed.jsonl" ;;
  evidence)
    limited 3600 evidence "$python" results/evidence.py run --data-dir "$folder" \
      --passes "${PASSES:-100}" --batch-size 512 --jobs "${JOBS:-4}" --out "$logs/hundred" \
      --seconds "$(left 3600)" --seeds 3 --only patch-raster patch-random square-16 square-16-4 \
      blob-9 scatter-9 no-skip mae square-16-k4
    ;;
  few)
    # Of each class 50, 500 or all training images; the test images are kept for the probe.
    for count in 50 500 5000; do
      part=data/few-$count
      mkdir -p "$part/probe"
      ln -sfn "$(realpath "$folder")/test" "$part/probe/test"
      for class in "$folder"/train/*/; do
        mkdir -p "$part/images/train/$(basename "$class")"
        find "$class" -type f | sort | head -n $count |
          xargs cp -t "$part/images/train/$(basename "$class")"
      done
      ln -sfn ../images/train "$part/probe/train"
      timeout -k 5 "$(left 150)" "$python" randsac.py --dataset folder --data-dir "$part/images" \
        --model nano --epochs 100000 --max-steps "${STEPS:-8000}" --out "$logs/few-$count" \
        >>"$out/few.txt" 2>&1 &
      pids="${pids:-} $!"
    done
    wait $pids
    for floor in "" --random-init "--features pixels"; do
      pids=""
      for count in 50 500 5000; do
        timeout -k 5 "$(left 60)" "$python" probe.py "$logs/few-$count/checkpoint.pt" $floor \
          --data-dir "data/few-$count/probe" >>"$out/few.txt" 2>&1 &
        pids="$pids $!"
      done
      wait $pids
    done
    ;;
  small)
    limited $(($(left 3600) - 60)) small "$python" randsac.py --dataset folder --data-dir "$folder" \
      --batch-size 512 --epochs "${SMALL:-60}" --out "$logs/small"
    limited 60 small "$python" probe.py "$logs/small/checkpoint.pt"
    ;;
  *) echo "there is no step $step" >&2 ;;
  esac
done
kill "$packer" 2>/dev/null
pack
ls -l "$out"
