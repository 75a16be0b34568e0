#!/usr/bin/env bash
# Every benchmark on one NVIDIA GPU of 80 GB or more, in less than nine minutes, with random weights and no downloads.
# Options: see parts.sh.
platforms=cuda,cpu
peers=transformers,torch,vllm,sglang
model=llama-3.1-8b
serving=(--prompts=128 --arrivals=64 --input=1024 --output=128 --max_seqs=64 --max_step_tokens=2048 --load=0.5,0.8)
step=(--batch=64 --context=2048 --steps=64 --prefill=8192 --max_step_tokens=2048)
attention=(--batches=64,256 --contexts=2048,8192 --chunks=2048)
offload=(--lengths=1024,4096,16384 --batch=32 --context=1024 --steps=32 --repeats=3 --chunk=2048)
jct=(--policies=fcfs,astraea --programs=40 --tool_scale=0.02)
source "$(dirname "$0")/parts.sh"
benchmarks
