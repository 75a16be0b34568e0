from astraea_jax.lab.bench_serving import run

if __name__ == "__main__":
    run()
