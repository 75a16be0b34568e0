#!/usr/bin/env bash
# The first nine minutes on an NVIDIA GPU of 80 GB or more: is everything there, are the results right, what does it reach?
# Needs Python 3.12 with JAX for CUDA 13, and Triton; no network if the rest comes along (--wheels). Options: see parts.sh.
platforms=cuda,cpu
peers=transformers,torch,vllm,sglang
model=llama-3.1-8b
serving=(--prompts=64 --arrivals=32 --input=1024 --output=64 --max_seqs=64 --max_step_tokens=2048 --load=0.8)
step=(--batch=64 --context=2048 --steps=64 --prefill=8192 --max_step_tokens=2048 --profile)
attention=(--batches=64,256 --contexts=2048,8192 --chunks=2048)
offload=(--lengths=1024,4096,16384 --batch=32 --context=1024 --steps=32 --repeats=3 --chunk=2048)
source "$(dirname "$0")/parts.sh"

# The limits add up to less than nine minutes.
part driver 10 nvidia-smi
part packages 20 bash -c '"$0" -m pip list --format=freeze --disable-pip-version-check; "$0" scripts/collect_wheels.py --missing' "$python"
part device 30 "$python" -c 'import jax; print(jax.devices(), jax.devices()[0].memory_stats())'
# Tests take their memory as they need it, so that several processes share the GPU.
part tests 150 env XLA_PYTHON_CLIENT_PREALLOCATE=false "$python" -m pytest tests/kernels/test_gpu.py -m gpu -n 8 -W default -p no:cacheprovider --durations=15
bench step 120 "${step[@]}"
bench attention 60 "${attention[@]}"
bench offload 60 "${offload[@]}" --plot="$out/offload.png"
bench serving 110 "${serving[@]}" --timeout_s=100 --peers="$peers"
finish
