from astraea_jax.lab.bench_scheduler import run

if __name__ == "__main__":
    run()
