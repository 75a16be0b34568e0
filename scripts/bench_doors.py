from astraea_jax.lab.bench_doors import run

if __name__ == "__main__":
    run()
