from astraea_jax.lab.bench_offload import run

if __name__ == "__main__":
    run()
