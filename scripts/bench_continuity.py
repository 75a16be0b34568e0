from astraea_jax.lab.bench_continuity import run

if __name__ == "__main__":
    run()
