from astraea_jax.lab.bench_experts import run

if __name__ == "__main__":
    run()
