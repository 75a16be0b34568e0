from astraea_jax.lab.bench_jct import run

if __name__ == "__main__":
    run()
