# What first_contact.sh, run_gpu.sh and run_tpu.sh share: options, and parts that each have their time and may fail alone.
#
#   [--tiny] [--model=SHAPE] [--parts=NAME,...] [--wheels=DIR] [--revision=TEXT] [OUT]
#
# --tiny: smallest sizes on whatever device there is, to try the scripts; ten minutes for each part. --parts: only
# these. --wheels: a folder of wheels to use beside what is installed, for a machine without a network
# (scripts/collect_wheels.py). --revision names the code where there is no git. OUT gets a log per part and
# records.jsonl; by default $OUT, or else out/bench. $PYTHON is the interpreter, by default .venv's.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tiny='' revision=() chosen='' wheels='' out=${OUT:-out/bench}
for argument; do
  case $argument in
    --tiny) tiny=600 ;;
    --model=*) model=${argument#*=} ;;
    --parts=*) chosen=,${argument#*=}, ;;
    --wheels=*) wheels=${argument#*=} ;;
    --revision=*) revision=("$argument") ;;
    -*) echo "unknown option $argument; there are --tiny, --model=SHAPE, --parts=NAME,..., --wheels=DIR and --revision=TEXT" >&2; exit 2 ;;
    *) out=$argument ;;
  esac
done
mkdir -p "$out" || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
if [ "$wheels" ]; then
  site=out/wheels
  "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-index --no-deps --no-compile \
    --no-cache-dir --upgrade --target "$site" "$wheels"/*.whl || echo "some of $wheels cannot be used; going on without"
  export PYTHONPATH=$PWD/$site:$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" -P -c 'from importlib.util import find_spec as f; import sys; sys.exit(f("astraea_jax") is None)' || {
  echo "$python has no astraea_jax: pip install -e . there, or name another interpreter in \$PYTHON" >&2
  exit 2
}
# What one part has compiled, the others and the next run find.
export JAX_COMPILATION_CACHE_DIR=$PWD/out/compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

if [ "$tiny" ]; then
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_backend_optimization_level=0"  # sooner compiled; nobody looks at the figures
  serving=(--prompts=8 --input=32 --output=16 --max_seqs=8 --max_step_tokens=64 --load=0.5)
  step=(--batch=4 --context=16 --steps=8 --prefill=32 --profile)
  attention=(--batches=2 --contexts=64 --chunks= --backends=reference,gather)
  offload=(--lengths=64,128 --batch=4 --context=16 --steps=8 --repeats=1 --chunk=64)
  jct=(--policies=astraea --programs=4 --tool_scale=0.002)
else
  export JAX_PLATFORMS=$platforms  # without the device a run fails, and does not go on on the processor
  serving=(--model="$model" --random_weights "${serving[@]}")
  step=(--model="$model" --random_weights "${step[@]}")
  offload=(--model="$model" "${offload[@]}")
fi

names=() statuses=() seconds=() failed=0 known=,

# part NAME SECONDS COMMAND...: run it, unless it is not chosen, show its output and keep it.
part() {
  local name=$1 limit=${tiny:-$2} began=$SECONDS status
  shift 2
  known+=$name,
  [[ -z $chosen || $chosen == *,$name,* ]] || return 0
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed=1
  names+=("$name") seconds+=($((SECONDS - began)))
  case $status in
    0) statuses+=(done) ;;
    124 | 137) statuses+=("stopped after $limit s") ;;
    *) statuses+=("failed, status $status") ;;
  esac
}

# bench NAME SECONDS FLAGS...: the part of scripts/bench_NAME.py.
bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" "scripts/bench_$name.py" "$@" --json="$out/records.jsonl" "${revision[@]}"
}

# finish: say what came of the parts.
finish() {
  local name
  for name in ${chosen//,/ }; do
    [[ $known == *,$name,* ]] || { echo "no part is called $name; there are ${known//,/ }" >&2; failed=1; }
  done
  echo
  printf '%-10s %8s  %s\n' part seconds state
  for i in "${!names[@]}"; do
    printf '%-10s %8d  %s\n' "${names[$i]}" "${seconds[$i]}" "${statuses[$i]}"
  done
  echo "logs and records.jsonl in $out, $SECONDS s in all"
  exit $failed
}

# benchmarks: run all of them; the limits add up to less than nine minutes.
benchmarks() {
  bench step 90 "${step[@]}"
  bench attention 60 "${attention[@]}"
  bench serving 240 "${serving[@]}" --timeout_s=220 --peers="$peers"
  bench offload 70 "${offload[@]}" --plot="$out/offload.png"
  bench jct 80 --backend=engine --workload=infercept-mix "${jct[@]}"
  finish
}
