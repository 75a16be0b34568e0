from astraea_jax.lab.bench_waits import run

if __name__ == "__main__":
    run()
