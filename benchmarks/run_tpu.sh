#!/usr/bin/env bash
# Every benchmark on one TPU chip of 16 GB or more, in less than nine minutes, with random weights and no downloads.
# Options: see parts.sh. No other engine runs on a TPU without an installation of its own.
platforms=tpu,cpu
peers=
model=llama-3.2-3b
serving=(--prompts=64 --arrivals=32 --input=1024 --output=128 --max_seqs=32 --max_step_tokens=1024 --load=0.5,0.8)
step=(--batch=32 --context=1024 --steps=64 --prefill=1024)
attention=(--backends=tokamax,jax-rpa,pallas,gather --batches=64 --contexts=2048 --chunks=2048)
offload=(--lengths=1024,4096,8192 --batch=16 --context=1024 --steps=32 --repeats=3 --chunk=1024)
jct=(--policies=fcfs,astraea --programs=40 --tool_scale=0.02)
source "$(dirname "$0")/parts.sh"
benchmarks
