from astraea_jax.lab.bench_mixtures import run

if __name__ == "__main__":
    run()
