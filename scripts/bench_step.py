from astraea_jax.lab.bench_step import run

if __name__ == "__main__":
    run()
