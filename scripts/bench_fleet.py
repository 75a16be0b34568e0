from astraea_jax.lab.bench_fleet import run

if __name__ == "__main__":
    run()
